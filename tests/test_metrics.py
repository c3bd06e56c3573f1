"Metrics: parity with other people's numbers, honesty of the streaming bounds, bad input."
import copy, pickle, subprocess, sys
import numpy as np
import pytest
from zsad_nb import metrics as M
from zsad_nb.types import ConfigError, PictureError, shared_dir

FIXTURES = shared_dir() and shared_dir()/'fixtures'
needs_fixtures = pytest.mark.skipif(not (FIXTURES and (FIXTURES/'metrics.safetensors').exists()), reason='../shared/fixtures is absent: parity with the authors\' numbers is not checked')
KINDS = 'smooth', 'skewed', 'narrow', 'quantised'

def close(a, b, eps=1e-6): assert abs(float(a) - float(b)) <= eps, (float(a), float(b))

@pytest.fixture(scope='module')
def fx():
    from safetensors.numpy import load_file
    return load_file(FIXTURES/'metrics.safetensors')

# ---- parity ----

@needs_fixtures
@pytest.mark.parametrize('kind', KINDS)
def test_exact_equals_sklearn_and_anomalib(fx, kind):
    maps, masks = fx[f'in/maps/{kind}'], fx['in/masks']
    out = lambda k: fx[f'out/{kind}/{k}']
    got = M.pixel_metrics(maps, masks)
    for k in ('auroc', 'ap', 'f1max'): close(got[f'pixel_{k}'], out(f'sklearn/pixel_{k}'), 1e-12)
    close(got['pixel_auroc'], out('anomalib/pixel_auroc'))
    close(got['pixel_f1max'], out('anomalib/pixel_f1max'))
    close(got['pixel_auroc'], out('anomalyclip/pixel_auroc'), 1e-12)
    r = M.pixel_ranking(maps, masks)
    close(r.aupr(), out('sklearn/pixel_aupr_trapezoid'), 1e-9)
    close(r.aupr(), out('anomalib/pixel_aupr'), 1e-4)  # float32 sums over there: up to 7e-5 beside sklearn's own
    close(M.pixel_f1max(maps, masks, eps=1e-8), out('vcpclip/pixel_f1max_eps1e-8'), 1e-12)
    each = [M.pixel_auroc([a], [m]) for a, m in zip(maps, masks) if m.any()]
    close(np.mean(each), out('sklearn/pixel_auroc_mean_per_image'), 1e-12)

@needs_fixtures
@pytest.mark.parametrize('kind', KINDS)
def test_pro_equals_reference_and_anomalib(fx, kind):
    maps, masks = fx[f'in/maps/{kind}'], fx['in/masks']
    out = lambda k: fx[f'out/{kind}/{k}']
    for limit in (.05, .3, 1.):
        close(M.pixel_pro(maps, masks, limit), out(f'exact/pixel_aupro_{limit}_8conn'), 1e-12)
        close(M.pixel_pro(maps, masks, limit, connectivity=4), out(f'exact/pixel_aupro_{limit}_4conn'), 1e-12)
        close(M.pixel_pro(maps, masks, limit), out(f'anomalib/pixel_aupro_{limit}'))
    for c in (4, 8): assert sum(M.regions(m > 0, c)[1] for m in masks) == out(f'exact/regions_{c}conn')

@needs_fixtures
@pytest.mark.parametrize('kind', KINDS)
def test_legacy_pro_equals_the_papers_code(fx, kind):
    maps, masks = fx[f'in/maps/{kind}'], fx['in/masks']
    out = lambda k: fx[f'out/{kind}/{k}']
    v = M.legacy_pro(maps, masks)
    close(v, out('anomalyclip/pixel_aupro'))
    close(M.legacy_pro(maps, masks, steps=2000), out('anomalyclip/pixel_aupro_2000_steps'))
    close(M.legacy_pro(maps[:7], masks[:7]), out('anomalyclip/pixel_aupro_without_normal_image'))
    assert len(v.fpr) == out('anomalyclip/kept_thresholds')
    close(v.fpr.min(), out('anomalyclip/kept_fpr_min'))
    close(v.fpr.max(), out('anomalyclip/kept_fpr_max'))

@needs_fixtures
def test_image_metrics_equal_sklearn_anovl_anomalib(fx):
    s, y = fx['in/image_scores'], fx['in/image_labels']
    got, out = M.image_metrics(s, y), lambda k: fx[f'out/image/{k}']
    for k in ('auroc', 'ap', 'f1max'): close(got[f'image_{k}'], out(f'sklearn/image_{k}'), 1e-12)
    for k in ('auroc', 'ap'): close(got[f'image_{k}'], out(f'anomalyclip/image_{k}'), 1e-12)
    close(M.image_aupr(s, y), out('anovl/image_aupr_trapezoid'), 1e-12)
    close(got['image_f1max'], out('anomalib/image_f1max'))

@needs_fixtures
def test_visualad_and_vip2_helpers():
    from safetensors.numpy import load_file
    d = load_file(FIXTURES/'metrics_visualad_vip2.safetensors')
    maps, masks, out = d['in/maps'], d['in/masks'], lambda k: d[f'out/{k}'][0]
    close(M.pixel_auroc(maps, masks), out('pixel-auroc'), 1e-12)
    close(M.pixel_ap(maps, masks), out('pixel-ap'), 1e-12)
    close(M.pixel_f1max(maps, masks, eps=1e-8), out('pixel-f1'), 1e-12)
    close(M.pixel_ranking(maps, masks).best_threshold(), out('pixel-f1-threshold'), 1e-12)
    for k, name in (('auroc', 'auroc'), ('ap', 'ap'), ('f1', 'f1max')): close(getattr(M, f'image_{name}')(d['in/image_scores'], d['in/image_labels']), out(f'image-{k}'), 1e-12)
    close(M.legacy_pro(maps, masks, inclusive=True), out('pro_visualad_less_equal'))
    close(M.legacy_pro(maps, masks), out('pro_vip2_strict_less'))
    close(M.legacy_pro(maps, masks, steps=1000, inclusive=True), out('pro_visualad_step_1000'))
    close(M.pixel_pro(maps, masks), out('pro_exact_reference'), 1e-12)

@needs_fixtures
@pytest.mark.parametrize('kind', KINDS)
def test_streaming_on_fixtures(fx, kind):
    maps, masks = fx[f'in/maps/{kind}'], fx['in/masks']
    s = M.PixelStream(block=5000)
    for a, m in zip(maps, masks): s.update([a], [m])
    for k, v in s.compute().items():
        assert abs(v - M.pixel_metrics(maps, masks)[k]) <= v.error < 1e-4

def test_inclusive_habit_keeps_the_limit_itself():
    "The two habits differ when a threshold hits a rate of 0.3 exactly"
    a = np.linspace(1, 0, 14)[None, :].repeat(2, 0)
    m = np.zeros((2, 14), bool); m[:, 3:7] = True
    strict, loose = M.legacy_pro([a], [m]), M.legacy_pro([a], [m], inclusive=True)
    assert loose.fpr.max() == .3 > strict.fpr.max()

# ---- exact form ----

@pytest.mark.parametrize('seed', range(6))
def test_agrees_with_sklearn_with_and_without_ties(seed):
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
    rng = np.random.default_rng(seed)
    y = rng.random(500) < (.02, .1, .5, .9, .3, .3)[seed]
    s = rng.normal(size=500) + y
    if seed % 2: s = np.round(s, 1)
    y[:2] = 0, 1
    p, r, _ = precision_recall_curve(y, s)
    close(M.image_auroc(s, y), roc_auc_score(y, s), 1e-12)
    close(M.image_ap(s, y), average_precision_score(y, s), 1e-12)
    close(M.image_aupr(s, y), auc(r, p), 1e-12)
    close(M.image_f1max(s, y), np.nanmax(2*p*r/np.maximum(p + r, 1e-300)), 1e-12)

def pro_by_definition(maps, masks, limit):
    parts = [a[lab == k] for a, m in zip(maps, masks) for lab, n in [M.regions(m)] for k in range(1, n + 1)]
    normal = np.concatenate([a[~m] for a, m in zip(maps, masks)])
    s = np.unique(np.concatenate([a.ravel() for a in maps]))[::-1]
    x = np.array([0] + [(normal >= t).mean() for t in s]); y = np.array([0] + [np.mean([(p >= t).mean() for p in parts]) for t in s])
    inside = x <= limit
    x, y = np.append(x[inside], limit), np.append(y[inside], np.interp(limit, x, y))
    return np.diff(x) @ (y[1:] + y[:-1])/2/limit

def world(n=6, size=40, seed=0, share=.04):
    rng = np.random.default_rng(seed)
    masks = rng.random((n, size, size)) < share
    masks[::3, :, : size//2] = False
    masks[1, 4:14, 4:20] = True
    return (rng.normal(size=masks.shape) + masks*rng.uniform(0, 2, (n, 1, 1))).astype(np.float32), masks

@pytest.mark.parametrize('limit', (.01, .3, 1.))
@pytest.mark.parametrize('digits', (None, 1, 0))
def test_pro_follows_its_definition(limit, digits):
    maps, masks = world(4, 20)
    if digits is not None: maps = np.round(maps, digits)
    close(M.pixel_pro(maps, masks, limit), pro_by_definition(maps, masks, limit), 1e-12)

def test_pictures_of_different_sizes():
    maps, masks = world(4, 24)
    cut = [a[: 14 + 3*i] for i, a in enumerate(maps)], [m[: 14 + 3*i] for i, m in enumerate(masks)]
    close(M.pixel_pro(*cut), pro_by_definition(*cut, .3), 1e-12)

def test_perfect_inverted_and_constant():
    m = np.zeros((1, 20, 20), bool); m[0, 3:6, 3:6] = True
    assert list(M.pixel_metrics(m.astype(float), m).values()) == pytest.approx([1, 1, 1, 1], abs=1e-12)
    assert M.pixel_auroc(1. - m, m) == M.pixel_pro(1. - m, m) == 0
    flat = M.pixel_metrics(np.zeros(m.shape), m)
    close(flat['pixel_auroc'], .5, 1e-12); close(flat['pixel_ap'], m.mean(), 1e-12); close(flat['pixel_pro'], .15, 1e-12)

@pytest.mark.parametrize('f', (np.exp, np.arctan, lambda x: x**3, lambda x: 5 + 1e-3*x))
def test_exact_metrics_see_only_the_ranking(f):
    maps, masks = world()
    maps = maps.astype(np.float64)
    a, b = M.pixel_metrics(maps, masks), M.pixel_metrics(f(maps), masks)
    for k in a: close(a[k], b[k], 1e-12)

def test_inputs_are_left_alone():
    maps, masks = world()
    before = maps.copy(), masks.copy()
    M.pixel_metrics(maps, masks); M.legacy_pro(maps, masks); M.PixelStream().update(maps, masks).compute()
    assert (maps == before[0]).all() and (masks == before[1]).all()
    s = np.array([.3, .1, .2]); M.image_metrics(s, [0, 1, 0]); assert s.tolist() == [.3, .1, .2]

def test_torch_tensors():
    torch = pytest.importorskip('torch')
    maps, masks = world()
    want = M.pixel_metrics(maps, masks)
    assert M.pixel_metrics(torch.tensor(maps, requires_grad=True), torch.tensor(masks)) == want
    assert M.PixelStream().update(torch.tensor(maps), torch.tensor(masks)).compute() == M.PixelStream().update(maps, masks).compute()
    assert M.image_auroc(torch.tensor([.1, .9]).half(), torch.tensor([0, 1])) == 1

# ---- streaming form ----

def stream(maps, masks, order=None, **kw):
    s = M.PixelStream(**kw)
    for i in range(len(maps)) if order is None else order: s.update([maps[i]], [masks[i]])
    return s

def honest(s, maps, masks, most=1e-4):
    exact = M.pixel_metrics(maps, masks, s.limit)
    for k, v in s.compute().items(): assert abs(v - exact[k]) <= v.error <= most, (k, v, exact[k])

unit = lambda a: (a - a.min())/np.ptp(a)
HARD = dict(plain=lambda a: a, narrow=lambda a: .5 + .001*unit(a), narrower=lambda a: .5 + 1e-6*unit(a), sigmoid=lambda a: 1/(1 + np.exp(25 - 30*unit(a))),
            saturated=lambda a: np.clip(unit(a)*2 - .9, 0, 1), levels=lambda a: np.round(unit(a)*255)/255, two=lambda a: np.round(unit(a)),
            sixty_decades=lambda a: 10.**(60*unit(a) - 30), signed_decades=lambda a: np.sign(a)*10.**(20*np.abs(a)/np.abs(a).max() - 10), negative=lambda a: a - 1e4, constant=np.zeros_like)

@pytest.mark.parametrize('kind', HARD)
@pytest.mark.parametrize('block', (3000, 2**23))
def test_streaming_is_right_and_honest(kind, block):
    maps, masks = world(24, 160, share=.002)
    maps = HARD[kind](maps.astype(np.float64)).astype(np.float32)
    honest(stream(maps, masks, block=block), maps, masks)

@pytest.mark.parametrize('order', ('as made', 'rising', 'falling', 'shuffled'))
def test_a_drifting_range_in_any_order(order):
    "The range of the scores changes from picture to picture, and nothing is known beforehand"
    maps, masks = world(24, 160, share=.002, seed=3)
    maps = np.stack([a*10.**(i % 7 - 3) + (i % 5) for i, a in enumerate(maps)]).astype(np.float32)
    by_top = np.argsort(maps.max((1, 2)))
    take = {'as made': np.arange(24), 'rising': by_top, 'falling': by_top[::-1], 'shuffled': np.random.default_rng(0).permutation(24)}[order]
    honest(stream(maps, masks, take, block=20_000), maps, masks)

def test_normal_first_defects_last():
    "Early bins must not blind the stream to what crowds into them later"
    maps, masks = world(24, 160, share=.002)
    maps = np.where(masks.any((1, 2))[:, None, None], .5 + 1e-3*unit(maps), unit(maps)).astype(np.float32)
    honest(stream(maps, masks, np.argsort(masks.any((1, 2)), kind='stable'), block=20_000), maps, masks)

def test_coarse_bins_are_honest_too():
    "With hardly any rows the error is large, and says so"
    maps, masks = world(24, 160, share=.002)
    for rho in (2**-4, 2**-8):
        s = stream(maps, masks, resolution=rho, block=20_000)
        honest(s, maps, masks, most=1)
        assert max(v.error for v in s.compute().values()) > 1e-5
    s = M.PixelStream(block=20_000); s.normal.capacity = s.defect.capacity = 500
    for a, m in zip(maps, masks): s.update([a], [m])
    assert len(s.normal.flush()) <= 500 and len(s.defect.flush()) <= 500
    honest(s, maps, masks, most=1)

@pytest.mark.parametrize('seed', range(3))
def test_merging_in_any_order(seed):
    maps, masks = world(24, 160, share=.002, seed=seed)
    rng = np.random.default_rng(seed)
    parts = [stream(maps[i::5], masks[i::5], block=30_000) for i in range(5)]
    while len(parts) > 1:
        i, j = rng.choice(len(parts), 2, replace=False)
        joined = copy.deepcopy(parts[i]).merge(parts[j])
        parts = [p for k, p in enumerate(parts) if k not in (i, j)] + [joined]
    assert parts[0].pictures == 24 and parts[0].regions == sum(M.regions(m)[1] for m in masks)
    honest(parts[0], maps, masks)

def test_merge_leaves_the_other_alone_and_travels():
    maps, masks = world()
    a, b = stream(maps[:3], masks[:3]), stream(maps[3:], masks[3:])
    want = b.compute()
    b2 = pickle.loads(pickle.dumps(stream(maps[3:], masks[3:])))   # with scores still waiting
    a.merge(b2)
    assert b2.compute() == want and b2.pictures == 3
    again = M.PixelStream.from_state(dict(np.load(save(a.state()))))
    assert again.compute() == a.compute() and (again.pictures, again.regions) == (6, a.regions)

def save(arrays):
    import io
    f = io.BytesIO(); np.savez(f, **arrays); f.seek(0)
    return f

def test_batches_make_no_difference():
    maps, masks = world()
    assert M.PixelStream().update(maps, masks).compute() == stream(maps, masks).compute()

def test_memory_does_not_grow_with_pictures():
    rng, s, held = np.random.default_rng(0), M.PixelStream(block=2**16, resolution=2**-9), []
    for i in range(400):
        a = rng.normal(size=(1, 64, 64)).astype(np.float32)
        s.update(a, a + rng.normal(size=a.shape) > 2.5)
        if i in (39, 399): held.append(s.nbytes)
    assert held[1] < 2*held[0] + 5e5 and 400*64*64*4 > 4*held[1]

def test_codes_keep_the_order_of_all_floats():
    x = np.array([np.finfo(np.float32).max, 1, np.nextafter(np.float32(1), np.float32(0)), 1e-45, 0, -1e-45, -1, -np.finfo(np.float32).max], np.float32)
    c = M.codes(x).astype(np.int64)
    assert (np.diff(c) > 0).all() and M.codes(np.float32(-0.)) == M.codes(np.float32(0))

# ---- missing values and tables ----

def test_missing_says_why():
    maps, masks = world()
    for v in M.pixel_metrics(maps, masks*0).values(): assert np.isnan(v) and 'all pixels are normal' in v.reason
    for v in M.pixel_metrics(maps, masks | True).values(): assert np.isnan(v) and 'all pixels are anomalous' in v.reason
    for v in M.pixel_metrics(maps, None).values(): assert v.reason == 'there are no masks'
    for v in M.image_metrics([.1, .2], [1, 1]).values(): assert 'all pictures are anomalous' in v.reason
    for f in (M.pixel_auroc, M.pixel_ap, M.pixel_f1max, M.pixel_pro, M.legacy_pro): assert isinstance(f(maps, masks*0), M.Missing)
    assert isinstance(M.legacy_pro(np.ones_like(maps), masks), M.Missing)
    assert isinstance(M.PixelStream().update(maps, masks*0).compute()['pixel_pro'], M.Missing)
    assert isinstance(M.PixelStream().compute()['pixel_pro'], M.Missing)

def test_category_table_averages_unrounded_values():
    t = M.category_table({'a': {'x': .12345}, 'b': {'x': .12355, 'y': .5}, 'c': {'x': M.Missing('why'), 'y': 1.}})
    close(t.loc['mean', 'x'], .1235, 1e-15); close(t.loc['mean', 'y'], .75, 1e-15)
    assert t.loc['c', 'missing'] == 'x: why' and t.loc['a', 'missing'] == 'y: not computed' and 'x over 2 of 3' in t.loc['mean', 'missing']
    with pytest.raises(ConfigError): M.category_table({})

# ---- bad input ----

ok, none = np.zeros((4, 4), np.float32), np.zeros((4, 4), bool)

@pytest.mark.parametrize('maps, masks, words', [
    ([ok, ok*np.nan], [none, none], ('map 1', '16 of 16', 'NaN or infinite')),
    ([np.where(np.eye(4), np.inf, 0)], [none], ('map 0', '4 of 16', 'NaN or infinite')),
    ([ok], [none[:3]], ('map 0', '3 x 4', '4 x 4')),
    ([ok], [np.zeros((4, 4, 3))], ('4 x 4 x 3', 'one channel')),
    ([ok], [np.arange(16).reshape(4, 4)], ('not binary',)),
    ([ok], [np.full((4, 4), .5)], ('not binary',)),
    ([ok], [np.full((4, 4), np.nan)], ('not binary',)),
    ([ok], [np.full((4, 4), 7)], ('not binary',)),
    ([ok], [None], ('there is no mask', 'all-zero')),
    ([ok[None]], [none], ('two axes', '1 x 4 x 4')),
    ([np.zeros((0, 4))], [np.zeros((0, 4))], ('two axes',)),
    ([np.full((4, 4), 'a')], [none], ('holds numbers',)),
])
@pytest.mark.parametrize('f', (M.pixel_metrics, M.legacy_pro, lambda a, m: M.PixelStream().update(a, m)))
def test_bad_pictures(f, maps, masks, words):
    with pytest.raises(PictureError) as e: f(maps, masks)
    for w in words: assert w in str(e.value)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('f', (M.pixel_metrics, M.legacy_pro, lambda a, m: M.PixelStream().update(a, m)))
def test_bad_counts(f):
    with pytest.raises(ConfigError, match='2 anomaly maps and 1 masks'): f([ok, ok], [none])
    with pytest.raises(ConfigError, match='at least one picture'): f([], [])

def test_bad_settings_and_labels():
    for limit in (0, -1, 1.5):
        with pytest.raises(ConfigError, match='false positive rate'): M.PixelStream(limit=limit)
        with pytest.raises(ConfigError, match='false positive rate'): M.pixel_pro(*world(), limit=limit)
    with pytest.raises(ConfigError, match='connectivity'): M.pixel_pro(*world(), connectivity=6)
    with pytest.raises(ConfigError, match='found -1'): M.image_auroc([.1, .2], [0, -1])
    with pytest.raises(ConfigError, match='2 scores and 1 labels'): M.image_auroc([.1, .2], [0])
    with pytest.raises(ConfigError, match='at least one picture'): M.image_auroc([], [])
    with pytest.raises(PictureError, match='picture 1'): M.image_auroc([.1, np.nan], [0, 1])

def test_a_refused_batch_leaves_no_trace():
    s = M.PixelStream()
    with pytest.raises(PictureError, match='b.png'): s.update([ok, ok*np.nan], [none, none], names=['a.png', 'b.png'])
    assert s.pictures == s.nbytes == 0

def test_import_is_light():
    code = 'import sys, zsad_nb.metrics; print([m for m in ("torch", "scipy", "sklearn", "pandas", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
