"VisualAD against the authors' own modules, on backbones of all providers, in and out of files, and refusing what does not fit"
import math
from dataclasses import replace
import numpy as np
import pytest
import torch
from fastcore.test import test_close as close, test_eq as same
from zsad_nb.backbones import Backbone, load_backbone
from zsad_nb.detector import Detector
from zsad_nb.scoring import gaussian, pool_top, upsample
from zsad_nb.trunk import OpenClipTrunk
from zsad_nb.types import ConfigError, WeightsError, shared_dir
from zsad_nb.visualad import PLACES, VisualAD, VisualADConfig, released_state, tapped

TAPS = (1, 2, 3, 4)

@pytest.fixture(scope='module')
def ref():
    from safetensors.torch import load_file
    shared = shared_dir()
    if shared is None or not (shared/'fixtures/visualad.safetensors').is_file(): pytest.skip('no shared fixtures: the authors\' outputs are not here')
    return load_file(shared/'fixtures/visualad.safetensors')

def toy_backbone(ref):
    "The fixture's vision transformer: width 64, 4 blocks, patch 14, made for 56 px"
    from open_clip.transformer import VisionTransformer
    from open_clip.model import QuickGELU
    from open_clip.transformer import LayerNorm
    visual = VisionTransformer(image_size=56, patch_size=14, width=64, layers=4, heads=1, mlp_ratio=4., output_dim=48, act_layer=QuickGELU, norm_layer=LayerNorm)
    strip = {k[len('param/visual.'):]: v for k, v in ref.items() if k.startswith('param/visual.')}
    strip['positional_embedding'] = strip.pop('positional_embedding_frozen')
    strip['proj'] = ref['in/clip.visual.proj_unused']
    visual.load_state_dict({k: v for k, v in strip.items() if k not in ('anomaly_token', 'normal_token', 'anomaly_pos', 'normal_pos')})
    return Backbone('toy', OpenClipTrunk(visual), None, 70, (.5,)*3, (.5,)*3)

def checkpoint(ref, **changes):
    "The fixture's head in the layout in which the authors publish theirs"
    part = lambda head: {k[len(head):]: v for k, v in ref.items() if k.startswith(head)}
    return dict(anomaly_token=ref['param/visual.anomaly_token'], normal_token=ref['param/visual.normal_token'],
        ln_post_weight=ref['param/visual.ln_post.weight'], ln_post_bias=ref['param/visual.ln_post.bias'], features_list=list(TAPS), image_size=70, epoch=2,
        backbone='toy', transform_type='mlp', layer_transforms={f'layer_{l}': part(f'param/layer_transforms.layer_{l}.') for l in TAPS},
        cross_attn=part('param/cross_attn.'), cross_attn_config=dict(num_anchors=4, dropout=.1, res_scale_init=.01)) | changes

@pytest.fixture(scope='module')
def toy(ref):
    v = VisualAD(VisualADConfig(image_size=70, layers=TAPS, dropout=0.), toy_backbone(ref))
    v.load_state_dict(released_state(checkpoint(ref), 25))
    return v.eval()

def test_sequence_and_blocks(ref, toy):
    "VisualAD eq. 1: the same tokens with the same positions; ours stand behind the patches"
    trunk, x = toy.backbone.trunk, ref['in/image']
    back = lambda y: torch.cat([y[:, -1:], y[:, -2:-1], y[:, :-2]], 1)           # to the authors' order: anomaly, normal, class, patches
    embedded, _ = trunk.embed(x, 'bilinear')
    close(back(toy.insert(embedded, 0)), ref['out/embed_sequence'], eps=1e-5)
    seen = {}
    trunk(x, TAPS, toy.insert, lambda step, x, layer: seen.update({layer: x}), 'bilinear')
    close(back(seen[1]), ref['out/ln_pre'], eps=1e-5)
    for l in (1, 2, 3): close(back(seen[l+1]), ref[f'out/block_{l}'], eps=1e-5)

def test_taps_sca_saf_maps(ref, toy):
    with torch.no_grad(): w = toy.walk(ref['in/image'])
    tokens = toy.backbone.trunk(ref['in/image'], TAPS, toy.insert, positions='bilinear').normed()
    close(tokens.extra[4][:, 0], ref['out/normal_features'], eps=1e-5)
    close(tokens.extra[4][:, 1], ref['out/anomaly_features'], eps=1e-5)
    close(tokens.cls, ref['out/class_features'], eps=1e-5)
    for i, l in enumerate(TAPS):
        close(tokens.patches[l], ref[f'out/patch_tokens_layer_{l}'], eps=1e-5)
        sca, look = toy.sca[str(l)], w.looks[l]
        close(sca.query_norm(sca.query(sca.anchors)), ref[f'out/sca_query_layer_{l}'], eps=1e-5)
        close(look['anchors'], ref[f'out/sca_attention_layer_{l}'], eps=1e-5)
        close(look['found'], ref[f'out/sca_anchor_features_layer_{l}'], eps=1e-5)
        for j, side in enumerate(('normal', 'anomaly')):
            close(look['gates'][:, j], ref[f'out/sca_gate_{side}_layer_{l}'], eps=1e-5)
            close(w.tokens[l][:, j], ref[f'out/sca_{side}_token_layer_{l}'], eps=1e-5)
        close(w.patches[l], ref[f'out/saf_patches_layer_{l}'], eps=1e-5)
        close(w.maps[:, i], ref[f'out/patch_scores_layer_{l}'], eps=1e-5)
        close(upsample(w.maps[:, i], (70, 70)), ref[f'out/map_layer_{l}'], eps=1e-5)

def test_maps_and_scores(ref, toy):
    with torch.no_grad(): raw = toy(ref['in/image'])
    scores, maps = toy.finish(raw, (70, 70))
    close(raw.image_logit, ref['out/image_score_train'], eps=1e-5)
    close(maps, ref['out/map_fused_gaussian_sigma4'], eps=1e-5)
    close(scores.logit(), ref['out/image_score_test'], eps=2e-5)
    close(toy.variant(sigma=0.).finish(raw, (70, 70))[1], ref['out/map_fused'], eps=1e-5)
    crop = maps[:, :69, :69]
    close(toy.pool(crop), ref['out/crop69_image_score_ceil48'], eps=1e-5)
    close(toy.variant(rounding='floor').pool(crop), ref['out/crop69_image_score_floor47'], eps=1e-5)

def test_losses_and_gradients(ref, toy):
    batch = dict(images=ref['in/image'], labels=ref['in/label'].float(), masks=ref['in/mask'].float(), has_mask=torch.tensor([True, True]))
    toy.train()
    try:
        terms = toy.losses(batch)
        close(terms['image'], ref['out/loss_cls'][0], eps=1e-5)
        close(terms['focal'] + terms['dice'], ref['out/loss_seg'][0], eps=1e-5)
        close(terms['margin'], ref['out/loss_ctr'][0], eps=1e-5)
        total = sum(terms.values())
        close(total, ref['out/loss_total'][0], eps=1e-5)
        mine = {'visual.anomaly_token': toy.anomaly, 'visual.normal_token': toy.normal, 'visual.ln_post.weight': toy.norm.weight,
                'layer_transforms.layer_1.mlp.0.weight': toy.saf['1'][0].weight, 'cross_attn.layer_attentions.layer_4.anchor_queries': toy.sca['4'].anchors,
                'cross_attn.layer_attentions.layer_4.res_scale': toy.sca['4'].alpha}
        for (name, _), g in zip(mine.items(), torch.autograd.grad(total, list(mine.values()))): close(g, ref[f'grad/{name}'], eps=1e-5)
    finally: toy.eval()

def batch_for(v, n=2):
    torch.manual_seed(0)
    x = torch.randn(n, 3, *v.input_size)
    return dict(images=x, labels=torch.arange(n).float() % 2, masks=(x[:, 0] > 1).float(), has_mask=torch.ones(n, dtype=torch.bool))

def test_paper_form_is_the_papers_formula():
    "VisualAD eq. 2 to eq. 5 as written: raw anchors, raw patches, no norms, a gate without bias"
    torch.manual_seed(1)
    v = VisualAD('paper')
    sca, P, t = v.sca['6'], torch.randn(2, 256, 128), torch.randn(2, 2, 128)
    A = ((sca.anchors@(P + sca.places((16, 16))).mT)/math.sqrt(128)).softmax(-1)
    g = (t@sca.gate.weight.T).sigmoid()
    close(sca(P, t, (16, 16))[0], t + sca.alpha*torch.einsum('bkm,bmd->bkd', g, A@P), eps=1e-6)
    same([n for n, _ in sca.named_parameters()], ['anchors', 'alpha', 'places.table', 'gate.weight'])

def test_value_after_the_average():
    "Projecting the averages is projecting all patches and then averaging"
    torch.manual_seed(1)
    sca, P = VisualAD('released').eval().sca['3'], torch.randn(2, 256, 128)
    weights, found = sca.attend(P, (16, 16))
    close(found, weights@sca.value(P), eps=1e-5)

@pytest.mark.parametrize('places', PLACES)
def test_places_at_any_size(places):
    "Six ways to know places; made for one grid, they go with every other and stay as they were"
    torch.manual_seed(0)
    v = VisualAD(VisualADConfig(places=places)).eval()
    before = {k: x.clone() for k, x in v.state_dict().items()}
    for size, grid in (((128, 128), (16, 16)), ((64, 192), (8, 24)), ((8, 8), (1, 1))):
        raw = v(torch.randn(1, 3, *size), extras=['anchors'])
        same(tuple(raw.layer_maps.shape), (1, 4, *grid))
        close(raw.extras['anchors'].sum((-2, -1)), torch.ones(1, 4, 4), eps=1e-5)
    for k, x in v.state_dict().items(): same(x, before[k])
    v.train(); sum(v.losses(batch_for(v)).values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in v.parameters())

def test_relative_bias_depends_on_the_offset_alone():
    v = VisualAD(VisualADConfig(places='relative-2d', anchors=4))
    p = v.sca['3'].places
    torch.nn.init.normal_(p.offsets)
    bias, (a, b) = p.bias((16, 16)).detach().unflatten(1, (16, 16)), p.homes[[0, 3]]
    for step in ((0, 0), (2, -3), (-4, 1)): same(bias[0][tuple(a + torch.tensor(step))], bias[3][tuple(b + torch.tensor(step))])

@pytest.mark.parametrize('name,size', [('tiny', 64), ('dinov2-small', 56), ('dinov2-small-reg', 56), ('timm/deit_tiny_patch16_224', 64)])
def test_any_backbone_learns_and_stays_untouched(name, size):
    "Forward and backward on every provider; weights and plain output of the backbone are bit-identical afterwards"
    if name.startswith('dinov2'): pytest.importorskip('transformers')
    torch.manual_seed(0)
    backbone = load_backbone(name, pretrained=False)
    v = VisualAD(VisualADConfig(image_size=size), backbone)
    batch = batch_for(v)
    weights, plain = backbone.fingerprint(), backbone.trunk(batch['images'], layers=2)
    v.train(); sum(v.losses(batch).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in v.named_parameters() if n in ('anomaly', 'normal') or 'saf' in n)
    assert all(p.grad is None for p in backbone.parameters())
    same(backbone.fingerprint(), weights)
    again = backbone.trunk(batch['images'], layers=2)
    for l in plain.patches: same(again.patches[l], plain.patches[l])

def test_recomputing_gives_the_same_gradients():
    torch.manual_seed(0)
    v = VisualAD(VisualADConfig(dropout=0.))
    v.train()
    grads = []
    for v.checkpointing in (False, True):
        v.zero_grad(); sum(v.losses(batch_for(v)).values()).backward()
        grads.append([p.grad.clone() for p in v.parameters()])
    for a, b in zip(*grads): same(a, b)

def test_switches_change_what_they_name():
    v = lambda **k: VisualAD(VisualADConfig(**k))
    names = lambda d: {n.split('.')[0] for n, _ in d.named_parameters()}
    same(names(v()), {'normal', 'anomaly', 'sca', 'saf', 'norm'})
    same(names(v(sca=False, saf=False, train_norm=False)), {'normal', 'anomaly'})
    same(names(v(token_place='trained', train_norm=False)), {'normal', 'anomaly', 'place', 'sca', 'saf'})
    same(v(layers=(6,)).taps, (6,)); same(v(layers=2).taps, (11, 12)); same(tapped('quarters', 24), (6, 12, 18, 24)); same(tapped('quarters', 3), (1, 2, 3))
    same(v(anchors=7).sca['3'].anchors.shape, (7, 128))
    d = v(focal=False, dice=False, margin=None)
    same(list(d.losses(batch_for(d))), ['image'])
    d = v(); b = batch_for(d); b['has_mask'][:] = False
    same(list(d.losses(b)), ['image', 'margin'])

def test_trained_norm_is_dropped_or_restored():
    "Released: trained along, forgotten afterwards; restore_norm=True keeps it"
    torch.manual_seed(0)
    x, out = torch.randn(1, 3, 128, 128), {}
    for restore in (False, True):
        v = VisualAD(VisualADConfig(restore_norm=restore)).eval()
        torch.manual_seed(1)
        for p in v.parameters(): torch.nn.init.normal_(p, std=.05)
        out[restore] = v(x).layer_maps
        torch.nn.init.ones_(v.norm.weight)
        assert torch.equal(v(x).layer_maps, out[restore]) != restore
    assert not torch.equal(out[False], out[True])

@pytest.mark.parametrize('wrong,says', [(dict(places='round'), 'places'), (dict(anchors=0), 'anchors'), (dict(layers='all'), 'quarters'), (dict(restore_norm=True, train_norm=False), 'train_norm'), (dict(dropout=2.), 'dropout'), (dict(token='first'), 'token')])
def test_settings_that_mean_nothing(wrong, says):
    with pytest.raises(ConfigError, match=says): VisualADConfig(**wrong)

def test_layers_the_trunk_does_not_have():
    with pytest.raises(ConfigError, match='no block 24'): VisualAD(VisualADConfig(layers=(6, 24)))

# --- files ---

def released(ref, tmp_path, name='ViT-L/14@336px', **changes):
    path = tmp_path/'CLIP.pth'
    torch.save(checkpoint(ref, backbone=name, **changes), path)
    return path

def renamed(ref):
    b = toy_backbone(ref); b.name = 'ViT-L-14-336'
    return b

def test_from_released(ref, toy, tmp_path):
    v = VisualAD.from_released(released(ref, tmp_path), renamed(ref)).eval()
    with torch.no_grad(): scores, maps = v.finish(v(ref['in/image']), (70, 70))
    close(maps, ref['out/map_fused_gaussian_sigma4'], eps=1e-5)
    close(scores.logit(), ref['out/image_score_test'], eps=2e-5)
    same(v.preset, 'released'); same(v.taps, TAPS); same(v.cfg.image_size, 70)
    back = VisualAD.from_pretrained(v.save_pretrained(tmp_path/'saved'), renamed(ref)).eval()
    with torch.no_grad(): same(back(ref['in/image']).layer_maps, v(ref['in/image']).layer_maps)
    assert 'CLIP.pth' in (tmp_path/'saved/README.md').read_text()
    told = VisualAD.from_released(released(ref, tmp_path), renamed(ref), auxiliary='visa').training_record
    same((told['data'], len(told['categories'])), ('VisA', 12))

class _Code:
    def __reduce__(self): return (print, ('this must never run',))

def test_from_released_refuses(ref, tmp_path, capsys):
    with pytest.raises(ConfigError, match='ViT-L-14-336'): VisualAD.from_released(released(ref, tmp_path), 'tiny')
    with pytest.raises(ConfigError, match='taps blocks'): VisualAD.from_released(released(ref, tmp_path, features_list=[6, 12, 18, 24]), renamed(ref))
    with pytest.raises(WeightsError, match='does not fit'): VisualAD.from_released(released(ref, tmp_path, anomaly_token=torch.zeros(32)), renamed(ref))
    with pytest.raises(WeightsError, match='released layout'): VisualAD.from_released(released(ref, tmp_path, layer_transforms={'layer_1': {}}), renamed(ref))
    with pytest.raises(WeightsError, match='does not fit'): VisualAD.from_released(released(ref, tmp_path, features_list=[]), renamed(ref))
    with pytest.raises(WeightsError, match='no such file'): VisualAD.from_released(tmp_path/'nowhere.pth')
    torch.save(dict(state=torch.zeros(1)), tmp_path/'other.pth')
    with pytest.raises(WeightsError, match='names no backbone'): VisualAD.from_released(tmp_path/'other.pth')
    torch.save(dict(backbone=_Code()), tmp_path/'code.pth')
    with pytest.raises(WeightsError, match='could run code'): VisualAD.from_released(tmp_path/'code.pth')
    assert 'never run' not in capsys.readouterr().out

def test_released_layout_at_full_size(tmp_path):
    "A file of the published shapes: 126 MB, 31.5 M trained numbers, and every tensor finds its place"
    from open_clip.transformer import VisionTransformer
    visual = VisionTransformer(image_size=336, patch_size=14, width=1024, layers=24, heads=16, mlp_ratio=1/64, output_dim=768)   # slim blocks: only the widths matter here
    d, f = 1024, torch.zeros
    sca = lambda: {'anchor_queries': f(4, d), 'pos_encoding': f(1, 1536, d), 'res_scale': f(1), 'gate.0.weight': f(4, d), 'gate.0.bias': f(4), 'out_proj.bias': f(d),
           **{f'{n}.weight': f(d, d) for n in ('q_proj', 'k_proj', 'v_proj', 'out_proj')}, **{f'{n}.{w}': f(d) for n in ('q_norm', 'k_norm') for w in ('weight', 'bias')}}
    taps = (6, 12, 18, 24)
    file = dict(anomaly_token=f(d), normal_token=f(d), ln_post_weight=f(d), ln_post_bias=f(d), features_list=list(taps), image_size=518, epoch=2, backbone='ViT-L/14@336px',
        transform_type='mlp', layer_transforms={f'layer_{l}': {'mlp.0.weight': f(d, d), 'mlp.0.bias': f(d), 'mlp.3.weight': f(d, d), 'mlp.3.bias': f(d)} for l in taps},
        cross_attn={f'layer_attentions.layer_{l}.{k}': x for l in taps for k, x in sca().items()}, cross_attn_config=dict(num_anchors=4, dropout=.1, res_scale_init=.01))
    torch.save(file, tmp_path/'CLIP.pth')
    assert abs((tmp_path/'CLIP.pth').stat().st_size - 126_119_111) < 20_000
    v = VisualAD.from_released(tmp_path/'CLIP.pth', Backbone('ViT-L-14-336', OpenClipTrunk(visual), None, 336, (.5,)*3, (.5,)*3))
    same(sum(p.numel() for p in v.parameters()) + 4*(1536 - 1369)*d, 8_396_800 + 23_121_940 + 2*2048)
    same(v.preset, 'released')

def test_other_head_on_this_backbone(tmp_path):
    v = VisualAD('released'); v.training_record = dict(data='made up', categories=['leather'])
    v.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match='width'): VisualAD.from_pretrained(tmp_path, load_backbone('timm/deit_tiny_patch16_224', pretrained=False))
    same(Detector.from_pretrained(tmp_path).training_record['categories'], ['leather'])

# --- the shipped head and the command line ---

def test_shipped_head():
    "VisualAD() answers at once, says what it was trained on, and is not measured on that"
    from zsad_nb.benchmark import evaluate
    from zsad_nb.datasets import Synthetic
    v = VisualAD()
    same(v.preset, 'tiny'); same(v.ready, True)
    r = evaluate(v, Synthetic('target', 8, categories=['tile', 'tread_plate', 'screw']), progress=False)
    assert r.mean['image_auroc'] > .8 and r.mean['pixel_auroc'] > .9, r
    with pytest.raises(ConfigError, match='zero-shot'): evaluate(v, Synthetic('auxiliary', 2), progress=False)
    same(VisualAD(backbone=load_backbone('tiny')).ready, True)                      # the same backbone, loaded by hand
    same(VisualAD(backbone=load_backbone('tiny', pretrained=False)).ready, False)   # another one of that name

def test_half_precision_and_checkpointing_train(tmp_path):
    "bf16 and activation checkpointing change what a training costs, not what it does"
    from zsad_nb.datasets import Synthetic
    from zsad_nb.training import TrainConfig, fit
    data, ends = Synthetic('auxiliary', 4, categories=['leather', 'plug']), []
    for how in (dict(), dict(checkpointing=True), dict(precision='bf16', checkpointing=True)):
        v = VisualAD(VisualADConfig(image_size=64, dropout=0., token_lr=2e-3, lr=2e-3)).fresh(0)
        ends.append((v, fit(v, data, TrainConfig(epochs=1, **how), progress=False).last()['total']))
        same(v.checkpointing, False)
    for a, b in zip(ends[0][0].parameters(), ends[1][0].parameters()): same(a.detach(), b.detach())
    close(ends[0][1], ends[2][1], eps=.05)

def test_untrained_heads_are_not_passed_off(recwarn):
    from zsad_nb.detector import load_detector
    with pytest.raises(ConfigError, match='no trained head'): load_detector('visualad', 'paper')
    same(load_detector('visualad', 'paper', trained=False).ready, False)
    VisualAD('paper').predict(np.zeros((64, 64, 3), np.uint8), progress=False)
    assert any('no trained head' in str(w.message) for w in recwarn)

def test_train_and_predict_by_command(tmp_path, capsys):
    "zsad train writes a head that zsad predict and zsad eval use"
    from zsad_nb.cli import main
    from PIL import Image
    out, picture = tmp_path/'head', tmp_path/'one.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 64, 3), np.uint8)).save(picture)
    same(main(f'train --method visualad --data synthetic --categories leather --epochs 1 --out {out} --set anchors=2 --quiet'.split()), 0)
    assert 'zsad predict --method visualad --weights' in capsys.readouterr().out
    same(Detector.from_pretrained(out).cfg.anchors, 2)
    same(main(f'predict {picture} --method visualad --weights {out} --out {tmp_path/"seen"} --quiet'.split()), 0)
    assert (tmp_path/'seen/one_overlay.png').is_file()
    same(main(f'eval --data synthetic --categories tile --limit 2 --method visualad --weights {out} --quiet'.split()), 0)
    same(main(f'predict {picture} --method visualad --preset paper --out {tmp_path/"no"} --quiet'.split()), 2)
    assert 'no trained head' in capsys.readouterr().err
