"""Evaluation on real files with everything wrong that users have met; resume, sweeps, comparison, command line."""
import argparse, json, os, shutil, subprocess, sys, time
from dataclasses import dataclass, replace
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from zsad_nb.benchmark import (EvalResult, add_eval_arguments, compare, evaluate, head_hash, load_result, run_config, run_eval, sweep, trained_on)
from zsad_nb.benchmarks_data import BENCHMARKS
from zsad_nb.datasets import Folder, Synthetic, from_samples, load_dataset
from zsad_nb.detector import Config, Detector
from zsad_nb.metrics import image_metrics, pixel_metrics
from zsad_nb.papers import PROTOCOLS, papers_numbers
from zsad_nb.synthetic import render, samples
from zsad_nb.types import ConfigError, OutputError, Raw, differing, shared_dir


@dataclass(frozen=True)
class BrightConfig(Config):
    patch: int = 8         # side of a patch, pixels
    noise: float = 0.      # random numbers on the map
    poison: float = -1.    # mean brightness from which on the map is NaN; below 0: never


class Bright(Detector):
    "The distance of each patch from the picture's mean: fast, deterministic, and not bad on spots"
    method, Config, presets, default_preset = 'bright', BrightConfig, {'recommended': BrightConfig()}, 'recommended'

    def forward(self, images, class_names=None, extras=()):
        grey = images.mean(1, keepdim=True)
        maps = torch.nn.functional.avg_pool2d((grey - grey.mean((2, 3), keepdim=True)).abs(), self.cfg.patch)
        maps = maps + self.cfg.noise*torch.rand_like(maps)
        if self.cfg.poison >= 0: maps = torch.where(grey.mean((1, 2, 3), keepdim=True) >= self.cfg.poison, maps*float('nan'), maps)
        return Raw(maps, maps.amax((1, 2, 3)))


@pytest.fixture(scope='module')
def backbone():
    from zsad_nb.backbones import load_backbone
    return load_backbone('tiny', pretrained=False)

@pytest.fixture
def bright(backbone): return Bright(backbone=backbone)

@pytest.fixture(scope='module')
def target(): return Synthetic('target', per_category=6)


def quiet(detector, data, **kw): return evaluate(detector, data, progress=False, **kw)


def save(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)

def tree(root, categories=('tile', 'screw'), n=4, size=128):
    "Files in the form of MVTec AD"
    for c in categories:
        good, bad = render(c, n, 0, None, 0, size), render(c, n, 100, 'stain', 0, size)
        for i in range(n):
            save(root/c/'test'/'good'/f'{i:03}.png', good.images[i])
            save(root/c/'test'/'stain'/f'{i:03}.png', bad.images[i])
            save(root/c/'ground_truth'/'stain'/f'{i:03}_mask.png', bad.masks[i].astype(np.uint8)*255)
    return root

def read(root, **kw): return Folder(root, **kw).filter(split='test')


# ---- the numbers

def test_same_as_by_hand(bright, target):
    run = quiet(bright, target)
    for r in run.results:
        part = target.filter(category=r.category)
        answers = bright.predict([part[i] for i in range(len(part))], progress=False)
        true = image_metrics([a.score for a in answers], [x.label for x in part.rows]) | pixel_metrics([a.map for a in answers], [part.mask(i) for i in range(len(part))])
        for k, v in true.items(): assert abs(r.values[k] - v) < 1e-4, (r.category, k)
    for k, v in run.mean.items(): assert np.isclose(v, np.mean([r.values[k] for r in run.results]), atol=1e-12)


def test_exact_and_streaming_agree(bright, target):
    a, b = quiet(bright, target), quiet(bright, target, exact=True, legacy_pro=True)
    assert (a.mean - b.mean[a.mean.index]).abs().max() < 1e-4
    assert 'pixel_legacy_pro' in b.table and 'pixel_legacy_pro' not in a.table


def test_batch_size_does_not_matter(bright, target):
    a, b = quiet(bright, target, batch_size=1), quiet(bright, target, batch_size=5)
    assert (a.mean - b.mean).abs().max() < 1e-6


def test_resolution(bright, tmp_path):
    data = read(tree(tmp_path, ('tile',), size=200))
    at_model, at_picture = quiet(bright, data), quiet(bright, data, resolution='picture', exact=True)
    maps, masks = [a.map_at_size() for a in bright.predict(data.paths, progress=False)], [data.mask(i) for i in range(len(data))]
    assert np.isclose(at_picture.mean['pixel_auroc'], pixel_metrics(maps, masks)['pixel_auroc'])
    assert at_model.mean['pixel_auroc'] != at_picture.mean['pixel_auroc']


def test_vanishing_defect_is_said(bright, tmp_path):
    data = tree(tmp_path, ('tile',), size=400)
    dot = np.zeros((400, 400), np.uint8); dot[200, 201] = 255
    save(data/'tile'/'ground_truth'/'stain'/'000_mask.png', dot)
    run = quiet(bright, read(data))
    assert not run.left_out and 'vanishes at 128 x 128' in run.results[0].remarks[0].reason and 'vanishes' in repr(run)
    assert not quiet(bright, read(data), resolution='picture').results[0].remarks


# ---- bad input: one clear sentence, the rest is finished

def sentences(run): return {Path(f.path).parent.name + '/' + Path(f.path).name: f.reason for f in run.left_out}

def test_picture_does_not_open(bright, tmp_path):
    root = tree(tmp_path)
    (root/'tile'/'test'/'good'/'000.png').write_bytes(b'no picture')
    run = quiet(bright, read(root))
    assert list(sentences(run)) == ['good/000.png'] and run.results[-1].counts['normal'] + run.results[0].counts['normal'] == 7
    assert run.mean.notna().all()


def test_masks_of_another_size_missing_empty(bright, tmp_path):
    root = tree(tmp_path)
    gt = root/'tile'/'ground_truth'/'stain'
    save(gt/'000_mask.png', np.zeros((50, 128), np.uint8))
    (gt/'001_mask.png').unlink()
    save(gt/'002_mask.png', np.zeros((128, 128), np.uint8))
    run = quiet(bright, read(root))
    s = sentences(run)
    assert len(s) == 3 and all('it counts for the image metrics only' in x for x in s.values())
    assert any('128 x 50' in x for x in s.values()) and any('without a mask' in x for x in s.values()) and any('marks nothing' in x for x in s.values())
    tile = next(r for r in run.results if r.category == 'tile')
    assert tile.counts == dict(normal=4, defective=4, masked=5) and tile.values['image_auroc'] == tile.values['image_auroc']


def test_inverted_masks(bright, tmp_path):
    root = tree(tmp_path, ('tile',))
    clean = quiet(bright, read(root)).mean
    for p in (root/'tile'/'ground_truth').rglob('*.png'): save(p, 255 - np.asarray(Image.open(p)))
    run = quiet(bright, read(root))
    assert 'invert_masks=True' in run.results[0].values['pixel_pro'].reason and run.mean['image_auroc'] == clean['image_auroc']
    assert (quiet(bright, read(root, invert_masks=True)).mean - clean).abs().max() < 1e-9


@pytest.mark.parametrize('form', ['three channels', '16 bit', '16 bit small', 'ones'])
def test_forms_of_masks(bright, tmp_path, form):
    root = tree(tmp_path, ('tile',))
    clean = quiet(bright, read(root)).mean
    for p in (root/'tile'/'ground_truth').rglob('*.png'):
        m = np.asarray(Image.open(p)) > 0
        save(p, {'three channels': np.stack([m*255]*3, -1).astype(np.uint8), '16 bit': (m*65535).astype(np.uint16), '16 bit small': (m*255).astype(np.uint16), 'ones': m.astype(np.uint8)}[form])
    run = quiet(bright, read(root))
    assert not run.left_out and (run.mean - clean).abs().max() < 1e-9


def test_nan_and_infinite_maps(backbone, target):
    grey = [float(backbone.preprocess(Image.fromarray(r.held.picture)).mean()) for r in target.rows]
    limit = sorted(grey)[-3]
    if limit < 0: limit = max(grey)
    run = quiet(Bright(BrightConfig(poison=limit), backbone), target)
    assert len(run.left_out) == sum(g >= limit for g in grey) >= 1
    assert all('NaN' in f.reason or 'nan' in f.reason for f in run.left_out)
    assert sum(r.counts['normal'] + r.counts['defective'] for r in run.results) == len(target) - len(run.left_out)


class Careless(Bright):
    "A detector of somebody else, that hands out whatever it computed"
    def stream(self, pictures, *a, **kw):
        for i, p in enumerate(super().stream(pictures, *a, **kw)):
            yield replace(p, map=np.full_like(p.map, np.inf)) if i == 1 else replace(p, score=float('nan')) if i == 2 else p

def test_what_a_careless_detector_says_is_checked(backbone, target):
    one = target.filter(category=target.categories[0])
    run = quiet(Careless(backbone=backbone), one)
    assert [f.reason.split(';')[0] for f in run.left_out] == ['its map holds NaN or infinity', 'its score is nan']
    assert run.results[0].counts == dict(normal=1, defective=3, masked=4)


def test_one_class_only_and_empty_category(bright, tmp_path):
    root = tree(tmp_path, ('tile', 'screw', 'cork'))
    shutil.rmtree(root/'screw'/'test'/'good'); shutil.rmtree(root/'cork'/'test'/'stain')
    (root/'washer'/'test'/'good').mkdir(parents=True)
    run = quiet(bright, read(root))
    by = {r.category: r.values for r in run.results}
    assert 'washer' not in by and 'anomalous' in by['screw']['image_auroc'].reason and 'normal' in by['cork']['image_auroc'].reason
    assert by['screw']['pixel_auroc'] == by['screw']['pixel_auroc'], 'pixel metrics need no normal picture'
    assert np.isclose(run.mean['image_auroc'], by['tile']['image_auroc']) and 'image_auroc over 1 of 3' in run.table.loc['mean', 'missing']


def test_two_pictures_with_one_name(bright, tmp_path):
    root = tree(tmp_path, ('tile',))
    shutil.copy(root/'tile'/'test'/'stain'/'000.png', root/'tile'/'test'/'stain'/'000.bmp')
    data = read(root)
    run = quiet(bright, data)
    assert any('share the name of one mask' in str(n) for n in data.notes)
    assert len(run.left_out) == 2 and run.results[0].counts['defective'] == 5


def test_link_loops(bright, tmp_path):
    root = tree(tmp_path, ('tile',))
    clean = quiet(bright, read(root)).mean
    (root/'tile'/'loop').symlink_to(root); (root/'self').symlink_to(root/'self')
    assert (quiet(bright, read(root)).mean - clean).abs().max() == 0


def test_no_masks_at_all(bright, tmp_path):
    root = tree(tmp_path)
    for c in ('tile', 'screw'): shutil.rmtree(root/c/'ground_truth')
    run = quiet(bright, read(root))
    assert not run.left_out and run.results[0].values['pixel_pro'].reason == 'there are no masks' and run.mean[['image_auroc', 'image_ap']].notna().all()
    assert '–' in repr(run) and 'nan' not in run._repr_html_()


def test_unlabelled_pictures_are_listed(bright):
    s = samples('target', 4)[:4]
    run = quiet(bright, [*s, replace(s[0], label=None)])
    assert [f.reason for f in run.left_out] == ['neither called normal nor defective']


def test_everything_is_broken(bright, tmp_path):
    root = tree(tmp_path, ('tile',))
    for p in (root/'tile'/'test').rglob('*.png'): p.write_bytes(b'x')
    run = quiet(bright, read(root))
    assert len(run.left_out) == 8 and run.mean.isna().all() and 'no picture could be used' in repr(run)


# ---- protocol

def test_refuses_trained_categories(bright, target):
    bright.trained_on = {target.categories[0], 'gear'}
    with pytest.raises(ConfigError, match=f'trained on {target.categories[0]}:.*allow_trained'): quiet(bright, target)
    assert len(quiet(bright, target, categories=target.categories[1:]).results) == len(target.categories) - 1
    assert quiet(bright, target, allow_trained=True).config['measured']['allow_trained'] is True


def test_training_record_counts_too(bright, target):
    bright.training_record = dict(data='VisA', categories=['candle', target.categories[1]])
    assert trained_on(bright) == {'candle', target.categories[1]}
    with pytest.raises(ConfigError, match='would not be zero-shot'): quiet(bright, target)


def test_config_holds_what_decides(bright, target):
    config = run_config(bright, target, dict(seed=0))
    assert config['detector']['backbone']['fingerprint'] == bright.backbone.fingerprint() and config['data']['counts'][target.categories[0]] == [3, 3]
    assert set(config['versions']) == {'python', 'numpy', 'torch', 'zsad_nb'} and config['detector']['head'] == ''
    bright.head = torch.nn.Linear(2, 2)
    first = head_hash(bright)
    with torch.no_grad(): bright.head.weight[0, 0] += 1e-3
    assert first and head_hash(bright) != first
    assert set(differing(config, run_config(bright, target, dict(seed=1)))) == {'detector.head', 'measured.seed'}


def test_seed_is_set_and_given_back(backbone, target):
    noisy, one = Bright(BrightConfig(noise=1.), backbone), target.filter(category=target.categories[0])
    torch.manual_seed(5); before = torch.random.get_rng_state()
    a, b, c = quiet(noisy, one, seed=0), quiet(noisy, one, seed=0), quiet(noisy, one, seed=1)
    assert (a.mean - b.mean).abs().max() == 0 and (a.mean - c.mean).abs().max() > 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_limit_takes_both_labels(bright, target):
    run = quiet(bright, target, limit=2)
    assert all(r.counts['normal'] == r.counts['defective'] == 1 for r in run.results)


def test_refusals(bright, target):
    with pytest.raises(ConfigError, match='not one picture'): quiet(bright, [])
    with pytest.raises(ConfigError, match="'model' or 'picture'"): quiet(bright, target, resolution='full')
    with pytest.raises(ConfigError, match='has no category'): quiet(bright, target, categories=['tyre'])


# ---- resume

class Stops(Bright):
    "Interrupted after so many pictures"
    left = 0
    def forward(self, images, class_names=None, extras=()):
        Stops.left -= len(images)
        if Stops.left < 0: raise KeyboardInterrupt
        return super().forward(images, class_names, extras)

def test_resume(backbone, bright, target, tmp_path):
    whole = quiet(bright, target)
    Stops.left = 20
    with pytest.raises(KeyboardInterrupt): quiet(Stops(backbone=backbone), target, folder=tmp_path)
    finished = sorted((tmp_path/'categories').glob('*.json'))
    assert len(finished) == 3 and not list(tmp_path.rglob('*.part')) and not (tmp_path/'table.csv').exists()
    stamps = [p.stat().st_mtime_ns for p in finished]
    resumed = quiet(bright, target, folder=tmp_path)
    assert [p.stat().st_mtime_ns for p in finished] == stamps, 'finished categories are not measured again'
    assert (resumed.mean - whole.mean).abs().max() == 0 and (tmp_path/'table.csv').is_file()
    assert (load_result(tmp_path).mean - whole.mean).abs().max() < 1e-12


def test_resume_refuses_other_settings(backbone, bright, target, tmp_path):
    quiet(bright, target, folder=tmp_path)
    with pytest.raises(ConfigError, match='detector.config.patch was 8, now 16'): quiet(Bright(BrightConfig(patch=16), backbone), target, folder=tmp_path)
    with pytest.raises(ConfigError, match='measured.resolution'): quiet(bright, target, folder=tmp_path, resolution='picture')
    with pytest.raises(ConfigError, match='data.counts'): quiet(bright, target, folder=tmp_path, limit=2)
    quiet(bright, target, folder=tmp_path, batch_size=3)        # what does not change numbers may change


def test_half_written_category_is_measured_again(bright, target, tmp_path):
    quiet(bright, target, folder=tmp_path)
    victim = next((tmp_path/'categories').glob('*.json')); whole = victim.read_text()
    victim.write_text(whole[:40])
    quiet(bright, target, folder=tmp_path)
    assert json.loads(victim.read_text())['values'] == json.loads(whole)['values']


def test_versions_of_a_later_day_are_kept(bright, target, tmp_path):
    quiet(bright, target, folder=tmp_path)
    old = json.loads((tmp_path/'run.json').read_text())
    (tmp_path/'run.json').write_text(json.dumps(dict(old, versions=dict(old['versions'], torch='1.0'))))
    quiet(bright, target, folder=tmp_path); quiet(bright, target, folder=tmp_path)
    new = json.loads((tmp_path/'run.json').read_text())
    assert new['versions']['torch'] == '1.0' and new['resumed'] == [old['versions']]


def test_unwritable_folder(bright, target, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OutputError): quiet(bright, target, folder=tmp_path/'file'/'deeper')


def test_save_and_load(bright, target, tmp_path):
    run = quiet(bright, [*target, replace(target[0], category='odd/name', mask=None, label=1)])
    back = load_result(run.save(tmp_path/'a'))
    order = {r['category']: r for r in back.to_dict()['categories']}
    assert order == {r['category']: r for r in run.to_dict()['categories']} and back.config == run.config
    assert 'without a mask' in (tmp_path/'a'/'left_out.csv').read_text()
    with pytest.raises(ConfigError, match='no run.json'): load_result(tmp_path)


# ---- sweeps

def test_sweep(backbone, target):
    s = sweep(Bright, 'patch', [4, 16], target, backbone=backbone, options=dict(progress=False))
    assert [v for v, _, _ in s.runs] == [4, 16] and s.table.shape == (2, 7) and s.table.pixel_auroc.nunique() == 2
    assert s.plot().png() and 'patch' in s._repr_html_() and [r.config['detector']['config']['patch'] for _, _, r in s.runs] == [4, 16]


def test_sweep_seeds_and_make(backbone, tmp_path):
    made = []
    def make(cfg, backbone, seed): made.append((cfg.sigma, seed)); return Bright(cfg, backbone)
    data = lambda seed: Synthetic('target', 4, seed=seed, categories=['tile'])
    s = sweep(Bright, 'sigma', [0., 2.], data, backbone=backbone, seeds=2, make=make, options=dict(progress=False), folder=tmp_path)
    assert made == [(0., 0), (0., 1), (2., 0), (2., 1)] and '±' in s.percent().to_string()
    assert s.frame().query("sigma == '0.0'").pixel_auroc.nunique() == 2 and len(list(tmp_path.iterdir())) == 4
    again = sweep(Bright, 'sigma', [0., 2.], data, backbone=backbone, seeds=2, make=make, options=dict(progress=False), folder=tmp_path)
    assert again.frame().equals(s.frame())


def test_sweep_refusals(backbone, target):
    with pytest.raises(ConfigError, match="no setting 'anchors'; it has"): sweep(Bright, 'anchors', [1], target, backbone=backbone)
    with pytest.raises(ConfigError, match='at least one value'): sweep(Bright, 'patch', [], target, backbone=backbone)
    with pytest.raises(ConfigError, match='no method'): sweep('brigth', 'patch', [1], target, backbone=backbone)
    with pytest.raises(TypeError): sweep(Bright, 'patch', [8], target, backbone=backbone, options=dict(limt=2))


# ---- compare

def claim(run, **kw):
    "A run whose config says that it is a paper's"
    c = json.loads(json.dumps(run.config))
    c['detector'].update(method='anovl', preset='released', backbone=dict(name='ViT-B-16-plus-240'), image_size=[240, 240])
    c['data'].update(title='MVTec AD', all_categories=len(c['data']['counts']), published=True)
    for k, v in kw.items():
        part, name = k.split('__'); c[part][name] = v
    return EvalResult(run.results, c)

def test_difference_only_for_the_same_protocol(bright, target):
    run = quiet(bright, target)
    same = compare(claim(run))
    assert set(same.dataset) == {'MVTec AD'} and same.difference.notna().sum() == len(same) - 1
    row = same[(same.level == 'pixel') & (same.metric == 'AUROC')].iloc[0]
    assert row.paper == 86.6 and row.difference == round(100*run.mean['pixel_auroc'] - 86.6, 1)
    assert same[same.metric == 'PRO'].not_the_same.item() == 'exact PRO, not the 200-step form'
    with_legacy = compare(claim(quiet(bright, target, legacy_pro=True)))
    assert with_legacy.difference.notna().all()


@pytest.mark.parametrize('change,words', [
    (dict(detector__backbone=dict(name='tiny')), 'backbone tiny'), (dict(detector__preset='recommended'), 'preset recommended'), (dict(detector__preset=None), 'preset of its own'),
    (dict(detector__image_size=[336, 336]), 'input 336 x 336'), (dict(detector__auxiliary='VisA'), 'head trained on VisA'), (dict(measured__resolution='picture'), 'size of the pictures'),
    (dict(measured__limit=5), 'at most 5 pictures'), (dict(data__all_categories=15), 'of 15 categories'), (dict(data__published=False), 'not the published split'), (dict(measured__class_names=False), 'class names')])
def test_says_what_is_not_the_same(bright, target, change, words):
    c = compare(claim(quiet(bright, target, categories=target.categories[:2]), **change))
    assert c.difference.isna().all() and c.not_the_same.str.contains(words).all()


def test_other_data_and_left_out(bright, target):
    run = quiet(bright, target)
    c = compare(claim(run, data__title='somewhere'))
    assert set(c.dataset) == {'MVTec AD', 'VisA'} and c.difference.isna().all() and 'does not report' in c.attrs['says']
    s = list(target); s[0] = replace(s[0], picture='gone.png')
    assert compare(claim(quiet(bright, s))).not_the_same.str.contains('1 pictures left out').all()
    with pytest.raises(ConfigError, match='no paper here'): compare(run)


def test_dinov2_rows_for_a_dinov2_run(bright, target):
    c = claim(quiet(bright, target), detector__method='visualad', detector__backbone=dict(name='dinov2-large'), detector__image_size=[518, 518], detector__auxiliary='VisA')
    out = compare(c)
    assert out[(out.level == 'image') & (out.metric == 'AUROC')].paper.item() == 90.1 and out.difference.notna().sum() == len(out) - 1


def test_every_paper_set_has_a_reader():
    titles = {d.title for d in BENCHMARKS.values()}
    used = set(papers_numbers().dataset) - {'(average)'}
    assert used <= titles, used - titles
    assert {p.auxiliary for p in PROTOCOLS.values()} - {''} <= titles


# ---- the command

def words(text):
    p = argparse.ArgumentParser()
    add_eval_arguments(p)
    return p.parse_args(text.split())

def test_command_table_and_files(capsys, tmp_path):
    assert run_eval(words(f'--data synthetic --categories tile,screw --limit 4 --quiet --out {tmp_path}/r.csv')) == 0
    assert 'tile' in capsys.readouterr().out and (tmp_path/'r.csv').read_text().startswith('category,normal')
    saved = json.loads((tmp_path/'r.json').read_text())
    assert saved['config']['detector']['backbone']['fingerprint'] and len(saved['categories']) == 2


def test_command_json_folder_and_resume(capsys, tmp_path):
    args = words(f'--data synthetic --categories tile --limit 4 --quiet --json --out {tmp_path}/run')
    assert run_eval(args) == 0
    first = json.loads(capsys.readouterr().out)
    assert run_eval(args) == 0 and json.loads(capsys.readouterr().out) == first
    with pytest.raises(ConfigError, match='other settings'): run_eval(words(f'--data synthetic --categories tile --limit 6 --quiet --out {tmp_path}/run'))


def test_command_sweep(capsys, tmp_path):
    assert run_eval(words(f'--data synthetic --categories tile --limit 4 --sweep sigma=0,2 --seeds 2 --quiet --out {tmp_path}/s')) == 0
    assert '±' in capsys.readouterr().out and (tmp_path/'s'/'sweep.csv').is_file() and (tmp_path/'s'/'sweep.png').is_file()


def test_command_status_and_remarks(capsys, tmp_path):
    root = tree(tmp_path/'t', ('tile',))
    (root/'tile'/'test'/'good'/'001.png').write_bytes(b'')
    assert run_eval(words(f'--data folder --root {root}')) == 1
    out = capsys.readouterr()
    assert 'left out' in out.out and 'AnoVL does not report' in out.err


@pytest.mark.parametrize('text,match', [('--data nowhere', 'no data set'), ('--data mvtec', 'say where it lies'), ('--data synthetic --categories tyre', 'no category'), ('--data synthetic --method anvol', 'no method'),
    ('--data synthetic --preset fast', 'no preset'), ('--data synthetic --sweep anchors=1', 'no setting'), ('--data synthetic --sweep sigma', 'FIELD=VALUE'), ('--data synthetic --seeds 0', 'at least 1'),
    ('--data synthetic --device warp', 'cannot be used here')])
def test_command_refusals(text, match):
    with pytest.raises(ConfigError, match=match): run_eval(words(text))


def test_import_is_light():
    "`zsad eval --help` must not wait for torch or pandas"
    code = 'import sys, zsad_nb.benchmark; print([m for m in ("torch", "pandas", "matplotlib", "scipy", "sklearn") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# ---- memory and real pictures

def test_memory_does_not_grow_with_pictures(bright):
    "Maps are streamed: what a category keeps of 200 pictures is little more than of 20"
    from zsad_nb.benchmark import Meter
    meter, sizes = Meter(), []
    rng, mask = np.random.default_rng(0), np.zeros((128, 128), bool); mask[40:60, 40:90] = True
    for i in range(200):
        meter.add_score(float(i % 2), i % 2); meter.add_map(rng.random((128, 128), dtype=np.float32), mask if i % 2 else mask & False)
        if i + 1 in (100, 200): meter.pixels.normal.flush(); meter.pixels.defect.flush(); sizes.append(meter.pixels.nbytes + sum(m.nbytes for m in meter.outlines) + len(meter.maps))
    assert sizes[1] < 1.3*sizes[0] + 50_000


@pytest.mark.parametrize('name,total', [('magnetic_tile', (381, 388)), ('crackforest', (8, 118))])
def test_real_pictures_as_they_lie(bright, name, total):
    if shared_dir() is None: pytest.skip('no ../shared beside the repository')
    data = load_dataset('folder', shared_dir()/'data'/name)
    assert data.total() == total
    run = quiet(bright, data, limit=24)
    assert not run.left_out and run.mean.notna().all() and len(run.results) == 1


class Listens(Bright):
    "Remembers what it was told it sees"
    def forward(self, images, class_names=None, extras=()):
        self.heard = getattr(self, 'heard', set()) | set(class_names)
        return super().forward(images, class_names, extras)

def test_benchmark_nouns_and_published_counts(backbone, tmp_path):
    from zsad_nb.datasets import CountWarning
    tree(tmp_path/'mvtec', ('tile',))
    shutil.copytree(tmp_path/'mvtec'/'tile', tmp_path/'mvtec'/'metal_nut')
    with pytest.warns(CountWarning): data = load_dataset('mvtec', tmp_path/'mvtec')
    told, untold = Listens(backbone=backbone), Listens(backbone=backbone)
    run = quiet(told, data)
    quiet(untold, data, class_names=False)
    assert told.heard == {'metal nut', 'tile'} and untold.heard == {None}
    assert run.config['data']['published'] is False and run.config['data']['all_categories'] == 15 and run.config['data']['title'] == 'MVTec AD'
    assert compare(claim(run, data__published=False, data__all_categories=15)).not_the_same.str.contains('2 of 15 categories; not the published split').all()
