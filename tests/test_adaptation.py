"""Test-time adaptation against the authors' own modules (fixtures/anovl.safetensors), and what must hold for any batch."""
import numpy as np, pytest, torch
from dataclasses import replace
from torch.nn import functional as F
from zsad_nb.adaptation import PAPER, RELEASED, RELEASED_VISA, AdaptConfig, Adapter, adapted, losses
from zsad_nb.anovl import AnoVL, AnoVLConfig
from zsad_nb.backbones import load_backbone
from zsad_nb.scoring import box_mean, to_grid, upsample
from zsad_nb.types import ConfigError, shared_dir

SHARED = shared_dir()
needs_shared = pytest.mark.skipif(SHARED is None, reason='the papers\' fixtures (../shared) are not at hand')

def close(a, b, atol=1e-5, rtol=1e-4): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=rtol)

@pytest.fixture(scope='module')
def fix():
    from safetensors.torch import load_file
    return load_file(SHARED/'fixtures'/'anovl.safetensors')

class Given(Adapter):
    "An adapter with the fixture's weights and noise in the place of its own draws"
    def __init__(self, fix, weights, tokens, noise, moments=None):
        self.noises = [fix[k].view(16, 32) for k in noise]
        super().__init__(fix[tokens].view(1, 16, 32), fix['in/tta/text_embeddings'], fix['in/given_text_features'].T, AdaptConfig(**RELEASED), moments=moments)
        for w, k in zip(self.weights, weights): w.copy_(fix[k][None])
    def noisy(self, clean): return self(self.patches + self.noises[len(self.log)])

def first(fix): return Given(fix, ('param/tta/ad.weight', 'param/tta/ad.bias'), 'in/tta/tokens', [f'in/tta/noise_{s}' for s in range(5)])
def second(fix, moments=None): return Given(fix, ('in/tta2/weight_reset', 'in/tta2/bias_reset'), 'in/tta2/tokens', ['in/tta2/noise_0'], moments)

@needs_shared
def test_outputs_losses_gradients_before_the_first_step(fix):
    a = first(fix)
    clean, noisy = a(a.patches), a.noisy(None)
    close(torch.cat([clean, noisy]).view(2, 4, 4, 32), fix['out/tta/train_adapted_step0'])
    close(clean.view(1, 4, 4, 32), fix['out/tta/test_adapted_before'])
    for i, t in enumerate((clean, noisy)): close(a.logit(t).sigmoid().view(4, 4), fix['out/tta/probs_step0'][i, ..., 1])
    for w in a.weights: w.requires_grad_()
    gw, gb = torch.autograd.grad(a.loss().sum(), a.weights)
    close(gw[0], fix['out/tta/grad_weight_step0'], atol=1e-7); close(gb[0], fix['out/tta/grad_bias_step0'], atol=1e-7)

@needs_shared
def test_five_steps(fix):
    a, finish = first(fix), lambda a: upsample(box_mean(to_grid(a.logit(a(a.patches)).sigmoid(), (4, 4)), 3), (64, 64), True)
    close(finish(a), fix['out/tta/map_before'])
    for s in range(5):
        a.run(1)
        d, p = a.log[s][0]
        close(2*d, fix[f'out/tta/loss_discriminative_{s}']); close(p, fix[f'out/tta/loss_entropy_{s}']); close(d + p, fix[f'out/tta/loss_{s}'])
        if s in (0, 4):
            close(a.weights[0][0], fix[f'out/tta/weight_after_{s+1}'], atol=5e-5); close(a.weights[1][0], fix[f'out/tta/bias_after_{s+1}'], atol=5e-5)
            close(a(a.patches).view(1, 4, 4, 32), fix[f'out/tta/test_adapted_after_{s+1}'])
            close(finish(a), fix[f'out/tta/map_after_{s+1}'])

@needs_shared
def test_second_picture_with_carried_and_with_fresh_optimiser(fix):
    state = first(fix).run(5).moments()
    for name, moments in (('carried', state), ('fresh', None)):
        a = second(fix, moments).run(1)
        close(a.log[0].sum(), fix['out/tta2/loss_0'])
        close(a.weights[0][0], fix[f'out/tta2/weight_after_1_{name}_state'], atol=5e-5); close(a.weights[1][0], fix[f'out/tta2/bias_after_1_{name}_state'], atol=5e-5)

@needs_shared
def test_adapter_of_the_visa_script(fix):
    cfg, w = AdaptConfig(**RELEASED_VISA), [fix['param/tta_visa/ad.weight'][None], fix['param/tta_visa/ad.bias'][None]]
    close(adapted(fix['in/tta/tokens'].view(1, 16, 32), w, None, cfg).view(1, 4, 4, 32), fix['out/tta_visa/test_adapted'])

@needs_shared
def test_paper_equations_by_hand(fix):
    "The fixture holds no run of the paper's text, so its three equations are written out once more"
    P, T, t = fix['in/tta/tokens'].view(16, 32), fix['in/tta/text_embeddings'], fix['in/given_text_features']
    S = lambda p: (F.normalize(p, dim=-1)@t).softmax(-1)[:, 1]
    w = T.clone().requires_grad_(); draw = torch.Generator().manual_seed(3)
    opt = torch.optim.AdamW([w], lr=.001)
    for _ in range(5):
        P1 = (P@w.T).softmax(-1)@T + P
        loss = -(torch.log(1 - S(P1)) + torch.log(S(P1 + .055*torch.randn(16, 32, generator=draw)))).sum()/32 - (S(P)*torch.log(S(P1))).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    a = Adapter(P[None], T, t.T, AdaptConfig(seed=3, **PAPER)).run(5)
    close(a.log[-1].sum(), loss.detach()); close(a.weights[0][0], w.detach(), atol=5e-5)

def world(b=4, n=9, e=16, k=6):
    g = torch.Generator().manual_seed(1)
    r = lambda *s: torch.randn(*s, generator=g)
    return 5*r(b, n, e), r(b, k, e), F.normalize(r(b, 2, e), dim=-1)

FORMS = dict(recommended={}, paper=PAPER, released=RELEASED, visa=RELEASED_VISA, entropy=dict(pseudo='entropy', lr=.01), probe=dict(start='random', bias=True))

@pytest.mark.parametrize('form', FORMS)
def test_neither_batch_nor_order_matters(form):
    cfg, (P, T, t) = AdaptConfig(adapt=5, **FORMS[form]), world()
    both = Adapter(P, T, t, cfg).run(5)
    order = torch.tensor([2, 0, 3, 1])
    close(Adapter(P[order], T[order], t[order], cfg).run(5)(P[order]), both(P)[order], atol=1e-6)
    for i in range(4):
        alone = Adapter(P[i:i+1], T[i], t[i], cfg).run(5)
        close(alone(P[i:i+1])[0], both(P)[i], atol=1e-6); close(torch.stack(alone.log)[:, 0], torch.stack(both.log)[:, i], atol=1e-6)

def test_the_same_seed_gives_the_same_and_another_another():
    P, T, t = world()
    run = lambda seed: Adapter(P, T, t, AdaptConfig(seed=seed, **RELEASED)).run(3)(P)
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    torch.manual_seed(5); a = torch.rand(3); torch.manual_seed(5); run(0)
    assert torch.equal(torch.rand(3), a), 'the global generator is left alone'

def test_few_steps_are_the_beginning_of_many():
    P, T, t = world()
    few, many = (Adapter(P, T, t, AdaptConfig(**RELEASED)).run(n) for n in (3, 8))
    close(torch.stack(few.path), torch.stack(many.path)[:3], atol=1e-6)

def test_the_input_is_not_touched_and_gets_no_gradient():
    P, T, t = world()
    P.requires_grad_(); kept = P.detach().clone()
    a = Adapter(P, T, t, AdaptConfig(**RELEASED)).run(3)
    assert P.grad is None and torch.equal(P, kept) and not any(w.requires_grad for w in a.weights)
    a(P).sum().backward(); assert P.grad.abs().max() > 0   # but the picture can be differentiated through the finished adapter

def test_losses_switched_off():
    P, T, t = world()
    one = lambda **c: Adapter(P, T, t, AdaptConfig(lr=.05, **c)).run(4)(P)
    assert not torch.allclose(one(loss_d=False), one(loss_p=False)) and not torch.allclose(one(loss_d=False), one())

def test_losses_do_not_overflow():
    z = torch.tensor([[1e4, -1e4]]).requires_grad_()
    for pseudo in ('tfa', 'entropy'):
        total = sum(v.sum() for v in losses(z, -z, z, pseudo)); total.backward()
        assert total.isfinite() and z.grad.isfinite().all()

# ---- inside the detector

@pytest.fixture(scope='module')
def tiny(): return load_backbone('tiny', pretrained=False)

def detector(tiny, **cfg): return AnoVL(AnoVLConfig(adapt=3, prompt_level='state', lr=.02, **cfg), tiny)

FORM = dict(recommended={}, released=RELEASED, visa=RELEASED_VISA)

@pytest.mark.parametrize('form', FORM)
def test_map_changes_and_image_score_does_not(tiny, form):
    x, d = torch.randn(3, 3, 64, 64), detector(tiny, **FORM[form])
    before, after = d.variant(adapt=0)(x, 'bolt'), d(x, 'bolt')
    assert torch.equal(before.image_logit, after.image_logit) and (before.layer_maps - after.layer_maps).abs().max() > 1e-5

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_gradient_mode(tiny, mode):
    x, d = torch.randn(2, 3, 64, 64), detector(tiny, **RELEASED)
    d.text(['bolt'])
    with mode(): a = d(x, ['bolt', 'wood']).layer_maps
    close(a.detach().clone(), d(x, ['bolt', 'wood']).layer_maps.detach(), atol=1e-6)

def test_backbone_untouched(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    d, x = detector(tiny, **RELEASED), torch.randn(2, 3, 64, 64, requires_grad=True)
    plain = tiny.trunk(x.detach()).cls
    d(x, 'bolt', tuple(AnoVL.extra_names)).layer_maps.sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None and not p.requires_grad for p in tiny.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items()) and torch.equal(tiny.trunk(x.detach()).cls, plain)
    assert not d.state_dict() and not list(d.parameters())

@pytest.mark.parametrize('form', FORM)
def test_predict_does_not_depend_on_batch_or_order(tiny, form):
    pics = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(5)]
    names, d = ['bolt', 'wood', 'bolt', 'cork', 'wood'], detector(tiny, **FORM[form])
    one = d.predict(pics, names, batch_size=5, progress=False)
    for other in (d.predict(pics, names, batch_size=2, progress=False), d.predict(pics[::-1], names[::-1], batch_size=3, progress=False)[::-1]):
        for p, q in zip(one, other): close(p.map, q.map, atol=1e-5); close(p.score, q.score, atol=1e-6)

def test_carried_state_lives_for_one_run(tiny):
    pics = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(4)]
    d = detector(tiny, **RELEASED, carry_optimizer_state=True); fresh = d.variant(carry_optimizer_state=False)
    a, b = (d.predict(pics, 'bolt', batch_size=n, progress=False) for n in (4, 1))
    for p, q in zip(a, b): close(p.map, q.map, atol=1e-5)                                    # the batch size does not matter
    alone = fresh.predict(pics, 'bolt', progress=False)
    close(a[0].map, alone[0].map, atol=1e-5); assert np.abs(a[1].map - alone[1].map).max() > 1e-5  # only the first picture starts afresh
    close(d.predict(pics[::-1], 'bolt', progress=False)[0].map, alone[3].map, atol=1e-5)     # nothing leaked from the runs before
    mixed = d.predict(pics[:2], ['bolt', 'wood'], progress=False)
    close(mixed[1].map, fresh.predict(pics[1], 'wood', progress=False)[0].map, atol=1e-5)    # each class keeps its own
    d.carried = {}
    d.predict(pics[0], 'bolt', progress=False); assert list(d.carried) == ['bolt']
    close(d.predict(pics[1], 'bolt', progress=False)[0].map, a[1].map, atol=1e-5)            # unless asked

@pytest.mark.parametrize('cfg', [{}, PAPER, RELEASED, RELEASED_VISA, dict(RELEASED, carry_optimizer_state=True), dict(attention='qk'), dict(residual=False, vv_layers=2)], ids=str)
def test_parts_still_add_up(tiny, cfg):
    asked = ('parts_by_layer', 'parts_by_prompt', 'parts_by_state', 'map_by_step', 'loss_by_step')
    d = detector(tiny, **cfg)
    for p in d.predict([np.random.default_rng(i).integers(0, 256, (64, 72, 3), np.uint8) for i in range(2)], ['bolt', 'wood'], extras=asked, progress=False):
        for name in asked[:3]: np.testing.assert_allclose(p.extras[name].total(), p.map, atol=2e-6, err_msg=name)
        assert p.extras['parts_by_layer'].labels[-1] == {'block': 'adapter'} and p.extras['map_by_step'].shape[0] == 5 and p.extras['loss_by_step'].shape == (3, 2)
        close(p.extras['map_by_step'][-1], p.layer_maps[0], atol=1e-6)

def test_presets():
    for name, twin in (('paper', 'paper_tta'), ('released', 'released_tta')):
        assert replace(AnoVL.presets[name], adapt=5) == AnoVL.presets[twin]
    assert AnoVL.presets['recommended'].adapt == AnoVL.presets['paper'].adapt == AnoVL.presets['released'].adapt == 0
    assert AnoVL.presets['paper_tta'].activation == 'softmax' and AnoVL.presets['released_tta'].activation == 'tanh'

@pytest.mark.parametrize('bad, word', [(dict(adapt=-1), 'adapt must be'), (dict(activation='relu'), 'activation'), (dict(adapter='linear'), 'knows no text'),
                                       (dict(loss_d=False, loss_p=False), 'nothing to adapt'), (dict(seed=.5), 'seed'), (dict(noise_std=-1.), 'noise_std')])
def test_bad_settings(bad, word):
    with pytest.raises(ConfigError, match=word): AnoVLConfig(**bad)

def test_half_precision(tiny):
    import copy
    d = AnoVL(AnoVLConfig(adapt=2, prompt_level='base', **RELEASED), copy.deepcopy(tiny)).to(torch.bfloat16)
    assert d(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16), 'bolt').layer_maps.isfinite().all()

# ---- beside the paper

def test_compare_takes_the_rows_of_the_adapted_method(tiny):
    from zsad_nb.benchmark import compare, evaluate
    from zsad_nb.datasets import Synthetic
    for preset, auroc in (('paper', 86.6), ('paper_tta', 90.6)):
        d = AnoVL(preset, tiny).variant(seed=4); assert d.preset == preset
        t = compare(evaluate(d, Synthetic('target', categories=['tile']), limit=2, progress=False))
        row = t[(t.dataset == 'MVTec AD') & (t.level == 'pixel') & (t.metric == 'AUROC')]
        assert row.paper.tolist() == [auroc] and 'preset' not in row.not_the_same.iloc[0]

def test_eval_with_adapt(capsys):
    import json
    from zsad_nb.cli import main
    words = ['eval', '--data', 'synthetic', '--categories', 'tile', '--limit', '4', '--quiet', '--json', '--adapt', '2']
    assert main(words) == 0 and json.loads(capsys.readouterr().out)['config']['detector']['config']['adapt'] == 2
    assert main([*words, '--preset', 'paper', '--seeds', '2']) == 0
    runs = json.loads(capsys.readouterr().out)['runs']
    assert [(r['config']['detector']['config']['adapt'], r['config']['detector']['config']['seed']) for r in runs] == [(2, 0), (2, 1)]
    assert main([*words[:-1], '-3']) == 2 and 'whole number from 0' in capsys.readouterr().out
