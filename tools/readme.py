#!/usr/bin/env python3
"""README.md from index.ipynb, with the standard library alone.

    python tools/readme.py           write README.md and its pictures (index_files/)
    python tools/readme.py --check   exit 1 when they are not what index.ipynb says

Cells may carry nbdev's directives: `#| hide` (also export, default_exp, include: false) leaves a cell out, `#| echo: false` its code, `#| output: false` its output.
"""
import argparse, base64, json, re, sys
from pathlib import Path

NOTE = '<!-- made from index.ipynb by tools/readme.py: change the notebook, not this file -->'
LEFT_OUT = {'hide', 'export', 'exporti', 'exports', 'default_exp'}
PICTURES = {'image/jpeg': 'jpg', 'image/png': 'png'}
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*(\w+)\s*:?[ \t]*(.*)$', re.M)


def joined(text): return ''.join(text) if isinstance(text, list) else text

def fenced(text, lang=''):
    text = re.sub(r'\x1b\[[0-9;]*m', '', text).strip('\n')
    ticks = max([3, *(len(t) + 1 for t in re.findall(r'^`{3,}', text, re.M))])
    return f'{"`"*ticks}{lang}\n{text}\n{"`"*ticks}' if text else ''

def table(html):
    "A table as GitHub shows it: without styles and without the box around it"
    html = re.sub(r'<style.*?</style>|</?div[^>]*>|\s(?:style|class|border|scope|halign|valign)="[^"]*"', '', html, flags=re.S)
    return re.sub(r'\n\s*', '\n', html).strip()

def alt(data):
    "Words for those who do not see the picture: what the object says of itself"
    return re.sub(r'[\[\]<>]|\s+at 0x\w+', '', joined(data.get('text/plain', '')).partition('\n')[0]).strip() or 'picture'

def shown(output, name, files):
    "One output as Markdown; its picture, if it is one, goes to `files`"
    if output['output_type'] == 'error': raise SystemExit(f'index.ipynb holds a failed cell: {output["ename"]}: {output["evalue"]}')
    if output['output_type'] == 'stream': return fenced(joined(output['text'])) if output['name'] == 'stdout' else ''
    data = output['data']
    for mime, ending in PICTURES.items():
        if mime in data:
            files[f'index_files/{name}.{ending}'] = base64.b64decode(joined(data[mime]))
            return f'![{alt(data)}](index_files/{name}.{ending})'
    if 'text/markdown' in data: return joined(data['text/markdown'])
    if '<table' in joined(data.get('text/html', '')): return table(joined(data['text/html']))
    return fenced(joined(data.get('text/plain', '')))

def blocks(cell, files):
    "The pieces of Markdown a cell becomes"
    source = joined(cell['source'])
    if cell['cell_type'] != 'code': return [source] if cell['cell_type'] == 'markdown' else []
    says = {k: v.strip() for k, v in DIRECTIVE.findall(source)}
    if LEFT_OUT & says.keys() or says.get('include') == 'false': return []
    code = '' if says.get('echo') == 'false' else fenced(DIRECTIVE.sub('', source), 'python')
    outputs = [] if says.get('output') == 'false' else [shown(o, f'{cell["id"]}-{i}', files) for i, o in enumerate(cell['outputs'])]
    return [code, *outputs]

def readme(root):
    "{path: bytes} of README.md and its pictures"
    cells, files = json.loads((root/'index.ipynb').read_text(encoding='utf-8'))['cells'], {}
    parts = [b.strip() for cell in cells for b in blocks(cell, files) if b.strip()]
    first, _, rest = parts[0].partition('\n')                         # the note stands below the title
    text = '\n\n'.join(p for p in (first, NOTE, rest.strip(), *parts[1:]) if p) + '\n'
    files['README.md'] = re.sub(r'[ \t]+$', '', text, flags=re.M).encode()
    return files

def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--check', action='store_true', help='write nothing; exit 1 when README.md is stale')
    args.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='folder of index.ipynb')
    args = args.parse_args()
    files, root = readme(args.root), args.root
    old = {p.relative_to(root).as_posix() for p in (root/'index_files').glob('*')}
    stale = [f for f, data in files.items() if not (root/f).exists() or (root/f).read_bytes() != data] + sorted(old - files.keys())
    if args.check and stale: sys.exit(f'stale: {", ".join(stale)}; run python tools/readme.py and commit the result')
    if args.check: return
    for f in old - files.keys(): (root/f).unlink()
    for f in files:
        (root/f).parent.mkdir(exist_ok=True); (root/f).write_bytes(files[f])
    print(f'README.md: {len(files["README.md"])} bytes, {len(files) - 1} pictures, {len(stale)} files changed')

if __name__ == '__main__': main()
