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
