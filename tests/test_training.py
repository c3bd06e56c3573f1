"""Training that can be killed, refused, interrupted and starved of disk: whatever happens, the numbers are those of an undisturbed run, or one sentence says why there are none."""
import errno, itertools, json, math, os, pickle, random, resource, signal, subprocess, sys, time, warnings
from dataclasses import dataclass, replace
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from zsad_nb import pictures, training
from zsad_nb.anovl import AnoVL
from zsad_nb.backbones import load_backbone
from zsad_nb.benchmark import evaluate, sweep, trained_on
from zsad_nb.cli import main
from zsad_nb.datasets import Folder, Synthetic, from_samples
from zsad_nb.detector import METHODS, Config, Detector
from zsad_nb.losses import dice, focal, image_bce
from zsad_nb.scoring import contrast, cosine, fuse, pool_top, to_grid, upsample
from zsad_nb.synthetic import samples
from zsad_nb.training import RECIPES, Pictures, TrainConfig, clip_alone, fit, make_optimiser, order, rate, record_measured, seeded
from zsad_nb.types import ConfigError, OutputError, Raw, Sample, ZsadError


@dataclass(frozen=True)
class TwoConfig(Config):
    image_size: int = 32       # pixels; small, so that a step takes milliseconds
    layers: tuple = (6, 12)    # blocks whose patches are compared
    fuse: str = 'sum'          # VisualAD eq. 8
    drop: float = .2           # dropout on the patches, so that seeds matter
    pause: float = 0.          # seconds per step, for tests that kill

class TwoVectors(Detector):
    "Two learned vectors in the place of text: the exploratory variant of VisualAD's Fig. 1"
    method, Config, presets, default_preset = 'two', TwoConfig, {'released': TwoConfig(), 'paper': TwoConfig(drop=0.)}, 'released'
    def __init__(self, cfg=None, backbone='tiny'):
        super().__init__(cfg, backbone)
        self.normal, self.anomaly = (nn.Parameter(.02*torch.randn(self.backbone.trunk.width)) for _ in range(2))
        self.before = lambda batch: None   # tests hang something in here
    def forward(self, images, class_names=None, extras=()):
        tokens = self.backbone.trunk(images, self.cfg.layers).normed()
        maps = [to_grid(contrast(cosine(F.dropout(p, self.cfg.drop, self.training), torch.stack([self.normal, self.anomaly]))), tokens.grid) for p in tokens.patches.values()]
        return Raw(torch.stack(maps, 1), pool_top(fuse(torch.stack(maps, 1), self.cfg.fuse), 2))
    def losses(self, batch):
        self.before(batch); time.sleep(self.cfg.pause)
        raw, has = self(batch['images']), batch['has_mask']
        terms = dict(image=image_bce(raw.image_logit, batch['labels']))
        if has.any():
            prob = upsample(raw.layer_maps[has], batch['masks'].shape[-2:]).sigmoid()
            terms |= {n: sum(f(p, batch['masks'][has]) for p in prob.unbind(1)) for n, f in (('focal', focal), ('dice', dice))}
        return terms
    def parameter_groups(self): return [dict(params=[self.anomaly], name='anomaly', lr=1e-2, clip=1.), dict(params=[self.normal], name='normal', lr=1e-4, weight_decay=0.)]


QUICK = TrainConfig(epochs=2, save_every=2, seed=5)          # 27 pictures: 4 steps an epoch, the last of 3 pictures

@pytest.fixture(scope='module')
def backbone(): return load_backbone('tiny')

@pytest.fixture(scope='module')
def data():
    got = samples('auxiliary', 4)[:27]
    return from_samples(got, 'a small set')

@pytest.fixture
def make(backbone): return lambda seed=0, **cfg: TwoVectors(replace(TwoConfig(), **cfg), backbone).fresh(seed)

@pytest.fixture(scope='module')
def reference(backbone, data):
    two = TwoVectors(backbone=backbone).fresh(0)
    return two, quiet(two, data, QUICK)

def quiet(detector, data, cfg=QUICK, *rest, **kw): return fit(detector, data, cfg, *rest, progress=False, **kw)
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
def values(h): return [{k: v for k, v in r.items() if k != 'seconds'} for r in h.rows]


# ---- the recipe

def test_presets_and_recipes():
    r, p = RECIPES['released'], RECIPES['paper']
    assert (r.epochs, r.batch_size, r.optimiser, r.betas, r.weight_decay, r.schedule, r.floor, r.seed, r.shuffle, r.keep_last) == (2, 8, 'adamw', (.9, .999), .01, 'epoch', 1e-4, 111, True, True)
    assert r.differs(p) == {'optimiser': ('adamw', 'adam')} and all(r.meanings().values())
    assert TrainConfig.from_dict(json.loads(json.dumps(r.to_dict()))) == r

@pytest.mark.parametrize('change, words', [
    (dict(epochs=0), 'epochs must be a whole number of at least 1'), (dict(batch_size=2.5), 'batch_size must be a whole number'), (dict(seed=-1), 'seed must be'), (dict(lr=0), 'lr must be a number above 0'),
    (dict(lr=math.nan), 'lr must be'), (dict(weight_decay=-1.), 'weight_decay must be a number of at least 0'), (dict(optimiser='sgd'), 'choose adamw, adam'), (dict(precision='fp16'), 'choose float32, bf16'),
    (dict(schedule='cosine'), 'choose epoch, step, constant'), (dict(betas=(.9, 1.)), 'betas must be'), (dict(epochs=True), 'epochs must be')])
def test_impossible_recipes(make, data, change, words):
    with pytest.raises(ConfigError, match=words): quiet(make(), data, replace(QUICK, **change))

def test_rates():
    for base in (1e-2, 1e-4):
        p = nn.Parameter(torch.zeros(1)); o = torch.optim.SGD([p], lr=base); s = torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5, eta_min=1e-4)
        for epoch in range(5):
            for k in range(3): assert rate(base, TrainConfig(epochs=5), 3*epoch + k, 3) == pytest.approx(o.param_groups[0]['lr'], rel=1e-9)
            o.step(); s.step()
    steps = [rate(1e-2, TrainConfig(schedule='step'), k, 5) for k in range(10)]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 10 and steps[0] == 1e-2
    assert {rate(1e-2, TrainConfig(schedule='constant'), k, 5) for k in range(10)} == {1e-2} and rate(1e-5, TrainConfig(), 9, 5) == 1e-5

def test_optimiser_groups(make):
    two = make()
    groups = lambda **kw: [(type(o).__name__, g['name'], g['lr'], g['weight_decay']) for o in [make_optimiser(two, TrainConfig(**kw))] for g in o.param_groups]
    assert groups() == [('AdamW', 'anomaly', 1e-2, .01), ('AdamW', 'normal', 1e-4, 0.)]
    assert groups(optimiser='adam') == [('Adam', 'anomaly', 1e-2, 0.), ('Adam', 'normal', 1e-4, 0.)]
    assert [g[2] for g in groups(lr=1e-3)] == pytest.approx([1e-3, 1e-5])
    a, b = (nn.Parameter(torch.zeros(9)) for _ in range(2)); a.grad, b.grad = torch.full((9,), 10.), torch.full((9,), .1)
    clip_alone(torch.optim.Adam([dict(params=[a, b], clip=1.)]))
    assert a.grad.norm() == pytest.approx(1., rel=1e-4) and b.grad.norm() == pytest.approx(.3, rel=1e-4)

def test_what_cannot_learn(backbone, data, make):
    with pytest.raises(ConfigError, match='AnoVL is training-free: there is nothing to fit'): quiet(AnoVL(backbone=backbone), data)
    two = make(); two.losses = lambda batch: dict(a=torch.zeros(()))
    with pytest.raises(ConfigError, match='depend on none of its parameters'): quiet(two, data)


# ---- the loop

def test_same_as_by_hand(make, data, reference):
    two, cfg = make(), QUICK
    opt = torch.optim.AdamW([dict(params=[two.anomaly], lr=1e-2), dict(params=[two.normal], lr=1e-4, weight_decay=0.)], betas=(.9, .999), weight_decay=.01)
    two.train(); step = 0; pics = Pictures(two, data)
    for epoch in range(2):
        opt.param_groups[0]['lr'] = rate(1e-2, cfg, step, 4)
        todo = order(27, cfg, epoch)
        for k in range(0, 27, 8):
            batch = training.collate(pics, todo[k:k + 8], [pics(i) for i in todo[k:k + 8]])
            with seeded(cfg.seed, step, two.device): loss = sum(two.losses(batch).values())
            opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_([two.anomaly], 1.); opt.step(); step += 1
    assert same(two, reference[0])

def test_history(reference, data):
    two, h = reference
    assert h.finished and h.steps == len(h.rows) == 8 and h.terms == ['image', 'focal', 'dice', 'total'] and [r['epoch'] for r in h.rows] == [1]*4 + [2]*4
    f = h.frame(); assert list(f.columns) == ['step', 'epoch', 'image', 'focal', 'dice', 'total', 'lr', 'seconds']
    np.testing.assert_allclose(f.image + f.focal + f.dice, f.total, rtol=1e-5); assert f.lr.tolist()[3:5] == [1e-2, rate(1e-2, QUICK, 4, 4)]
    assert h.plot().png()[:4] == b'\x89PNG' and '8 of 8 steps' in repr(h)

def test_it_learns(make, data):
    h = quiet(make(drop=0.), data, replace(QUICK, epochs=10, schedule='constant', lr=.05))
    first, last = training.History(h.rows[:4]).last(), h.last(8)
    assert last['focal'] < .8*first['focal'] and last['total'] < first['total']

def test_plumbing_moves_nothing(make, data, reference, tmp_path):
    for cfg in (replace(QUICK, cache_mb=0, ahead=1), replace(QUICK, save_every=0, ahead=50), replace(QUICK, checkpointing=True)):
        two = make(); torch.manual_seed(0); was = torch.random.get_rng_state()
        quiet(two, data, cfg, tmp_path/str(hash(cfg)))
        assert same(two, reference[0]) and torch.equal(torch.random.get_rng_state(), was)
    assert not same(quiet_head(make(), data, replace(QUICK, seed=6)), reference[0])

def quiet_head(two, *rest): quiet(two, *rest); return two

def test_cache_decodes_once(make, data):
    for mb, times in ((1024, 1), (0, 2)):
        two = make(); n = itertools.count(); real = two.prepare
        two.prepare = lambda p: (next(n), real(p))[1]
        quiet(two, data, replace(QUICK, cache_mb=mb)); assert next(n) == 27*times

def test_last_batch(make, data):
    assert len(quiet(make(), data, replace(QUICK, epochs=1)).rows) == 4 and len(quiet(make(), data, replace(QUICK, epochs=1, keep_last=False)).rows) == 3
    with pytest.raises(ConfigError, match='27 pictures do not fill one batch of 64'): quiet(make(), data, replace(QUICK, batch_size=64, keep_last=False))
    seen = []; two = make(); two.before = lambda b: seen.extend(b['where']); quiet(two, data, replace(QUICK, epochs=1, shuffle=False))
    assert len(seen) == len(set(seen)) == 27 and seen[0].endswith('picture 0')

def test_modes_are_restored_and_the_backbone_is_untouched(make, data, backbone):
    print_ = backbone.fingerprint(); two = make().eval(); seen = []
    two.before = lambda batch: seen.append((two.checkpointing, two.training))
    quiet(two, data, replace(QUICK, epochs=1, checkpointing=True), validate=lambda d: d.eval() and {})
    assert set(seen) == {(True, True)} and (two.checkpointing, two.training) == (False, False) and backbone.fingerprint() == print_
    two.before = lambda batch: 1/0
    with pytest.raises(ZeroDivisionError): quiet(two, data, replace(QUICK, checkpointing=True))
    assert (two.checkpointing, two.training) == (False, False)

def test_bf16(make, data, reference):
    two = quiet_head(make(), data, replace(QUICK, precision='bf16'))
    assert two.anomaly.dtype == torch.float32 and not same(two, reference[0]) and (two.anomaly - reference[0].anomaly).norm() < .3*reference[0].anomaly.norm()


# ---- broken off, and gone on with

@pytest.mark.parametrize('at', [0, 1, 3, 4, 7])
def test_interrupted_anywhere(make, data, reference, tmp_path, capsys, at):
    two = make(); n = itertools.count()
    def stop(batch):
        if next(n) == at: raise KeyboardInterrupt
    two.before = stop
    h = quiet(two, data, QUICK, tmp_path)
    assert not h.finished and len(h.rows) == at and f'interrupted after step {at} of 8: start it again with the folder {tmp_path} to go on from step {at}' in capsys.readouterr().err
    assert two.training_record['steps'] == at and not (tmp_path/'config.json').exists()
    other = make(1); h = quiet(other, data, QUICK, tmp_path)                       # other starting weights: the checkpoint decides
    assert same(other, reference[0]) and values(h) == values(reference[1]) and h.finished

@pytest.mark.parametrize('place', ['between two parameters', 'while saving', 'while validating'])
def test_interrupted_at_the_worst_moment(make, data, reference, tmp_path, monkeypatch, place):
    two = make(); n = itertools.count()
    def stop(*a, **kw):
        if next(n) == 3: raise KeyboardInterrupt
    if place == 'between two parameters':
        real = torch.optim.AdamW.step
        def step(self, *a, **kw):
            if next(n) == 3: self.param_groups[0]['params'][0].data.add_(1.); raise KeyboardInterrupt    # half of the move is done
            return real(self, *a, **kw)
        monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    elif place == 'while saving':
        write = training.write_atomic
        monkeypatch.setattr(training, 'write_atomic', lambda *a: (stop(), write(*a))[1])
    checked = []
    def validate(d):
        checked.append(1)
        if place == 'while validating' and len(checked) == 1: raise KeyboardInterrupt
        return dict(x=1.)
    assert not quiet(two, data, QUICK, tmp_path, validate).finished
    monkeypatch.undo(); checked.append(1)
    other = make(1); h = quiet(other, data, QUICK, tmp_path, validate)
    assert same(other, reference[0]) and values(h) == values(reference[1]) and [c['step'] for c in h.checks] == [4, 8]

def test_without_a_folder_nothing_is_kept(make, data, capsys):
    two = make()
    def stop(batch): raise KeyboardInterrupt
    two.before = stop
    assert not quiet(two, data).finished and 'nothing is kept, because no folder was given' in capsys.readouterr().err

CHILD = '''
import sys; sys.path.insert(0, {tests!r})
from test_training import *
fit(TwoVectors(replace(TwoConfig(), pause=.05), load_backbone('tiny')).fresh(0), from_samples(samples('auxiliary', 4)[:27], 'a small set'), QUICK, {folder!r}, progress=False)
'''

def test_killed_at_random_moments(make, data, tmp_path):
    folder, code = tmp_path/'run', CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path/'run'))
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(training.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    killed, moments = 0, []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, '-c', code], env=env, stderr=subprocess.PIPE)
        stamp = (folder/'checkpoint.pt').stat().st_mtime_ns if folder.exists() else 0
        until = time.time() + 60
        while child.poll() is None and time.time() < until and not ((folder/'checkpoint.pt').exists() and (folder/'checkpoint.pt').stat().st_mtime_ns != stamp): time.sleep(.02)
        moments.append(random.uniform(0, .3)); time.sleep(moments[-1])
        child.send_signal(signal.SIGKILL); killed += child.wait() == -signal.SIGKILL
        assert (folder/'checkpoint.pt').exists(), child.stderr.read().decode()[-2000:]
    assert killed, 'the children were quicker than the kill'
    (folder/'.zsad-0123456789ab.part').write_bytes(b'half a checkpoint')
    at, plain = training.read_checkpoint(folder/'checkpoint.pt')['step'], make()
    two = make(1, pause=.05); h = quiet(two, data, QUICK, folder)
    quiet(plain, data)
    assert same(two, plain) and h.finished and [r['step'] for r in h.rows] == list(range(1, 9)), (moments, at)
    assert not list(folder.glob('.zsad*')) and all(p.grad is None for p in two.parameters())

def test_finished_folders_return_at_once(make, data, reference, tmp_path):
    two = make(); quiet(two, data, QUICK, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'checkpoint.pt', 'history.csv', 'config.json', 'model.safetensors', 'README.md'}
    record_measured(two, evaluate(two, Synthetic('target', 2), progress=False)); two.save_pretrained(tmp_path)
    again = make(9); again.before = lambda batch: 1/0
    h = quiet(again, data, QUICK, tmp_path)
    assert same(again, reference[0]) and h.finished and values(h) == values(reference[1]) and again.training_record == two.training_record and 'measured' in again.training_record
    assert training.read_checkpoint(tmp_path/'checkpoint.pt')['optimiser'] is None
    assert same(TwoVectors.from_pretrained(tmp_path, again.backbone), two)

def test_another_run_is_refused(make, data, tmp_path, backbone):
    quiet(make(), data, QUICK, tmp_path)
    def refused(detector, data, cfg, *words):
        with pytest.raises(ConfigError, match='holds a training with other settings') as e: quiet(detector, data, cfg, tmp_path)
        for w in words: assert w in str(e.value), (w, str(e.value))
    refused(make(), data, replace(QUICK, epochs=3, lr=.1, precision='bf16'), 'recipe.epochs was 2, now 3', 'recipe.lr was None, now 0.1', "recipe.precision was 'float32', now 'bf16'")
    refused(make(drop=.5), data, QUICK, 'detector.config.drop was 0.2, now 0.5')
    refused(make(), data[:20], QUICK, 'data.pictures was')
    refused(make(), from_samples(samples('auxiliary', 4, seed=1)[:27], 'a small set'), QUICK, 'data.pictures was')   # same names, other pixels
    refused(TwoVectors(backbone=load_backbone('tiny', pretrained=False)), data, QUICK, 'detector.backbone.fingerprint was')
    quiet(make(), data, replace(QUICK, save_every=9, ahead=3, cache_mb=5, checkpointing=True), tmp_path)              # this is not another run

def test_damaged_checkpoints(make, data, tmp_path):
    quiet(make(), data, QUICK, tmp_path)
    file = tmp_path/'checkpoint.pt'; whole = file.read_bytes()
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    for bad in (whole[:len(whole)//2], b'', pickle.dumps(Evil())):
        file.write_bytes(bad)
        with pytest.raises(ConfigError, match='no checkpoint of this library, or damaged .*delete it to begin anew'): quiet(make(), data, QUICK, tmp_path)
    torch.save(dict(x=Evil()), file)
    with pytest.raises(ConfigError, match='damaged'): quiet(make(), data, QUICK, tmp_path)
    assert not (tmp_path/'ran').exists()


# ---- the disk

def test_disk_full_at_a_checkpoint(make, data, reference, tmp_path, monkeypatch):
    write, n = training.write_atomic, itertools.count()
    def full(path, content):
        if next(n) == 4: raise pictures.unwritable(path, OSError(errno.ENOSPC, 'No space left on device'))    # checkpoint and csv at steps 0 and 2, then at 4
        return write(path, content)
    monkeypatch.setattr(training, 'write_atomic', full)
    with pytest.raises(OutputError, match=r'the disk is full; free some space or choose another folder; training stopped after step 4 of 8, the checkpoint of step 2 is whole, and training goes on from there when it is started again with this folder'):
        quiet(make(), data, QUICK, tmp_path)
    monkeypatch.undo()
    assert training.read_checkpoint(tmp_path/'checkpoint.pt')['step'] == 2 and not list(tmp_path.glob('.zsad*'))
    two = make(1); quiet(two, data, QUICK, tmp_path); assert same(two, reference[0])

def test_a_real_limit_on_the_size_of_files(make, data, reference, tmp_path):
    two, n, limits = make(), itertools.count(), resource.getrlimit(resource.RLIMIT_FSIZE)
    def shrink(batch):
        if next(n) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    two.before = shrink
    try:
        with pytest.raises(OutputError, match='cannot be written.*the checkpoint of step 2 is whole'): quiet(two, data, QUICK, tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    other = make(1); quiet(other, data, QUICK, tmp_path); assert same(other, reference[0])

def test_folder_that_cannot_be(make, data, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OutputError, match='a file stands where a folder should be.*training stopped after step 0 of 8, nothing was saved before'): quiet(make(), data, QUICK, tmp_path/'file'/'run')


# ---- numbers that are none

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_loss_that_is_not_finite(make, data, tmp_path, value):
    two = make(); n = itertools.count()
    def poison(batch):
        if next(n) == 5: batch['images'][2] = value
    two.before = poison
    with pytest.raises(ZsadError, match=r'the loss of step 6 is not finite \(image .*, total .*\) on the pictures rubber_mat \(in memory\), picture 12') as e: quiet(two, data, QUICK, tmp_path)
    assert str(e.value).count('(in memory)') == 8 and all(p.isfinite().all() for p in two.parameters())
    was = training.read_checkpoint(tmp_path/'checkpoint.pt'); assert was['step'] == 4 and all(v.isfinite().all() for v in was['head'].values())

def test_gradient_that_is_not_finite(make, data):
    two = make(); real = two.losses
    two.losses = lambda batch: real(batch) | dict(edge=(two.anomaly[0]*0).abs().sqrt())       # 0, with a slope of 0/0
    with pytest.raises(ZsadError, match='the gradient of anomaly of step 1 is not finite'): quiet(two, data)
    assert two.anomaly.isfinite().all()


# ---- the data

def strip(data, keep): return from_samples([replace(s, mask=s.mask if keep(i, s) else None) for i, s in enumerate(data)], 'stripped')

def test_no_defects(make, data):
    with pytest.raises(ConfigError, match='a small set: none of its 14 pictures is called defective, .*train on the test split of an auxiliary set'): quiet(make(), data.filter(label=0))

def test_no_masks(make, data):
    two = make()
    with pytest.warns(UserWarning, match='stripped: there are no masks: only the image loss is trained'): h = quiet(two, strip(data, lambda i, s: False))
    assert h.terms == ['image', 'total'] and 'no masks' in two.training_record['remarks'][0] and two.training_record['pictures']['defective_with_mask'] == 0

def test_some_masks(make, data):
    two, seen = make(), []
    two.before = lambda b: seen.append((b['labels'].tolist(), b['has_mask'].tolist(), b['masks'].flatten(1).any(1).tolist()))
    part = strip(data, lambda i, s: i % 2)
    with pytest.warns(UserWarning, match=r'of 13 defective pictures have no mask: they count for the image loss only'): h = quiet(two, part)
    bad = sum(s.label == 1 and s.mask is not None for s in part)
    assert two.training_record['pictures']['defective_with_mask'] == bad
    for labels, has, marks in seen: assert all((not m or h) and (h or not m) for l, h, m in zip(labels, has, marks))
    assert sum(l and h for labels, has, _ in seen for l, h in zip(labels, has)) == 2*bad

def test_no_normal_pictures_and_unlabelled_ones(make, data):
    with pytest.warns(UserWarning, match='not one normal picture'): quiet(make(), data.filter(label=1), replace(QUICK, epochs=1))
    more = from_samples([*data, *(replace(s, label=None, mask=None) for s in data[:3])], 'more'); two = make()
    with pytest.warns(UserWarning, match='3 pictures are called neither normal nor defective: they are left out'): quiet(two, more, replace(QUICK, epochs=1))
    assert two.training_record['pictures']['normal'] + two.training_record['pictures']['defective'] == 27

def test_inverted_masks_are_suspected(make, data):
    with pytest.warns(UserWarning, match='masks seem to mark the background: read the data with invert_masks=True'):
        quiet(make(), from_samples([replace(s, mask=~s.mask if s.label else s.mask) for s in data], 'inverted'), replace(QUICK, epochs=1))

@pytest.fixture
def files(data, tmp_path):
    root = tmp_path/'set'
    for i, s in enumerate(data):
        for kind, a in (('test/' + (s.defect or 'good'), s.picture), *((f'ground_truth/{s.defect}', s.mask),)*bool(s.label)):
            p = root/'leather'/kind/f'{i:02}{"_mask" if kind[0] == "g" else ""}.png'; p.parent.mkdir(parents=True, exist_ok=True)
            img = Image.fromarray(np.asarray(a)); img.resize((96 + 8*i, 100)).save(p) if i % 3 == 0 else img.save(p)      # several sizes
    return root

def test_files_of_several_sizes_some_unreadable(make, files, tmp_path):
    paths = sorted(files.glob('leather/test/*/*.png')); bad = [p for p in paths if p.parent.name != 'good']
    good = next(p for p in paths if p.parent.name == 'good'); good.write_bytes(b''); bad[0].write_text('no picture')
    mask = next(files.glob(f'leather/ground_truth/{bad[1].parent.name}/{bad[1].stem}*')); Image.new('L', (7, 7), 255).save(mask)
    two = make()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always'); h = quiet(two, Folder(files), QUICK, tmp_path/'run')
    said = ' '.join(str(w.message) for w in heard)
    assert '2 pictures could not be read and were left out' in said and '1 masks were not used' in said and '7 x 7' in said
    assert {Path(f.path) for f in h.failures} == {good, bad[0]} and 'left out' in repr(h) and two.training_record['pictures'] == dict(normal=14, defective=13, defective_with_mask=12, unreadable=2)
    assert h.finished and len(h.rows) == 8 and quiet(make(), Folder(files), QUICK, tmp_path/'run').failures[0].reason

def test_unreadable_pictures_and_a_resume(make, files, tmp_path):
    for p in sorted(files.glob('leather/test/*/*.png'))[::3]: p.write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole = make(); quiet(whole, Folder(files), QUICK)
        two, n = make(), itertools.count()
        def stop(batch):
            if next(n) == 2: raise KeyboardInterrupt
        two.before = stop; quiet(two, Folder(files), QUICK, tmp_path/'run')
        other = make(1); h = quiet(other, Folder(files), QUICK, tmp_path/'run')
    assert same(whole, other) and len(h.failures) == 9

def test_nothing_left(make, files):
    for p in files.glob('leather/test/*/*.png'):
        if p.parent.name != 'good': p.write_bytes(b'')
    with pytest.raises(ConfigError, match='not one of its 13 defective pictures could be read, for instance .*the file is empty'): quiet(make(), Folder(files))
    for p in files.glob('leather/test/*/*.png'): p.write_bytes(b'')
    with pytest.raises(ConfigError, match='not one of its 13 defective'): quiet(make(), Folder(files))

def test_prepare_of_several_sizes(make, data):
    two = make(); n = itertools.count(); real = two.prepare
    two.prepare = lambda p: real(p)[:, :8*(1 + next(n) % 2)]
    with pytest.raises(ConfigError, match=r'sizes \[\(8, 32\), \(16, 32\)\]: set image_size, or train with batch_size=1'): quiet(two, data)

def test_samples_that_are_paths(make, data, files, tmp_path):
    some = [Sample(p, int('good' not in p.parts), None, 'leather') for p in sorted(files.glob('leather/test/*/*.png'))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); h = quiet(make(), [*some, Sample('nowhere.png', 1, None, 'leather')])
    assert [str(f.path) for f in h.failures] == ['nowhere.png'] and h.finished

def test_moved_files_are_the_same_files(make, files, tmp_path):
    quiet(make(), Folder(files), QUICK, tmp_path/'run')
    files.parent.joinpath('elsewhere').mkdir(); files.rename(files.parent/'elsewhere'/'set')
    assert quiet(make(), Folder(files.parent/'elsewhere'/'set'), QUICK, tmp_path/'run').finished


# ---- validation and what is remembered

def test_validation(make, data, tmp_path, reference):
    two = make(); h = quiet(two, data, QUICK, tmp_path, Synthetic('target', 2))
    assert same(two, reference[0]) and [c['epoch'] for c in h.checks] == [1, 2] and {'image_auroc', 'pixel_pro'} <= set(h.checks[0])
    f = h.frame(); assert f.image_auroc.notna().sum() == 2 and len(f) == 8
    import pandas as pd
    assert list(pd.read_csv(tmp_path/'history.csv').columns) == list(f.columns) and 'last validation' in repr(h) and h.plot().png()
    calls = []; h = quiet(make(), data, QUICK, None, lambda d: calls.append(d.training) or dict(mine=len(calls)))
    assert [c['mine'] for c in h.checks] == [1, 2]
    with pytest.raises(ConfigError, match='validation on leather, which is trained on, would not be zero-shot'): quiet(make(), data.filter(category='leather'), validate=list(data.filter(category='leather')))

def test_record_card_and_measured(make, data, tmp_path):
    two = make(); quiet(two, data); r = two.training_record
    assert (r['data'], r['seed'], r['steps'], r['steps_planned']) == ('a small set', 5, 8, 8) and r['categories'] == data.categories and r['recipe']['epochs'] == 2 and r['losses']['total'] > 0
    assert trained_on(two) == set(data.categories)
    with pytest.raises(ConfigError, match='the head was trained on'): evaluate(two, data, progress=False)
    target = Synthetic('target', 2)
    record_measured(two, evaluate(two, target, progress=False))
    runs = sweep(TwoVectors, '', [], target, seeds=2, make=lambda cfg, b, seed: make(seed), options=dict(progress=False))
    entry = record_measured(two, runs, 'three seeds'); assert entry['seeds'] == [0, 1] and entry['spread']['image_auroc'] >= 0
    assert set(two.training_record['measured']) == {'synthetic target', 'three seeds'}
    two.save_pretrained(tmp_path); card = (tmp_path/'README.md').read_text()
    for words in ('preset released', 'data: a small set', 'seed: 5', 'epochs 2', '## Measured on synthetic target', 'image_auroc', 'spread'): assert words in card
    assert TwoVectors.from_pretrained(tmp_path, two.backbone).training_record == json.loads(json.dumps(two.training_record))


def test_training_again(make, data, tmp_path):
    two = make(); quiet(two, data.filter(category='leather')); first = two.training_record['categories']
    with pytest.raises(ConfigError, match='validation on leather'): quiet(two, data.filter(category='knit'), validate=list(data.filter(category='leather')))
    n = itertools.count()
    def stop(batch):
        if next(n) == 1: raise KeyboardInterrupt
    two.before = stop; cfg = replace(QUICK, batch_size=2)
    quiet(two, data.filter(category='knit'), cfg, tmp_path); quiet(two, data.filter(category='knit'), cfg, tmp_path)
    assert first == ['leather'] and two.training_record['categories'] == ['knit', 'leather'] and two.training_record['remarks'] == ['it began from a head that was trained on a small set']

def test_a_saved_detector_is_not_overwritten(make, data, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match='holds a saved detector but no checkpoint, and training would overwrite it'): quiet(make(), data, QUICK, tmp_path)


# ---- the command

@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(METHODS, 'two', f'{__name__}:TwoVectors'); monkeypatch.chdir(tmp_path)
    def go(*words):
        status = main([*words]); out = capsys.readouterr()
        return status, out.out, out.err
    return go

WORDS = 'train --method two --data synthetic --categories leather,plug --epochs 1 --batch-size 16 --device cpu --out head'.split()

def test_train_and_predict(command, data):
    status, out, err = command(*WORDS, '--validate', 'synthetic', '--set', 'drop=0', '--set', 'schedule=step', '--lr', '0.02', '--seed', '3', '--quiet')
    assert status == 0 and 'trained on synthetic auxiliary, 2 categories, 40 normal and 40 defective pictures (40 with a mask)' in out and 'next: zsad predict --method two --weights head PICTURES' in out and err == ''
    assert {'checkpoint.pt', 'history.csv', 'history.png', 'config.json', 'model.safetensors', 'README.md'} == {p.name for p in Path('head').iterdir()}
    made = json.loads(Path('head/config.json').read_text()); recipe = made['training']['recipe']
    assert made['config']['drop'] == 0 and made['preset'] == 'paper' and (recipe['schedule'], recipe['lr'], recipe['seed'], recipe['batch_size']) == ('step', .02, 3, 16)
    data[0].picture.save('one.png')
    assert command('predict', '--method', 'two', '--weights', 'head', 'one.png', '--quiet', '--device', 'cpu')[0] == 0
    assert command('eval', '--method', 'two', '--weights', 'head', '--data', 'synthetic', '--split', 'auxiliary', '--categories', 'leather', '--quiet', '--device', 'cpu')[0] == 2    # trained on

def test_train_goes_on(command, monkeypatch):
    real, n = TwoVectors.losses, itertools.count()
    def losses(self, batch):
        if next(n) == 3: raise KeyboardInterrupt
        return real(self, batch)
    monkeypatch.setattr(TwoVectors, 'losses', losses)
    status, out, err = command(*WORDS); assert status == 130 and 'the same command goes on' in out and 'interrupted after step 3 of 5' in err
    status, out, err = command(*WORDS, '--json'); got = json.loads(out)
    assert status == 0 and got['finished'] and got['steps'] == 5 and got['training']['categories'] == ['leather', 'plug'] and got['failures'] == []
    status, out, err = command(*WORDS, '--epochs', '2'); assert status == 2 and 'recipe.epochs was 1, now 2' in err and err.count('\n') == 1

def test_train_on_a_folder(command, files):
    sorted(files.glob('leather/test/*/*.png'))[0].write_bytes(b'')
    status, out, err = command('train', '--method', 'two', '--data', 'folder', '--root', str(files), '--out', 'head', '--preset', 'paper', '--epochs', '1', '--device', 'cpu', '--quiet', '--json')
    got = json.loads(out); assert status == 1 and len(got['failures']) == 1 and got['training']['recipe']['optimiser'] == 'adam' and got['training']['split'] == 'test'

@pytest.mark.parametrize('words, says', [
    ('--method anovl', 'anovl is training-free: there is nothing to train, use zsad predict --method anovl'), ('--method tow', "no method 'tow': did you mean 'two'?"), ('--preset loud', "no two preset 'loud'"),
    ('--set speed=3', "no setting 'speed'"), ('--set schedule=cosine', 'choose epoch, step, constant'), ('--epochs 0', 'number from 1'), ('--lr -1', 'lr must be a number above 0'), ('--data nowhere', 'nowhere'),
    ('--validate mvtec', 'say where it lies'), ('--device tpu', "device 'tpu' cannot be used"), ('--precision fp8', 'invalid choice'), ('--categories cup', "no category 'cup'"), ('--backbone none', 'none')])
def test_train_refuses(command, words, says):
    status, out, err = command(*WORDS, *words.split()); assert status == 2 and says in err and err.count('\n') == 1 and out == '' and not Path('head').exists()

def test_help_says_what_the_papers_train_on(command):
    status, out, err = command('train', '--help'); assert status == 0 and "auxiliary set's TEST split" in ' '.join(out.split())
