#!/usr/bin/env python3
"""Run notebooks in place so that running them twice changes nothing.

    python tools/run_nbs.py                          all of nbs/ and index.ipynb
    python tools/run_nbs.py nbs/01_viz.ipynb         some
    python tools/run_nbs.py --flags slow gpu -- ...  with the cells so marked
    python tools/run_nbs.py --check                  write nothing; exit 1 and name the notebooks whose outputs are stale

Cells marked with a flag of settings.ini (slow, gpu, weights, data, browser) keep the outputs they have unless the flag is given.
Execution counts, cell metadata, timings and widget state are dropped, as `nbdev_clean` does.
"""
import argparse, os, re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
WIDGET = 'application/vnd.jupyter.widget-view+json'


def asleep(cell, skip):
    "Is this a code cell that must not run now?"
    if cell.cell_type != 'code': return False
    marks = set(re.findall(r'^\s*#\s*\|\s*(\w+)', cell.source, re.M))
    return bool(marks & skip) or re.search(r'^\s*#\s*\|\s*eval:\s*false', cell.source, re.M) is not None or 'nbdev_export(' in cell.source

def one_stream(outputs):
    "Join what the kernel sent in pieces: where it cuts depends on the clock; stderr (progress bars, warnings) does too"
    whole = []
    for o in outputs:
        if o.output_type == 'stream' and o.name == 'stderr': continue
        if whole and o.output_type == whole[-1].output_type == 'stream': whole[-1].text += o.text
        else: whole.append(o)
    return whole

def tidy(nb):
    nb.metadata = {'kernelspec': KERNEL}
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type != 'code': continue
        cell.execution_count, cell.outputs = None, one_stream(cell.outputs)
        for o in cell.outputs:
            if 'execution_count' in o: o.execution_count = None
            if 'metadata' in o: o.metadata = {}
            if 'data' in o: o.data.pop(WIDGET, None)
            if 'text/plain' in o.get('data', {}): o.data['text/plain'] = re.sub(r' at 0x[0-9a-f]{6,}', '', o.data['text/plain'])

def run(path, skip, timeout):
    "The notebook at `path` after a run from top to bottom"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    kept = {i: (c.source, c.outputs) for i, c in enumerate(nb.cells) if asleep(c, skip)}
    for i in kept: nb.cells[i].source = ''
    NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}, record_timing=False, store_widget_state=False).execute()
    for i, (source, outputs) in kept.items(): nb.cells[i].source, nb.cells[i].outputs = source, outputs
    tidy(nb)
    return nbformat.writes(nb) + '\n'

def main():
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('paths', nargs='*', type=Path, help='notebooks; default all')
    args.add_argument('--flags', nargs='*', default=[], help='run cells marked so, too')
    args.add_argument('--check', action='store_true', help='write nothing; exit 1 when outputs are stale')
    args.add_argument('--timeout', type=int, default=1800, help='seconds a cell may take')
    args = args.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ.setdefault('PYTHONWARNINGS', 'ignore')
    paths = args.paths or [*sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts), ROOT/'index.ipynb']
    stale = []
    for path in (p.resolve() for p in paths):
        new = run(path, set(ini['DEFAULT']['tst_flags'].split()) - set(args.flags), args.timeout)
        if new != path.read_text(encoding='utf-8'): stale.append(path.name)
        if not args.check: path.write_text(new, encoding='utf-8')
        print(f'{path.name}: {"changed" if path.name in stale else "as before"}', flush=True)
    if args.check and stale: sys.exit(f'stale outputs: {", ".join(stale)}; run python tools/run_nbs.py and commit the result')

if __name__ == '__main__': main()
