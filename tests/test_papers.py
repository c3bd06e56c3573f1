"""The papers' numbers: pinned totals always, the papers' text and the notes when ../shared is there."""
import re
from collections import Counter
import numpy as np, pytest
from zsad_nb.papers import PAPERS, PROTOCOLS, TABLES, papers_gaps, papers_notes, papers_numbers, papers_table
from zsad_nb.types import ConfigError, shared_dir

FILES = dict(zip(PAPERS, ('visualad', 'afr_clip', 'vip2_clip', 'kanoclip', 'anovl')))
SIZES = {'VisualAD': [490, 28, 36, 42, 36], 'AFR-CLIP': [90, 100, 22, 8, 8, 6], 'ViP2-CLIP': [288, 180, 12, 84, 24, 48],
         'KAnoCLIP': [84, 84, 20], 'AnoVL': [36, 18, 12, 18, 6, 20, 16]}
# numbers of the text that belong to no cell: a value without a row, one shown twice, a column read as fractions
SPARE = {('AFR-CLIP', 1): ['88.0', '92.8'], ('AFR-CLIP', 2): ['51.7']}


def text(name):
    folder = shared_dir()
    if folder is None or not (folder/'papers'/name).exists(): pytest.skip(f'no ../shared/papers/{name} beside the repository')
    return (folder/'papers'/name).read_text()


def blocks(paper):
    "The lines of each table, found without the script that made the file"
    t = text(f'{FILES[paper]}.txt')
    if paper == 'KAnoCLIP':
        rows = re.findall(r'^(?:CLIP|CLIP-AC|WinCLIP|April-GAN|AnomalyCLIP|MVFA-AD|Ours \(KAnoCLIP\)) (?:.*?20\d\d|—) (.*)$', t, flags=re.M)
        return ['\n'.join(rows[:7]), '\n'.join(rows[7:14]), '\n'.join(re.findall(r'^(?:[%!] ){4}(.*)$', t, flags=re.M))]
    out, last = [], -9
    for i, line in enumerate(t.split('\n')):
        if '\t' not in line: continue
        out.append([line]) if i > last + 1 else out[-1].append(line)
        last = i
    return ['\n'.join(b) for b in out]


def numbers_in(paper, block):
    return Counter(float(x) for x in re.findall(r'\d+(?:\.\d+)?' if paper == 'KAnoCLIP' else r'\d+\.\d+', block))


def numbers_of(paper, table):
    d = papers_numbers(paper, table)
    return Counter([*d.value.dropna(), *d.spread.dropna(), *map(float, SPARE.get((paper, table), []))])


def test_totals():
    d = papers_numbers()
    assert {p: d[d.paper == p].groupby('table').size().tolist() for p in PAPERS} == SIZES
    assert len(d) == 1816 and d.value.notna().sum() == 1772 and d.spread.notna().sum() == 26
    assert not d.duplicated(['paper', 'table', 'method', 'variant', 'dataset', 'domain', 'level', 'metric']).any()


def test_values_are_possible():
    d = papers_numbers()
    share = d[d.metric.isin(['AUROC', 'F1-max', 'AP', 'AUPR', 'PRO']) & d.value.notna()]
    assert share.value.between(0, 100).all() and (d.value.dropna() > 0).all()
    assert set(d.level) == {'image', 'pixel', ''} and set(d['mark']) == {'', 'bold', 'underline'}
    assert (d[d.value.isna()].note != '').all(), 'an empty cell says why'


@pytest.mark.parametrize('paper', PAPERS)
def test_every_number_of_the_text(paper):
    found = blocks(paper)
    assert len(found) == len(SIZES[paper])
    for t, block in enumerate(found, 1): assert numbers_in(paper, block) == numbers_of(paper, t), (paper, t)


def test_the_count_would_notice():
    block = blocks('AnoVL')[0].replace('57.5', '75.5')
    assert numbers_in('AnoVL', block) != numbers_of('AnoVL', 1)


def own(paper, dataset, level, metric, variant=None):
    d = papers_numbers(paper)
    d = d[(d.method == paper) & (d.dataset == dataset) & (d.level == level) & (d.metric == metric) & (d.table <= 2)]
    if variant: d = d[d.variant == variant]
    return d.value.iloc[0]


SHORT = {'MVTec': 'MVTec AD', 'DTD-Synth': 'DTD-Synthetic'}

@pytest.mark.parametrize('paper,file,image,pixel,variant', [
    ('VisualAD', 'notes_visualad.md', ('AUROC', 'F1-max', 'AP'), ('AUROC', 'F1-max', 'AP', 'PRO'), 'CLIP'),
    ('ViP2-CLIP', 'notes_vip2.md', ('AUROC', 'AP', 'F1-max'), ('AUROC', 'PRO', 'F1-max'), None)])
def test_places_agree_with_the_notes(paper, file, image, pixel, variant):
    "The notes copied some rows by hand, independently: right number in the right place"
    targets = text(file).split("Published targets")[1].split("Ablations")[0].split("Speed")[0]
    rows = re.findall(r'([A-Z][\w-]+) ((?:[\d.]+/)+[\d.]+[0-9])(?: ; ((?:[\d.]+/)+[\d.]+[0-9]))?', targets)
    assert len(rows) >= 6
    for name, im, px in rows:
        for level, metrics, vals in (('image', image, im), ('pixel', pixel, px)):
            if vals:
                got = [own(paper, SHORT.get(name, name), level, m, variant) for m in metrics]
                assert got == [float(v) for v in vals.split('/')], (paper, name, level)


def test_anovl_agrees_with_the_notes():
    text('notes_anovl.md')
    t1, t2 = papers_table('AnoVL', 1), papers_table('AnoVL', 2)
    for (row, ds), vals in {('TFA', 'MVTec AD'): (86.6, 30.1, 70.4), ('TTA', 'MVTec AD'): (90.6, 36.5, 77.8), ('TFA', 'VisA'): (85.9, 14.7, 65.1), ('TTA', 'VisA'): (91.4, 17.4, 75.0)}.items():
        assert tuple(t1.loc[('AnoVL', row), ds]) == vals
    assert tuple(t2.loc['AnoVL'].iloc[0]) == (92.5, 93.2, 96.7, 79.2, 79.7, 81.7)


@pytest.mark.parametrize('paper', ['AFR-CLIP', 'ViP2-CLIP'])
def test_means_fit_or_carry_a_note(paper):
    d = papers_numbers(paper)
    d = d[(d.table <= 2) & d.value.notna()]
    for key, g in d.groupby(['table', 'domain', 'level', 'method', 'metric']):
        mean, rows = g[g.dataset == '(average)'], g[g.dataset != '(average)']
        if len(mean) and abs(mean.value.iloc[0] - rows.value.mean()) > .0501: assert 'average to' in mean.note.iloc[0], key


def test_shapes_and_notes():
    for (p, t), (title, _) in TABLES.items():
        table = papers_table(p, t)
        assert table.notna().sum().sum() == papers_numbers(p, t).value.notna().sum() and table.attrs['title'] == title
    assert papers_table('AnoVL', 1, spread=True).loc[('AnoVL', 'TTA'), ('VisA', 'PRO')] == '75.0±0.1'
    assert any('misprint' in n for n in papers_notes('AnoVL', 7))
    assert any('lost in our copy' in n for n in papers_notes('AFR-CLIP', 1))


def test_notes_are_our_own_words():
    "No stretch of six words of a note stands in a paper"
    flat = lambda s: re.sub(r'[^a-z0-9.]+', ' ', s.casefold())
    papers = ' '.join(flat(text(f'{f}.txt')) for f in FILES.values())
    for note in set(n for x in papers_numbers().note for n in x.split(' | ')):
        w = flat(note).split()
        for i in range(len(w) - 5): assert ' '.join(w[i:i+6]) not in papers, note


def test_refusals():
    with pytest.raises(ConfigError, match='choose one of'): papers_numbers('PatchCore')
    with pytest.raises(ConfigError, match='tables 1 to 3'): papers_table('KAnoCLIP', 4)
    a = papers_numbers('AnoVL'); a['value'] = 0.
    assert papers_numbers('AnoVL').value.max() > 90, 'callers get a copy'


def test_gaps_and_protocols():
    g = papers_gaps()
    assert (g.gap >= 0).all() and g.gap.iloc[0] == g.gap.max()
    assert set(PROTOCOLS) == set(PAPERS) and PROTOCOLS['ViP2-CLIP'].trained_on('MVTec AD') == 'VisA'
