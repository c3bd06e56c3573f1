"""What every detector promises: any mixture of pictures, in order, in bounded memory; bad ones named; saved and refused properly."""
import gc, json, os, threading, time
import numpy as np, pytest, torch
from dataclasses import dataclass
from pathlib import Path
from PIL import Image
from torch import nn
from zsad_nb.anovl import AnoVL, AnoVLConfig
from zsad_nb.backbones import load_backbone
from zsad_nb.detector import Config, Detector, METHODS, Parts, ahead, batches, find_method, load_detector
from zsad_nb.scoring import cosine, to_grid
from zsad_nb.types import ConfigError, Failure, PicturesFailed, Prediction, Raw, WeightsError

@dataclass(frozen=True)
class HeadConfig(Config):
    layer: int = 12     # block that is read
    width: int = 128    # of the head

class Head(Detector):
    method, Config, presets, default_preset = 'head', HeadConfig, {'plain': HeadConfig(), 'smooth': HeadConfig(sigma=2.)}, 'plain'
    def __init__(self, cfg=None, backbone='tiny'):
        super().__init__(cfg, backbone)
        self.direction, self.drop = nn.Parameter(torch.randn(self.cfg.width)), nn.Dropout(.5)
    def forward(self, images, class_names=None, extras=()):
        tokens = self.backbone.trunk(images, [self.cfg.layer]).normed()
        maps = to_grid(cosine(self.drop(tokens.patches[self.cfg.layer]), self.direction[None])[..., 0], tokens.grid)[:, None]
        return Raw(maps, maps.flatten(1).amax(1))

@pytest.fixture(scope='module')
def tiny(): return load_backbone('tiny', pretrained=False)

@pytest.fixture
def head(tiny): return Head(backbone=tiny)

def pixels(seed, h=40, w=60): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'pics'/'deep').mkdir(parents=True)
    for i in range(5): Image.fromarray(pixels(i)).save(tmp_path/'pics'/f'{i}.png')
    Image.fromarray(pixels(9)).save(tmp_path/'pics'/'deep'/'0.png')
    return tmp_path/'pics'

# what may be given

def test_every_kind_of_source(head, folder):
    p = lambda x, **kw: head.predict(x, progress=False, **kw)
    a = pixels(0)
    ref = p(a)[0]
    for x in (Image.fromarray(a), torch.tensor(a).permute(2, 0, 1), folder/'0.png', str(folder/'0.png'), [a], (a,), iter([a]), a[None]):
        got = p(x); assert len(got) == 1; np.testing.assert_allclose(got[0].map, ref.map, atol=1e-5)
    assert len(p(folder)) == 6 and len(p(str(folder/'*.png'))) == 5 and len(p([folder, a, folder/'1.png'])) == 8
    assert p([]) == []

def test_memory_pictures_are_kept_and_files_are_not(head, folder):
    memory, file = head.predict([pixels(0), folder/'0.png'], progress=False)
    assert memory.kept is not None and memory.path is None and file.kept is None and file.path == folder/'0.png'
    assert memory.picture.size == file.picture.size == (60, 40) == file.size

def test_order_and_batch_size_do_not_matter(head, folder):
    many = [pixels(i) for i in range(11)]
    ref = [head.predict(o, progress=False)[0] for o in many]
    for n in (1, 3, 4, 50):
        for a, b in zip(head.predict(many, batch_size=n, progress=False), ref, strict=True):
            np.testing.assert_allclose(a.map, b.map, atol=1e-5); assert abs(a.score - b.score) < 1e-5

def test_class_names(tiny, folder):
    names = lambda *a: [p.class_name for p in AnoVL(AnoVLConfig(prompt_level='base'), tiny).predict(*a, progress=False)]
    a, b = pixels(0), pixels(1)
    assert names([a, b]) == ['', ''] and names([a, b], 'bolt') == ['bolt']*2 and names([a, b], ['bolt', 'wood']) == ['bolt', 'wood'] and names([a, b], ['bolt', None]) == ['bolt', '']
    assert names([folder/'deep', a], ['bolt', 'wood']) == ['bolt', 'wood'] and names([folder, a], ['bolt', 'wood']) == ['bolt']*6 + ['wood']
    assert names(folder, list('abcdef')) == list('abcdef')
    with pytest.raises(ConfigError, match='3 class names for 2 things given'): names([a, b], ['x']*3)

# what goes wrong

def test_bad_pictures(head, folder):
    (folder/'text.png').write_text('no picture'); (folder/'empty.png').write_bytes(b'')
    whole = (folder/'0.png').read_bytes(); (folder/'cut.png').write_bytes(whole[:len(whole)//2])
    given = [folder/'0.png', folder/'text.png', folder/'none.png', folder/'empty.png', pixels(1), folder/'cut.png', 3, np.zeros((2, 2, 7), np.uint8), folder/'1.png']
    got = list(head.stream(given, batch_size=2, progress=False))
    assert [type(g) for g in got] == [Prediction, Failure, Failure, Failure, Prediction, Failure, Failure, Failure, Prediction]
    for f in got:
        if isinstance(f, Failure): assert f.reason and '\n' not in f.reason and len(f.reason) < 300 and 'Traceback' not in f.reason
    with pytest.raises(PicturesFailed) as e: head.predict(given, progress=False)
    assert len(e.value.predictions) == 3 and len(e.value.failures) == 6
    kept = head.predict(given, progress=False, on_error='skip')
    assert len(kept) == 3 and [f.path for f in kept.failures][:2] == [folder/'text.png', folder/'none.png']

def test_all_bad(head, tmp_path):
    with pytest.raises(PicturesFailed): head.predict(tmp_path, progress=False)   # an empty folder
    assert head.predict(tmp_path/'nowhere', on_error='skip', progress=False) == []

def test_programming_errors_are_not_hidden(tiny):
    class Wrong(Head):
        def forward(self, *a): raise RuntimeError('a bug')
    with pytest.raises(RuntimeError, match='a bug'): Wrong(backbone=tiny).predict(pixels(0), progress=False)

def test_nan_fails_one_picture(tiny):
    class Nan(Head):
        def forward(self, images, names=None, extras=()):
            raw = super().forward(images); raw.layer_maps[1] = float('nan'); return raw
    with torch.no_grad(): got = list(Nan(backbone=tiny).eval().stream([pixels(i) for i in range(3)], progress=False))
    assert [type(g) for g in got] == [Prediction, Failure, Prediction] and 'NaN' in got[1].reason

@pytest.mark.parametrize('kw, words', [(dict(batch_size=0), 'at least 1'), (dict(extras=['why']), 'no extras why'), (dict(on_error='quiet'), "'raise' or 'skip'")])
def test_bad_arguments(head, kw, words):
    with pytest.raises(ConfigError, match=words): head.predict(pixels(0), **kw)

def test_bad_settings_are_no_bad_pictures(tiny):
    with pytest.raises(ConfigError, match='not a multiple of the patch size'): Head(HeadConfig(image_size=45), tiny).predict(pixels(0), progress=False)

def test_failures_from_memory_have_a_number(head):
    got = head.predict([pixels(0), None, pixels(1), 'no.png', np.zeros((0, 3))], progress=False, on_error='skip')
    assert [str(f.path) for f in got.failures] == ['picture 1 (from memory)', 'no.png', 'picture 4 (from memory)']

# bounded memory

def test_never_far_ahead():
    started, lock = [], threading.Lock()
    def work(i):
        with lock: started.append(i)
        return i
    for done, i in enumerate(ahead(work, range(200), 8), 1):
        assert i == done - 1 and len(started) <= done + 8
        time.sleep(.0005)

def test_stream_holds_two_batches_at_most(head):
    alive, most = set(), []
    class Tracked(np.ndarray): pass
    prepare = head.prepare
    class Pixels:
        def __init__(self): self.id = id(self); alive.add(self.id)
        def __del__(self): alive.discard(self.id)
    def counted(picture):
        t = prepare(picture); t.owner = Pixels(); return t
    head.prepare = counted
    for _ in head.stream([pixels(i % 7, 16, 16) for i in range(60)], batch_size=4, progress=False): most.append(len(alive))
    assert max(most) <= 9, max(most)   # a batch, a batch ahead, and the one in hand
    gc.collect(); assert not alive

def test_leaving_early_stops_the_threads(head):
    before = threading.active_count()
    stream = head.stream([pixels(0)]*50, batch_size=2, progress=False)
    next(stream); stream.close()
    for _ in range(100):
        if threading.active_count() <= before: break
        time.sleep(.02)
    assert threading.active_count() <= before

def test_batches_keep_order_and_one_size():
    item = lambda *s: (None, torch.zeros(3, *s), (1, 1), 0.)
    bad, a, b = Failure('p', 'r'), item(8, 8), item(8, 16)
    given = [a, a, bad, b, b, b, bad, bad, a]
    got = list(batches(given, 2))
    assert [id(o) for g in got for o in g] == [id(o) for o in given] and all(len(g) <= 2 for g in got)
    assert all(len({o[1].shape for o in g if not isinstance(o, Failure)}) <= 1 for g in got)

def test_pictures_of_many_sizes(tiny):
    class Own(Head):
        def prepare(self, picture): return self.backbone.preprocess(picture, (64, 64 if picture.width == 60 else 96))
    got = Own(backbone=tiny).predict([pixels(0), pixels(1, 40, 80), pixels(2, 40, 80), pixels(3)], progress=False)
    assert [p.map.shape for p in got] == [(64, 64), (64, 96), (64, 96), (64, 64)]

# the model inside

def test_eval_while_predicting_and_back(head):
    head.train(); a, b = (head.predict(pixels(0), progress=False)[0] for _ in range(2))
    assert np.array_equal(a.map, b.map) and head.training and head.drop.training and not head.backbone.training

def test_backbone_belongs_to_nobody(head, tiny):
    assert set(head.state_dict()) == {'direction'} == {n for n, _ in head.named_parameters()} and head.backbone is tiny
    assert head.double().backbone.trunk.model.proj.dtype == torch.float64; head.float()
    assert next(tiny.parameters()).dtype == torch.float32

def test_keep_frozen_moves_along(head):
    cnn = head.keep_frozen('cnn', nn.Conv2d(3, 4, 3)); head.double()
    assert cnn.weight.dtype == torch.float64 and not cnn.weight.requires_grad and 'cnn' not in str(list(head.state_dict())); head.float()

def test_variant(head):
    new = head.variant(sigma=3.)
    assert new.cfg.sigma == 3. and torch.equal(new.direction, head.direction) and new.backbone is head.backbone
    with pytest.raises(ConfigError, match='train anew'): head.variant(width=64)
    with pytest.raises(ConfigError, match="no field 'sigmas'"): head.variant(sigmas=3.)

def test_seconds_are_measured(head):
    p = head.predict(pixels(0, 800, 800), progress=False)[0]
    assert 0 < p.seconds < 60

def test_progress_goes_to_standard_error(head, capsys):
    head.predict([pixels(0)]*3, batch_size=2); out, err = capsys.readouterr()
    assert not out and '3/3' in err
    head.predict([pixels(0)]*2, batch_size=2); assert not any(capsys.readouterr())

# saved and read back

def test_round_trip(head, tiny, tmp_path):
    head.training_record = dict(data='synthetic auxiliary', categories=['leather'], seed=3)
    place = head.save_pretrained(tmp_path/'new'/'head')
    assert sorted(p.name for p in place.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    back = Head.from_pretrained(place, tiny)
    assert torch.equal(back.direction, head.direction) and back.cfg == head.cfg and back.training_record == head.training_record
    a, b = (d.predict(pixels(0), progress=False)[0] for d in (head, back)); assert np.array_equal(a.map, b.map)
    assert 'leather' in (place/'README.md').read_text() and head.backbone.fingerprint() in (place/'README.md').read_text()

def test_anovl_round_trip(tmp_path):
    made = AnoVL(AnoVLConfig(views=22, textures=('linen',), abnormal_states=('torn {}',)))
    back = Detector.from_pretrained(made.save_pretrained(tmp_path))
    assert isinstance(back, AnoVL) and back.cfg == made.cfg
    assert load_detector('anovl', weights=tmp_path).cfg == made.cfg
    with pytest.raises(ConfigError, match='other settings than preset'): load_detector('anovl', 'paper', weights=tmp_path)

def edited(head, place, **changes):
    head.save_pretrained(place); m = json.loads((place/'config.json').read_text())
    for k, v in changes.items(): m[k] = {**m[k], **v} if isinstance(v, dict) else v
    (place/'config.json').write_text(json.dumps(m)); return place

@pytest.mark.parametrize('changes, error, words', [
    (dict(config=dict(sigmar=2, anchors=4)), ConfigError, "no field 'anchors', 'sigmar'"), (dict(method='other'), ConfigError, 'holds a other detector'),
    (dict(backbone=dict(fingerprint='0'*12)), ConfigError, 'the weights at hand are'), (dict(backbone=dict(width=1024)), ConfigError, 'of width 1024'), (dict(config=dict(width=64)), WeightsError, 'does not fit')])
def test_refusals(head, tiny, tmp_path, changes, error, words):
    with pytest.raises(error, match=words): Head.from_pretrained(edited(head, tmp_path, **changes), tiny)

def test_pickles_are_not_read(tmp_path, tiny):
    class Boom:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    torch.save(Boom(), tmp_path/'head.pth')
    for source in (tmp_path/'head.pth', tmp_path, 'CLIP.pth'):
        with pytest.raises(WeightsError, match='pickle'): Head.from_pretrained(source, tiny)
    assert not (tmp_path/'ran').exists()

def test_broken_folders(head, tmp_path, tiny):
    place = head.save_pretrained(tmp_path/'a')
    (place/'config.json').write_text('{'); 
    with pytest.raises(WeightsError, match='not JSON'): Head.from_pretrained(place, tiny)
    (place/'config.json').write_text('{"architectures": ["CLIP"]}')
    with pytest.raises(ConfigError, match='lacks backbone, config, method'): Head.from_pretrained(place, tiny)
    place = head.save_pretrained(tmp_path/'a'); (place/'model.safetensors').write_bytes(b'cut')
    with pytest.raises(WeightsError, match='damaged'): Head.from_pretrained(place, tiny)
    with pytest.raises(WeightsError, match='no such folder'): Head.from_pretrained(tmp_path/'b', tiny)

def test_not_on_the_hub_is_said_at_once(tiny):
    start = time.perf_counter()
    with pytest.raises(WeightsError, match='fetch it beforehand'): Head.from_pretrained('zsad-nb-nobody/nothing-here', tiny)
    assert time.perf_counter() - start < 15

def test_push(head, monkeypatch):
    import huggingface_hub
    sent = {}
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kw): sent['repo'] = repo_id
        def upload_folder(self, repo_id, folder_path, commit_message): sent['files'] = sorted(os.listdir(folder_path)); return 'address'
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert head.push_to_hub('me/head') == 'address' and sent == dict(repo='me/head', files=['README.md', 'config.json', 'model.safetensors'])

def test_methods_can_all_be_found():
    for name in METHODS: assert issubclass(find_method(name), Detector) and find_method(name).method == name
    with pytest.raises(ConfigError, match='no method'): load_detector('nothing')
    with pytest.raises(ConfigError, match='no preset'): load_detector('anovl', 'loud')

# explanations

def test_parts():
    rng = np.random.default_rng(0)
    labels = [dict(a=i % 3, b=i % 2) for i in range(12)]
    p = Parts(rng.normal(size=(12, 5, 6)).astype(np.float32), labels, .5, dict(size=(20, 30), box=3, align_corners=True, sigma=1.5))
    np.testing.assert_allclose(p.finished().sum(0) + .5, p.total(), atol=1e-5)
    for x, y in ((0, 0), (29, 19), (7, 3)): np.testing.assert_allclose(p.at((x, y)), p.finished()[:, y, x], atol=1e-6)
    np.testing.assert_allclose(p.group('a').group('a').total(), p.total(), atol=1e-6); assert len(p.group('a', 'b').labels) == 6

def test_explain(tiny):
    d = AnoVL(AnoVLConfig(prompt_level='state'), tiny)
    why = d.explain(pixels(0), (10, 5), 'bolt')
    for name in why.parts: assert abs(sum(r[1] for r in why.rows(name)) + .5 - why.value()) < 1e-5
    assert '<table' in why._repr_html_() and len(why.frame('parts_by_state')) == 14
    assert d.explain(pixels(0), class_name='bolt').point == why.prediction.peak()
    with pytest.raises(ConfigError, match='outside the picture'): d.explain(pixels(0), (60, 5))
    with pytest.raises(PicturesFailed): d.explain('nowhere.png')

# ---- windows

@pytest.mark.parametrize('size', [(90, 60), (60, 190), (64, 64), (300, 64), (1, 40)])
@pytest.mark.parametrize('fit', ['tiles', 'pad'])
def test_windows_cover_the_picture_and_join(size, fit):
    from PIL import Image
    from zsad_nb.detector import cut, join, lay_out
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    where = lay_out(size, (64, 48), fit)
    pixels = lambda p: torch.from_numpy(np.array(p, np.float32)).permute(2, 0, 1)
    windows = cut(picture, where, (1, 2, 3))
    assert all(w.size == (48, 64) for w in windows) and (fit == 'tiles' or len(windows) == 1)
    torch.testing.assert_close(join(torch.stack([pixels(w) for w in windows]), where), pixels(picture.resize(where.size[::-1])), atol=1e-4, rtol=0)

@pytest.mark.parametrize('fit', ['tiles', 'pad'])
def test_maps_have_the_shape_of_the_picture(fit):
    d = Head(backbone=load_backbone('tiny', pretrained=False)).variant(fit=fit)
    pics = [np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8) for i, (h, w) in enumerate([(100, 150), (100, 170), (300, 100), (80, 80)])]
    for n in (1, 4):
        for p, a in zip(d.predict(pics, batch_size=n, progress=False), pics):
            H, W = p.map.shape; h, w = a.shape[:2]
            assert abs(H/W - h/w) < .02*h/w and p.layer_maps.shape[1:] == p.map.shape and np.isfinite(p.map).all()
    square = d.predict(pics[3], progress=False)[0]; plain = d.variant(fit='stretch').predict(pics[3], progress=False)[0]
    np.testing.assert_allclose(square.map, plain.map, atol=1e-5); assert abs(square.score - plain.score) < 1e-5

def test_two_tiles_as_released():
    "Shorter side to the input, squares left and right, overlap averaged, mean of the two scores"
    from PIL import Image
    d = Head(backbone=load_backbone('tiny', pretrained=False)); s = d.backbone.image_size[0]
    a = Image.fromarray(np.random.default_rng(0).integers(0, 256, (s, s*3//2, 3), np.uint8))
    left, right = (d.predict(a.crop((x, 0, x + s, s)), progress=False)[0] for x in (0, s//2))
    both = d.variant(fit='tiles').predict(a, progress=False)[0]
    np.testing.assert_allclose(both.map[:, :s//2], left.map[:, :s//2], atol=1e-5); np.testing.assert_allclose(both.map[:, s:], right.map[:, s//2:], atol=1e-5)
    np.testing.assert_allclose(both.map[:, s//2:s], (left.map[:, s//2:] + right.map[:, :s//2])/2, atol=1e-5)
    assert abs(both.score - (left.score + right.score)/2) < 1e-5

def test_extras_speak_of_one_window():
    d = load_detector('anovl').variant(fit='tiles')
    with pytest.raises(ConfigError, match='one window'): d.predict(np.zeros((60, 90, 3), np.uint8), extras=('similarity',))

def test_asking_a_method_without_adaptation():
    with pytest.raises(ConfigError, match='does not adapt to pictures'): Head.settings(None).adapting(5)
    assert load_detector('anovl', adapt=5, seed=3).cfg.adapt == 5
