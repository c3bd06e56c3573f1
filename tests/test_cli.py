"The command line end to end, on the embedded backbone: bad input beside good, what is written when, and every exit status"
import builtins, csv, errno, io, json, os, signal, stat, struct, subprocess, sys, time, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image
import zsad_nb.detector
from zsad_nb import cli, pictures
from zsad_nb.cli import main, read_scores
from zsad_nb.pictures import read_map

RGB = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def tiny():
    "One detector for all tests: the real one, loaded once; moving it would make it encode its prompts again"
    detector = zsad_nb.detector.load_detector()
    detector.to = lambda device: detector
    return detector

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, tiny):
    "A folder to work in; `zsad predict` there gets the shared detector unless it asks for something else"
    load = zsad_nb.detector.load_detector
    plain = lambda method='anovl', *words: load(method, *words) if any(w is not None for w in words) else tiny
    monkeypatch.setattr(zsad_nb.detector, 'load_detector', plain)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(path, pixels=RGB, **how):
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path

def bomb(path, width=20_000, height=20_000):
    "A PNG whose header claims more pixels than fit into memory"
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    Path(path).write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*64)) + chunk(b'IEND', b''))

def go(*words, capsys):
    "Run the command: (status, standard output, lines of standard error)"
    status = main([str(w) for w in words])
    out = capsys.readouterr()
    return status, out.out, out.err.splitlines()

def written(folder='zsad_out'): return sorted(p.name for p in Path(folder).iterdir())

def whole(folder='zsad_out', broken_off=False):
    "Nothing half-written: every file of the results opens, and each row has its files; a run broken off may have files of one picture more"
    folder = Path(folder)
    rows = read_scores(folder/'scores.csv')
    expected = {'run.json', 'scores.csv'} | {r[k] for r in rows for k in ('overlay', 'map') if r[k]}
    if (folder/'failures.csv').exists(): expected.add('failures.csv')
    more = set(written(folder)) - expected
    assert expected <= set(written(folder)) and len(more) <= 2*broken_off
    for name in more: Image.open(folder/name).load() if name.endswith('_overlay.png') else read_map(folder/name)
    for r in rows:
        size = tuple(map(int, r['size'].split('x')))
        Image.open(folder/r['overlay']).load()
        if r['map']: assert read_map(folder/r['map']).shape == size[::-1]
    return rows


# one good run

def test_good_run(capsys):
    for name in ('a/x.png', 'a/deep/y.jpg', 'b.png'): draw(name)
    status, out, err = go('predict', 'a', '*.png', '--class-name', 'bolt', capsys=capsys)
    assert status == 0
    rows = whole()
    assert [r['path'] for r in rows] == [str(Path('a/deep/y.jpg')), str(Path('a/x.png')), 'b.png']
    assert list(rows[0])[:4] == ['path', 'score', 'size', 'seconds'] and rows[0]['size'] == '64x48' and rows[0]['class_name'] == 'bolt'
    lines = out.splitlines()
    assert lines[0].split() == ['score', 'size', 'path'] and len(lines) == 4
    shown = [float(l.split()[0]) for l in lines[1:]]
    assert shown == sorted(shown, reverse=True)
    assert any('picture' in l for l in err) and '3 pictures scored' in err[-1]
    facts = json.loads(Path('zsad_out/run.json').read_text())
    assert facts['method'] == 'anovl' and facts['backbone']['name'] == 'tiny' and facts['class_name'] == 'bolt'

def test_long_lists_are_shortened(capsys):
    for i in range(6): draw(f'p/{i}.png')
    status, out, _ = go('predict', 'p', '--quiet', '--top', 2, capsys=capsys)
    assert status == 0 and len(out.splitlines()) == 4 and '... 4 more in' in out and 'scores.csv' in out

def test_quiet_says_nothing_on_stderr(capsys):
    draw('a.png')
    assert go('predict', 'a.png', '--quiet', capsys=capsys)[2] == []

def test_json_is_one_document(capsys):
    draw('a.png'); Path('bad.png').write_text('text')
    status, out, err = go('predict', 'a.png', 'bad.png', '--json', '--quiet', '--threshold', 0.2, capsys=capsys)
    d = json.loads(out)
    assert status == 1 and d['pictures'][0]['path'] == 'a.png' and isinstance(d['pictures'][0]['score'], float) and d['pictures'][0]['anomalous'] is True
    assert [f['path'] for f in d['failures']] == ['bad.png'] and len(err) == 1
    status, out, err = go('predict', 'a.png', '--json', '--preset', 'nonsense', capsys=capsys)
    assert status == 2 and 'nonsense' in json.loads(out)['error'] and len(err) == 1

@pytest.mark.parametrize('maps', ['npy', 'png16', 'none'])
def test_maps(capsys, maps, tiny):
    draw('a.png')
    assert go('predict', 'a.png', '--maps', maps, '--quiet', capsys=capsys)[0] == 0
    row = whole()[0]
    if maps == 'none': assert row['map'] == ''; return
    m, p = read_map(Path('zsad_out')/row['map']), tiny.predict('a.png', progress=False)[0]
    lo, hi = p.map_range
    assert np.abs(m - p.map_at_size()).max() <= (0 if maps == 'npy' else (hi - lo)/65535)

def test_one_range_for_all_overlays(capsys, tiny):
    "The same picture in two runs of other company: same colours by default, other colours with --range auto"
    draw('a.png'); draw('b.png', np.full((48, 64, 3), 128, np.uint8))
    def overlay(out, *words):
        assert go('predict', *words, '--out', out, '--quiet', capsys=capsys)[0] == 0
        whole(out)
        return np.asarray(Image.open(f'{out}/a_overlay.png')).astype(int)
    alone, beside = overlay('1', 'a.png'), overlay('2', 'a.png', 'b.png')
    assert (alone == beside).all()
    lo, hi = min(p.map.min() for p in tiny.predict(['a.png', 'b.png'], progress=False)), max(p.map.max() for p in tiny.predict(['a.png', 'b.png'], progress=False))
    auto, fixed = overlay('3', 'a.png', 'b.png', '--range', 'auto'), overlay('4', 'a.png', f'--range={lo},{hi}')
    assert np.abs(auto - fixed).max() <= 1 and (auto != alone).any()

def test_class_name_auto(capsys):
    draw('bolt/1.png'); draw('nut/1.png')
    status, out, _ = go('predict', 'bolt', 'nut', '--class-name', 'auto', '--quiet', capsys=capsys)
    assert status == 0 and [r['class_name'] for r in whole()] == ['bolt', 'nut'] and 'class_name' in out.splitlines()[0]

def test_set_changes_one_setting(capsys):
    draw('a.png')
    assert go('predict', 'a.png', '--set', 'sigma=2', '--set', 'box=1', '--quiet', capsys=capsys)[0] == 0
    config = json.loads(Path('zsad_out/run.json').read_text())['config']
    assert (config['sigma'], config['box']) == (2, 1)

def test_own_backbone_weights(capsys):
    from zsad_nb.backbones import TINY
    draw('a.png')
    assert go('predict', 'a.png', '--backbone-weights', TINY/'model.safetensors', '--quiet', capsys=capsys)[0] == 0


# pictures of every odd kind that can be read

def odd(name, kind):
    "A readable picture of an unusual kind; its size as (width, height)"
    img = Image.fromarray(RGB)
    if kind == '16-bit': draw(name, RGB[..., 0].astype(np.uint16)*256)
    elif kind == '1-bit': img.convert('1').save(name)
    elif kind == 'grey': img.convert('L').save(name)
    elif kind == 'CMYK': img.convert('CMYK').save(name)
    elif kind == 'RGBA': img.convert('RGBA').save(name)
    elif kind == 'palette': img.convert('P').save(name)
    elif kind == '1x1': draw(name, RGB[:1, :1]); return (1, 1)
    elif kind == '1x5000': draw(name, np.resize(RGB, (5000, 1, 3))); return (1, 5000)
    elif kind == '5000x1': draw(name, np.resize(RGB, (1, 5000, 3))); return (5000, 1)
    elif kind == 'EXIF': exif = Image.Exif(); exif[0x0112] = 6; img.save(name, exif=exif); return (48, 64)
    return img.size

ODD = {'16-bit': 'a.png', '1-bit': 'b.png', 'grey': 'c.jpg', 'CMYK': 'd.jpg', 'RGBA': 'e.png', 'palette': 'f.png', '1x1': 'g.png', '1x5000': 'h.png', '5000x1': 'i.png', 'EXIF': 'j.jpg'}

def test_odd_pictures_are_scored(capsys):
    os.mkdir('odd')
    sizes = {str(Path('odd')/n): odd(f'odd/{n}', kind) for kind, n in ODD.items()}
    status, _, err = go('predict', 'odd', '--quiet', capsys=capsys)
    assert (status, err) == (0, [])
    assert {r['path']: r['size'] for r in whole()} == {p: f'{w}x{h}' for p, (w, h) in sizes.items()}


# pictures that cannot be scored: one sentence each, the good ones are finished

def spoil(kind):
    "Make one bad argument; it and a word of its sentence"
    if kind == 'missing': return 'lost.png', 'no such file'
    if kind == 'missing folder': return 'lost/', 'no such file or folder'
    if kind == 'empty folder': os.mkdir('void'); return 'void', 'holds no pictures'
    if kind == 'pattern': return 'nothing_*.png', 'no picture matches'
    if kind == 'text': Path('text.png').write_text('Dear all,\n'*50); return 'text.png', 'not a picture'
    if kind == 'cut': draw('cut.jpg'); Path('cut.jpg').write_bytes(Path('cut.jpg').read_bytes()[:700]); return 'cut.jpg', 'damaged or cut off'
    if kind == 'zero': Path('zero.png').touch(); return 'zero.png', '0 bytes'
    if kind == 'bomb': bomb('bomb.png'); return 'bomb.png', 'the limit is'
    if kind == 'link': os.symlink('nowhere.png', 'link.png'); return 'link.png', 'leads nowhere'
    if kind == 'web': return 'https://example.org/a.png', 'web address'

KINDS = ['missing', 'missing folder', 'empty folder', 'pattern', 'text', 'cut', 'zero', 'bomb', 'link', 'web']

def sentences(err, n):
    "`n` failures, one line each, in plain words"
    assert len(err) == n, err
    for line in err: assert line.startswith('failed: ') and len(line) < 400 and 'Traceback' not in line and 'Error' not in line, line
    return err

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('kind', KINDS)
def test_bad_beside_good(capsys, kind):
    draw('good.png')
    bad, words = spoil(kind)
    status, out, err = go('predict', bad, 'good.png', '--quiet', capsys=capsys)
    assert status == 1 and words in sentences(err, 1)[0] and bad.rstrip('/').split('/')[-1] in err[0]
    assert [r['path'] for r in whole()] == ['good.png'] and 'good.png' in out
    with open('zsad_out/failures.csv', newline='') as f: assert len(list(csv.DictReader(f))) == 1

def test_all_bad_in_one_batch(capsys):
    "Good ones between bad ones, one batch"
    words, expected = [], []
    for i, kind in enumerate(KINDS):
        words += [spoil(kind)[0], draw(f'good_{i}.png')]
    status, _, err = go('predict', *words, '--quiet', '--batch-size', 4, capsys=capsys)
    assert status == 1
    sentences(err, len(KINDS))
    assert [r['path'] for r in whole()] == [f'good_{i}.png' for i in range(len(KINDS))]

@pytest.mark.parametrize('kind', KINDS)
def test_bad_alone(capsys, kind):
    status, out, err = go('predict', spoil(kind)[0], '--quiet', capsys=capsys)
    assert status == 1 and out == ''
    sentences(err, 1)

def test_unreadable(capsys, monkeypatch):
    draw('good.png'); draw('secret.png').chmod(0)
    if os.access('secret.png', os.R_OK):  # root may read everything: let the opening fail instead
        real = builtins.open
        def guarded(file, *a, **k):
            if str(file).endswith('secret.png'): raise PermissionError(errno.EACCES, 'Permission denied', str(file))
            return real(file, *a, **k)
        monkeypatch.setattr(builtins, 'open', guarded); monkeypatch.setattr(io, 'open', guarded)
    status, _, err = go('predict', 'secret.png', 'good.png', '--quiet', capsys=capsys)
    assert status == 1 and 'not allowed to read' in sentences(err, 1)[0]
    assert [r['path'] for r in whole()] == ['good.png']

def test_vanishing_picture(capsys, tiny, monkeypatch):
    "A picture that goes away between its scoring and its overlay"
    draw('a.png'); draw('b.png')
    real = tiny.stream
    def stream(*a, **k):
        for p in real(*a, **k):
            if p.path.name == 'a.png': p.path.unlink()
            yield p
    monkeypatch.setattr(tiny, 'stream', stream)
    status, _, err = go('predict', 'a.png', 'b.png', '--quiet', capsys=capsys)
    assert status == 1 and 'no such file' in sentences(err, 1)[0] and [r['path'] for r in whole()] == ['b.png']

def test_vanishing_picture_with_a_range_of_the_run(capsys, monkeypatch):
    "With --range auto overlays are painted at the end: a picture gone by then keeps its score and is named"
    draw('a.png'); draw('b.png')
    real = cli.Run.paint_waiting
    monkeypatch.setattr(cli.Run, 'paint_waiting', lambda self: Path('a.png').unlink() or real(self))
    status, _, err = go('predict', 'a.png', 'b.png', '--quiet', '--range', 'auto', capsys=capsys)
    assert status == 1 and 'no such file' in sentences(err, 1)[0]
    assert len(read_scores('zsad_out/scores.csv')) == 2 and 'b_overlay.png' in written() and '.zsad_maps' not in written()

def test_map_too_large_for_memory(capsys, monkeypatch):
    "One picture whose map does not fit is a failure, not the end of the run"
    from zsad_nb.types import Prediction
    draw('a.png'); draw('b.png')
    real = Prediction.map_at_size
    def small(self):
        if self.path.name == 'a.png': raise MemoryError
        return real(self)
    monkeypatch.setattr(Prediction, 'map_at_size', small)
    status, _, err = go('predict', 'a.png', 'b.png', '--quiet', capsys=capsys)
    assert status == 1 and '--maps none' in sentences(err, 1)[0] and [r['path'] for r in read_scores('zsad_out/scores.csv')] == ['b.png']

def test_same_names_in_different_folders(capsys):
    for d in ('left', 'right', 'right/deep'): draw(f'{d}/01.png')
    draw('left/01.jpg')
    assert go('predict', 'left', 'right', '--quiet', capsys=capsys)[0] == 0
    rows = whole()
    assert len(rows) == 4 and len({r['overlay'] for r in rows}) == 4

def test_strange_names(capsys):
    draw('comma, "quote".png'); draw('line\nbreak.png')
    latin = os.fsdecode(b'caf\xe9.png'); draw(latin)
    status, out, _ = go('predict', '.', '--quiet', capsys=capsys)
    assert status == 0 and 'line\\nbreak.png' in out and 'caf\\udce9.png' in out
    assert {r['path'] for r in read_scores('zsad_out/scores.csv')} == {'comma, "quote".png', 'line\nbreak.png', latin}
    Path(latin).write_text('no picture')
    status, out, err = go('predict', latin, '--json', '--quiet', capsys=capsys)
    assert status == 1 and json.loads(out)['failures'][0]['path'] == latin and 'caf\\udce9.png' in err[0]


# the folder of results

def test_out_is_a_file(capsys):
    draw('a.png'); Path('taken').write_text('')
    status, out, err = go('predict', 'a.png', '--out', 'taken', capsys=capsys)
    assert status == 2 and out == '' and len(err) == 1 and 'taken' in err[0] and Path('taken').read_text() == ''

def test_unwritable_out(capsys, monkeypatch):
    draw('a.png'); os.mkdir('locked')
    os.chmod('locked', stat.S_IRUSR | stat.S_IXUSR)
    if os.access('locked', os.W_OK):  # root may write everywhere
        real = builtins.open
        def guarded(file, mode='r', *a, **k):
            if 'locked' in str(file) and set(mode) & set('wxa'): raise PermissionError(errno.EACCES, 'Permission denied', str(file))
            return real(file, mode, *a, **k)
        monkeypatch.setattr(builtins, 'open', guarded)
    status, out, err = go('predict', 'a.png', '--out', 'locked', '--quiet', capsys=capsys)
    assert status == 2 and len(err) == 1 and 'not allowed to write' in err[0] and written('locked') == []

class Full(io.FileIO):
    "A file on a disk that is full after `room` bytes"
    room = 0
    def write(self, data):
        n = super().write(bytes(data)[:max(0, Full.room)])
        Full.room -= len(data)
        if n < len(data): raise OSError(errno.ENOSPC, 'No space left on device')
        return n

@pytest.mark.parametrize('room', [40, 600, 30_000, 50_000, 70_000])
def test_full_disk(capsys, monkeypatch, room):
    "The disk fills up somewhere: what was finished is kept, nothing is half-written, one sentence says why"
    for i in range(6): draw(f'p/{i}.png')
    real, Full.room = builtins.open, room
    def small(file, mode='r', buffering=-1, *a, **k):
        if 'zsad_out' not in str(file) or not set(mode) & set('wxa'): return real(file, mode, buffering, *a, **k)
        return Full(file, mode) if buffering == 0 else io.BufferedWriter(Full(file, mode))
    with monkeypatch.context() as m:
        m.setattr(builtins, 'open', small)
        status, out, err = go('predict', 'p', '--quiet', capsys=capsys)
    assert status in (1, 2) and len(err) == 1 and 'the disk is full' in err[0]
    if room < 1000:
        assert status == 2 and written() == []
        return
    rows = read_scores('zsad_out/scores.csv')
    assert status == 1 and 0 < len(rows) < 6 and len(out.splitlines()) == len(rows) + 1
    for r in rows: Image.open(f"zsad_out/{r['overlay']}").load(); read_map(f"zsad_out/{r['map']}")
    for name in written():   # what belongs to the picture at which it broke is whole too
        if name.endswith('.png'): Image.open(f'zsad_out/{name}').load()
        assert not name.endswith('.part')
    assert go('predict', 'p', '--quiet', '--resume', capsys=capsys)[0] == 0 and len(whole()) == 6

def test_out_beside_the_pictures(capsys):
    "Results in the folder of the pictures are not scored the next time"
    draw('a.png')
    for _ in range(2): assert go('predict', '.', '--out', '.', '--quiet', capsys=capsys)[0] == 0
    assert [r['path'] for r in read_scores('scores.csv')] == ['a.png']
    status, _, err = go('predict', '.', '--out', 'other', capsys=capsys)
    assert status == 0 and err[0] == 'left out: results of an earlier run (1)'
    status, _, err = go('predict', 'a_overlay.png', capsys=capsys)
    assert status == 2 and 'nothing to score' in err[0]

def test_never_overwrites_a_picture(capsys):
    draw('a.png'); before = draw('a_overlay.png').read_bytes()
    status, _, err = go('predict', 'a.png', 'a_overlay.png', '--out', '.', capsys=capsys)
    assert status == 2 and 'would take its place' in err[0] and Path('a_overlay.png').read_bytes() == before

def test_masks_of_a_benchmark_are_left_out(capsys):
    draw('bottle/test/crack/000.png'); draw('bottle/ground_truth/crack/000_mask.png')
    status, _, err = go('predict', 'bottle', capsys=capsys)
    assert status == 0 and 'masks in ground_truth folders (1)' in err[0] and len(whole()) == 1

def test_second_run_replaces_the_first(capsys):
    draw('a.png'); Path('bad.png').write_text('x')
    assert go('predict', 'a.png', 'bad.png', '--quiet', capsys=capsys)[0] == 1 and 'failures.csv' in written()
    assert go('predict', 'a.png', '--quiet', capsys=capsys)[0] == 0 and 'failures.csv' not in written()
    whole()


# interruption and going on

def breaking(tiny, monkeypatch, after, error):
    "Let the stream end with `error` after so many answers"
    real = type(tiny).stream
    def stream(*a, **k):
        for i, p in enumerate(real(tiny, *a, **k)):
            if i == after: raise error
            yield p
    monkeypatch.setattr(tiny, 'stream', stream)

@pytest.mark.parametrize('span', ['method', 'auto'])
def test_ctrl_c_keeps_what_is_finished(capsys, tiny, monkeypatch, span):
    for i in range(5): draw(f'p/{i}.png')
    with monkeypatch.context() as m:
        breaking(tiny, m, 3, KeyboardInterrupt())
        status, out, err = go('predict', 'p', '--quiet', '--range', span, capsys=capsys)
    assert status == 130 and len(out.splitlines()) == 4 and len(err) == 1 and 'interrupted' in err[0]
    assert len(whole()) == 3

def test_resume(capsys, tiny, monkeypatch):
    for i in range(5): draw(f'p/{i}.png')
    with monkeypatch.context() as m:
        breaking(tiny, m, 3, KeyboardInterrupt())
        go('predict', 'p', '--quiet', capsys=capsys)
    done = {r['path']: r['seconds'] for r in whole()}
    asked = []
    monkeypatch.setattr(tiny, 'stream', lambda pictures, *a, **k: asked.extend(pictures) or type(tiny).stream(tiny, pictures, *a, **k))
    assert go('predict', 'p', '--quiet', '--resume', capsys=capsys)[0] == 0
    assert [p.name for p in asked] == ['3.png', '4.png'] and len(rows := whole()) == 5
    assert {r['path']: r['seconds'] for r in rows if r['path'] in done} == done
    asked.clear()
    status, out, _ = go('predict', 'p', '--quiet', '--resume', capsys=capsys)
    assert status == 0 and not asked and len(out.splitlines()) == 6

def test_resume_with_a_range_of_the_run(capsys, tiny, monkeypatch):
    "--range auto, broken off: the second half is painted in the range of the first; killed: nothing was painted, all is done again"
    for i in range(4): draw(f'p/{i}.png', np.full((48, 64, 3), 60*i, np.uint8))
    words = ['predict', 'p', '--quiet', '--range', 'auto', '--maps', 'none']
    with monkeypatch.context() as m:
        breaking(tiny, m, 2, KeyboardInterrupt())
        go(*words, capsys=capsys)
    span = json.loads(Path('zsad_out/run.json').read_text())['range']
    first = Path('zsad_out/0_overlay.png').read_bytes()
    assert span and go(*words, '--resume', capsys=capsys)[0] == 0 and len(whole()) == 4
    assert json.loads(Path('zsad_out/run.json').read_text())['range'] == span and Path('zsad_out/0_overlay.png').read_bytes() == first
    assert go('predict', 'p', '--quiet', '--resume', '--maps', 'none', capsys=capsys)[0] == 2  # another choice of colours
    with monkeypatch.context() as m:
        m.setattr(cli.Run, 'close', lambda self: None)  # as a killed process would
        breaking(tiny, m, 2, KeyboardInterrupt())
        go(*words, '--out', 'killed', capsys=capsys)
    assert (Path('killed')/'scores.csv.part').is_file() and go(*words, '--out', 'killed', '--resume', capsys=capsys)[0] == 0 and len(whole('killed')) == 4

def test_resume_of_a_killed_run(capsys):
    "kill -9 leaves scores.csv.part, its last line perhaps cut"
    for i in range(3): draw(f'p/{i}.png')
    go('predict', 'p', '--quiet', capsys=capsys)
    lines = Path('zsad_out/scores.csv').read_text().splitlines(keepends=True)
    Path('zsad_out/scores.csv').unlink(); Path('zsad_out/scores.csv.part').write_text(''.join(lines[:2]) + lines[2][:9])
    assert go('predict', 'p', '--quiet', '--resume', capsys=capsys)[0] == 0
    assert len(whole()) == 3 and Path('zsad_out/scores.csv').read_text().startswith(''.join(lines[:2]))

@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX systems')
@pytest.mark.parametrize('sign', [signal.SIGINT, getattr(signal, 'SIGKILL', 9)])
def test_a_real_process_stopped_in_the_middle(capsys, sign):
    "Ctrl-C and kill -9 as they happen: every finished row is there, everything is whole, and --resume does the rest"
    for i in range(60): draw(f'p/{i:03}.png')
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'zsad_nb.cli', 'predict', 'p', '--quiet', '--batch-size', '2'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part, last = Path('zsad_out/scores.csv.part'), time.monotonic() + 300
    while p.poll() is None and time.monotonic() < last and len(read_scores(part)) < 3: time.sleep(.02)
    p.send_signal(sign)
    out, err = p.communicate(timeout=60)
    if sign == signal.SIGINT:
        assert p.returncode == 130 and b'interrupted' in err and b'Traceback' not in err
        n = len(whole(broken_off=True))
    else: n = len(read_scores(part))
    assert 3 <= n < 60
    status, out, _ = go('predict', 'p', '--quiet', '--resume', '--json', capsys=capsys)
    assert status == 0 and len(json.loads(out)['pictures']) == 60 == len(read_scores('zsad_out/scores.csv'))

def test_resume_refuses_other_settings(capsys):
    draw('a.png')
    go('predict', 'a.png', '--quiet', capsys=capsys)
    before = Path('zsad_out/scores.csv').read_bytes()
    status, _, err = go('predict', 'a.png', '--resume', '--set', 'sigma=2', '--class-name', 'nut', capsys=capsys)
    assert status == 2 and 'config.sigma' in err[0] and 'class_name' in err[0] and Path('zsad_out/scores.csv').read_bytes() == before

def test_a_bug_keeps_what_is_finished(capsys, tiny, monkeypatch):
    for i in range(3): draw(f'p/{i}.png')
    breaking(tiny, monkeypatch, 2, RuntimeError('something\nodd'))
    status, _, err = go('predict', 'p', '--quiet', capsys=capsys)
    assert status == 1 and len(err) == 1 and 'RuntimeError: something odd' in err[0] and '--debug' in err[0] and len(whole()) == 2
    with pytest.raises(RuntimeError): main(['predict', 'p', '--quiet', '--debug'])

def test_out_of_memory(capsys, tiny, monkeypatch):
    draw('a.png')
    breaking(tiny, monkeypatch, 0, MemoryError())
    status, _, err = go('predict', 'a.png', '--quiet', capsys=capsys)
    assert status == 1 and '--batch-size' in err[0]

def test_score_that_is_no_number(capsys, tiny, monkeypatch):
    draw('a.png'); draw('b.png')
    def stream(*a, **k):
        for i, p in enumerate(type(tiny).stream(tiny, *a, **k)):
            if i == 0: p.score = float('nan')
            yield p
    monkeypatch.setattr(tiny, 'stream', stream)
    status, _, err = go('predict', 'a.png', 'b.png', '--quiet', capsys=capsys)
    assert status == 1 and 'not a number' in err[0] and [r['path'] for r in whole()] == ['b.png']


# words that are wrong

@pytest.mark.parametrize('words, says', [
    (['predcit', 'a.png'], "did you mean 'predict'"),
    (['predict'], 'PICTURES'),
    ([], 'COMMAND'),
    (['predict', 'a.png', '--method', 'anvol'], "did you mean 'anovl'"),
    (['predict', 'a.png', '--preset', 'relaesed'], "did you mean 'released'"),
    (['predict', 'a.png', '--backbone', 'ViT-L-14-366'], 'did you mean ViT-L-14-336'),
    (['predict', 'a.png', '--set', 'sgima=2'], "did you mean 'sigma'"),
    (['predict', 'a.png', '--set', 'attention=xy'], 'attention must be one of'),
    (['predict', 'a.png', '--device', 'teapot'], "'teapot' cannot be used"),
    (['predict', 'a.png', '--batch-size', '0'], 'number from 1'),
    (['predict', 'a.png', '--maps', 'tif'], 'png16'),
    (['predict', 'a.png', '--range', 'x'], 'LOW,HIGH|0.3,0.8'),
    (['predict', 'a.png', '--range', '0.8,0.3'], 'must be the smaller'),
    (['predict', 'a.png', '--weights', 'nowhere'], 'nowhere'),
    (['predict', 'a.png', '--backbone-weights', 'nowhere.pt'], 'nowhere.pt'),
    (['bench', 'memroy'], "did you mean 'memory'"),
    (['info', '--jsno'], '--jsno'),
])
def test_wrong_words(capsys, words, says):
    draw('a.png')
    status, out, err = go(*words, capsys=capsys)
    assert status == 2 and out == '' and len(err) == 1 and any(s in err[0] for s in says.split('|')), err
    assert not Path('zsad_out').exists()

def test_missing_weights_are_one_sentence(capsys, monkeypatch):
    draw('a.png')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    status, out, err = go('predict', 'a.png', '--backbone', 'ViT-B-16', capsys=capsys)
    assert status == 2 and out == '' and len(err) == 1 and 'tiny' in err[0] and not Path('zsad_out').exists()


# the other commands, and the process itself

def test_info(capsys):
    status, out, _ = go('info', '--json', capsys=capsys)
    d = json.loads(out)
    assert status == 0 and {'anovl'} <= {m['method'] for m in d['methods']} and all(m['meaning'] for m in d['methods'])
    assert {'backbone': 'tiny', 'provider': 'package', 'weights': 'part of zsad_nb'} in d['backbones']
    assert d['versions']['torch'] and d['device'] and d['places']['package']
    status, out, _ = go('info', capsys=capsys)
    assert status == 0 and 'released' in out and 'ViT-L-14-336' in out

def test_adapt_and_seed(capsys, place):
    for i in range(2): draw(f'{i}.png', np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    def run(out, *words):
        status, _, err = go('predict', '*.png', '--out', out, '--set', 'prompt_level=base', '--set', 'start=random', '--set', 'lr=.1', *words, capsys=capsys)
        assert status == 0, err
        return np.load(place/out/'0_map.npy'), [r['score'] for r in cli.read_scores(place/out/'scores.csv')], json.loads((place/out/'run.json').read_text())['config']
    plain, again, other, free = run('a', '--adapt', 5, '--seed', 0), run('b', '--adapt', 5, '--seed', 0, '--batch-size', 1), run('c', '--adapt', 5, '--seed', 1), run('d')
    assert (plain[2]['adapt'], plain[2]['seed'], free[2]['adapt']) == (5, 0, 0)
    np.testing.assert_allclose(plain[0], again[0], atol=1e-5)
    assert np.abs(plain[0] - other[0]).max() > 1e-5 and np.abs(plain[0] - free[0]).max() > 1e-5
    np.testing.assert_allclose(plain[1], free[1], atol=1e-6)   # the map never enters the image score

def test_adapt_a_method_that_cannot(capsys, monkeypatch):
    from zsad_nb.anovl import AnoVL
    from zsad_nb.detector import Config
    monkeypatch.setattr(AnoVL, 'presets', {'recommended': Config()}); monkeypatch.setattr(AnoVL, 'Config', Config)
    draw('a.png')
    for words, said in ((('--adapt', 5), 'does not adapt to pictures'), (('--seed', 1), 'a seed means nothing')):
        status, out, err = go('predict', 'a.png', *words, capsys=capsys)
        assert status == 2 and len(err) == 1 and said in err[0]
    status, out, err = go('predict', 'a.png', '--adapt', '-1', capsys=capsys)
    assert status == 2 and 'number from 0' in err[0]

def test_bench_gives_rows(capsys):
    status, out, _ = go('bench', 'forward', '--backbone', 'tiny', '--batches', 1, '--repeats', 1, '--json', capsys=capsys)
    d = json.loads(out)
    assert status == 0 and d['machine']['torch'] and [r['unit'] for r in d['rows']] == ['s']*5 + ['x']*4 and all(r['value'] > 0 for r in d['rows'])

def test_every_command_and_bench_is_there():
    from zsad_nb.bench import BENCHES
    for where in [w for _, *two in cli.COMMANDS.values() for w in two] + list(BENCHES.values()): assert callable(cli.find_function(where))

def test_help_and_version(capsys):
    for words in (['--help'], ['predict', '--help'], ['info', '--help'], ['bench', '--help'], ['--version']):
        status, out, err = go(*words, capsys=capsys)
        assert status == 0 and out and not err

def test_reader_that_hangs_up():
    "zsad --help | (close at once): no traceback"
    code = 'import sys; from zsad_nb.cli import main; sys.exit(main(["--help"]))'
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    err = p.stderr.read().decode(); p.wait()
    assert 'Traceback' not in err and 'BrokenPipe' not in err and p.returncode in (0, 141)  # argparse itself swallows it when output is unbuffered

def test_process_sets_the_exit_status():
    run = lambda *w: subprocess.run([sys.executable, '-m', 'zsad_nb.cli', *w], capture_output=True, text=True)
    assert run('--version').returncode == 0
    bad = run('nonsense')
    assert bad.returncode == 2 and bad.stderr.startswith('zsad: ') and len(bad.stderr.splitlines()) == 1
