"""AnoVL against the authors' own modules (fixtures/anovl.safetensors), and what must hold on any backbone."""
import hashlib
import numpy as np, pytest, torch
from dataclasses import replace
from zsad_nb.anovl import AnoVL, AnoVLConfig, views, warp
from zsad_nb.backbones import Backbone, load_backbone
from zsad_nb.prompts import mean_text, state_prompts
from zsad_nb.scoring import box_mean, contrast, cosine, two_class, upsample
from zsad_nb.surgery import ValueStream
from zsad_nb.text import TextTower
from zsad_nb.trunk import OpenClipTrunk
from zsad_nb.types import ConfigError, shared_dir

SHARED = shared_dir()
needs_shared = pytest.mark.skipif(SHARED is None, reason='the papers\' fixtures (../shared) are not at hand')
PARTS = ('parts_by_layer', 'parts_by_prompt', 'parts_by_state')

def close(a, b, atol=1e-5, rtol=1e-4): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=rtol)

class FixtureTokens:
    "Looks our sentences up among the fixture's: an unknown sentence or another order would fail"
    def __init__(self, fix):
        self.rows = {}
        for name in ('bottle', 'carpet'):
            for side in ('normal', 'abnormal'): self.rows |= dict(zip(state_prompts(name).side(side), fix[f'in/text_tokens/{name}/{side}']))
    def __call__(self, strings): return torch.stack([self.rows[s] for s in strings])

@pytest.fixture(scope='module')
def fix():
    from safetensors.torch import load_file
    return load_file(SHARED/'fixtures'/'anovl.safetensors')

@pytest.fixture(scope='module')
def backbone(fix):
    import open_clip
    model = open_clip.CLIP(32, dict(image_size=64, layers=4, width=64, patch_size=16, head_width=16), dict(context_length=16, vocab_size=96, width=32, heads=2, layers=2))
    state = {k[6:]: v for k, v in fix.items() if k.startswith('param/') and not k.startswith('param/tta')}
    model.load_state_dict(state)
    return Backbone('fixture', OpenClipTrunk(model.visual), TextTower(model, FixtureTokens(fix)), 64, (0.,)*3, (1.,)*3)

@pytest.fixture(scope='module')
def anovl(backbone): return AnoVL(backbone=backbone)

def given(detector, fix, **cfg): # the same detector with the fixture's own text directions
    d = AnoVL(replace(detector.cfg, **cfg), detector.backbone)
    d.text = lambda names: fix['in/given_text_features'].T
    return d

@needs_shared
def test_features(anovl, fix):
    f = anovl.features(fix['in/image'], keep_parts=True)
    close(f.cls, fix['out/features'][:, 0]); close(f.cls, fix['out/clip/class_embedding'])
    close(f.patches, fix['out/features'][:, 1:]); close(f.patches, fix['out/patch_embeddings'])
    close(f.final, fix['out/vv/layer_4_tokens'][:, 1:])
    close(f.parts['tokens'], fix['out/ln_pre_tokens'][:, 1:])

@needs_shared
def test_stream_layer_by_layer(backbone, fix):
    stream = ValueStream('vv')
    tokens = backbone.trunk(fix['in/image'], watch=stream)
    for l in range(1, 5):
        close(stream.taps[l], fix[f'out/vv/layer_{l}_tokens'])
        close(tokens.patches[l], fix[f'out/clip/layer_{l}_tokens'][:, 1:])

@needs_shared
def test_plain_patches(anovl, fix):
    f = AnoVL(AnoVLConfig(attention='qk'), anovl.backbone).features(fix['in/image'])
    close(f.patches, fix['out/clip/projected_tokens'][:, 1:]); close(f.cls, fix['out/clip/class_embedding'])

@needs_shared
def test_text(anovl, fix):
    for name in ('bottle', 'carpet'):
        prompts, features = anovl.sentence_features(name)
        close(anovl.text([name]).T, fix[f'out/text_mean/{name}'])
        unit = torch.nn.functional.normalize(features, dim=-1)
        close(torch.stack([unit[:462], unit[462:]], -1), fix[f'out/text_each/{name}'])
    close(anovl.sentence_features('bottle')[1][:462], fix['out/text_raw/bottle/normal'])
    close(anovl.text(['bottle', 'carpet'])[1].T, fix['out/text_mean/carpet'])

@needs_shared
def test_unit_mean_differs_as_noted(anovl, fix):
    prompts, features = anovl.sentence_features('bottle')
    unit = mean_text(features, prompts.abnormal_rows, 'unit').T
    assert 1e-4 < (unit - fix['out/text_mean/bottle']).abs().max() < 1e-2

@needs_shared
def test_maps(anovl, fix):
    d = given(anovl, fix)
    raw = d(fix['in/image'], 'bottle')
    _, maps = d.finish(raw, (64, 64))
    for b in range(2):
        close(raw.layer_maps[b], fix[f'out/tfa/patch_prob_{b}'])
        close(box_mean(raw.layer_maps[b], 3), fix[f'out/tfa/patch_prob_pooled_{b}'])
        close(maps[b:b+1], fix[f'out/tfa/map_{b}'])

@needs_shared
def test_image_score_one_view(anovl, fix):
    d = given(anovl, fix)
    scores, _ = d.finish(d(fix['in/image'][:1], 'bottle'), (64, 64))
    close(scores[0], fix['out/image_score/single_view'])

@needs_shared
def test_image_score_of_the_fixtures_views(anovl, fix):
    cls = anovl.features(fix['in/image_views']).cls
    p = two_class(cosine(cls, fix['in/given_text_features'].T))
    close(p, fix['out/image_score/per_view']); close(p.mean(), fix['out/image_score/mean'])

@needs_shared
def test_our_views(anovl, fix):
    "Bit-equal for shifts and mirror; rotations sample in another order of rounding (noise pictures magnify it)"
    x = fix['in/image'][:1]
    for v, ref in zip(views(x), fix['in/image_views'], strict=True): close(v[0], ref, atol=1e-4, rtol=0)
    d = given(anovl, fix, views=22)
    scores, _ = d.finish(d(fix['in/image'], ['bottle', 'bottle']), (64, 64))
    close(scores[0], fix['out/image_score/mean'])

@needs_shared
def test_views_of_a_batch_are_views_of_each(anovl, fix):
    d = given(anovl, fix, views=22)
    both = d(fix['in/image'], 'bottle').image_logit
    close(both, torch.cat([d(x[None], 'bottle').image_logit for x in fix['in/image']]), atol=1e-6)

VARIANTS = [dict(), dict(attention='qk'), dict(vv_layers=1), dict(vv_layers=(2, 4)), dict(attention='v', vv_layers=1), dict(attention='v', vv_layers=1, residual=False), dict(vv_layers=2, residual=False), dict(attention='kk'), dict(attention='qq', vv_layers=2),
            dict(recursive=True, box=1), dict(text_mean='unit', temperature=.07, sigma=2.), dict(align_corners=False), dict(prompt_level='state'), dict(prompt_level='base')]

@needs_shared
@pytest.mark.parametrize('cfg', VARIANTS, ids=str)
def test_parts_add_up_with_random_norms(anovl, fix, cfg):
    "The fixture's layer norms and biases are random, so a forgotten one shows"
    d = AnoVL(replace(anovl.cfg, **cfg), anovl.backbone)
    raw = d(fix['in/image'], ['bottle', 'carpet'], PARTS) if cfg.get('prompt_level') is None else given(anovl, fix, **cfg)(fix['in/image'], None, ('parts_by_layer',))
    _, maps = d.finish(raw, (64, 64))
    for name, parts in raw.extras.items():
        for p, m in zip(parts, maps): np.testing.assert_allclose(p.total(), m.detach(), atol=2e-6, err_msg=name)

@pytest.fixture(scope='module')
def tiny(): return load_backbone('tiny', pretrained=False)

@pytest.mark.parametrize('cfg', VARIANTS, ids=str)
def test_parts_add_up(tiny, cfg):
    torch.manual_seed(0)
    d = AnoVL(AnoVLConfig(**cfg), tiny)
    for p in d.predict([np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)], 'bolt', extras=PARTS):
        for name in PARTS: np.testing.assert_allclose(p.extras[name].total(), p.map, atol=2e-6, err_msg=name)
        by = p.extras['parts_by_prompt']
        np.testing.assert_allclose(by.group('template').total(), p.map, atol=2e-6)
        np.testing.assert_allclose(by.group('domain').total(), p.map, atol=2e-6)
        assert len(p.extras['parts_by_state'].labels) == (2 if cfg.get('prompt_level') == 'base' else 14)

def test_backbone_untouched_and_gradients_flow_to_the_picture(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    d = AnoVL(backbone=tiny)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    raw = d(x, ['bolt', 'wood'], tuple(AnoVL.extra_names))
    (raw.layer_maps.sum() + raw.image_logit.sum()).backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in tiny.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert not d.state_dict() and not list(d.parameters())

def test_batch_and_names_do_not_mix(tiny):
    d, x = AnoVL(backbone=tiny), torch.randn(3, 3, 64, 64)
    together, names = d(x, ['bolt', 'wood', 'bolt']), ['bolt', 'wood', 'bolt']
    for i in range(3):
        alone = d(x[i:i+1], names[i])
        close(alone.layer_maps[0], together.layer_maps[i], atol=1e-6); close(alone.image_logit[0], together.image_logit[i], atol=1e-6)

def test_text_is_encoded_once_per_class(tiny, monkeypatch):
    d, calls, encode = AnoVL(backbone=tiny), [], tiny.text.encode
    monkeypatch.setattr(tiny.text, 'encode', lambda s, *a: (calls.append(len(s)), encode(s, *a))[1])
    for names in ('bolt', ['bolt', 'wood'], None, 'bolt'): d(torch.randn(2, 3, 64, 64), names)
    assert calls == [924]*3
    d.float(); d(torch.randn(1, 3, 64, 64), 'bolt'); assert calls == [924]*4   # moved: the old features may be on another device

def test_any_size(tiny):
    raw = AnoVL(backbone=tiny)(torch.randn(1, 3, 40, 72), 'bolt')
    assert raw.layer_maps.shape == (1, 1, 5, 9)
    assert AnoVL('released', tiny)(torch.randn(1, 3, 40, 72), 'bolt').image_logit.isfinite().all()

def test_presets(tiny):
    assert AnoVL(backbone=tiny).preset == 'recommended' and AnoVL('released', tiny).cfg.views == 22 and AnoVL('paper', tiny).cfg.recursive
    assert AnoVLConfig() == AnoVLConfig.from_dict(AnoVLConfig().to_dict())
    assert all(m for m in AnoVLConfig.meanings().values()), 'every field says what it means'

@pytest.mark.parametrize('bad, word', [(dict(attention='kv'), 'attention'), (dict(views=7), 'views'), (dict(text_mean='max'), 'text_mean'), (dict(temperature=0.), 'temperature'),
                                       (dict(domain='fabric'), 'domain'), (dict(prompt_level='all'), 'prompt_level'), (dict(attention='qk', recursive=True), 'plain CLIP')])
def test_bad_settings(bad, word):
    with pytest.raises(ConfigError, match=word): AnoVLConfig(**bad)

def test_no_text_tower():
    backbone = load_backbone('tiny', pretrained=False); backbone.text = None
    with pytest.raises(ConfigError, match='no text tower'): AnoVL(backbone=backbone)

def test_sentences_have_not_changed():
    digest = lambda n: hashlib.sha256('\n'.join(state_prompts(n).texts).encode()).hexdigest()[:16]
    assert [len(state_prompts(n).side(s)) for n in ('bottle', 'carpet') for s in ('normal', 'abnormal')] == [462]*4
    assert (digest('bottle'), digest('carpet')) == ('b22261ae79d1b718', '434321641728c210')
