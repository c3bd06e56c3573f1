"""Trunk, text and backbones: parity with each provider at 1e-5, frozen weights, gradients, refusals, and weights that are missing."""
import hashlib, json, pickle, shutil, time
import numpy as np, pytest, torch
from torch import nn
from pathlib import Path
from safetensors.torch import save_file
from zsad_nb.types import ConfigError, WeightsError, shared_dir
from zsad_nb.trunk import OpenClipTrunk, DinoTrunk, TimmTrunk, Trunk, take_layers, resize_table, POSITIONS
from zsad_nb.text import TextTower, WholeTextTower, BPETokenizer
from zsad_nb import backbones as bb
from zsad_nb.backbones import load_backbone, Backbone, BACKBONES, find_spec, is_cached, read_state

CLOSE = dict(atol=1e-5, rtol=1e-5)

@torch.no_grad()
def shake(model):
    "Random norms, biases and layer scales, so that a missing one shows"
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim < 2: p.add_(torch.randn_like(p)*.1)
    return model.eval()

def pictures(H, W, b=2): return torch.randn(b, 3, H, W, generator=torch.Generator().manual_seed(1))
def copy(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(model, before): return model.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

# open_clip ------------------------------------------------------------------------------------------------------------

def clip_vit(size=32, **kw):
    from open_clip.transformer import VisionTransformer
    return shake(VisionTransformer(size, 8, 64, 5, 4, 4., output_dim=32, **kw))

def quick():
    from open_clip.transformer import QuickGELU
    return QuickGELU

CLIP_KINDS = dict(plain=lambda: {}, quick_gelu=lambda: dict(act_layer=quick()), layer_scale=lambda: dict(ls_init_value=.3),
    clipa=lambda: dict(no_ln_pre=True, pool_type='avg', final_ln_after_pool=True), sincos=lambda: dict(pos_embed_type='sin_cos_2d'),
    custom=lambda: dict(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True))

@pytest.mark.parametrize('size', [32, (32, 48)], ids=str)
@pytest.mark.parametrize('kind', CLIP_KINDS)
@torch.no_grad()
def test_open_clip_output(kind, size):
    if kind == 'sincos' and size != 32: pytest.skip('open_clip makes sin-cos tables for square pictures only')
    visual = clip_vit(size, **CLIP_KINDS[kind]())
    x, trunk = pictures(*visual.image_size), OpenClipTrunk(visual)
    before = copy(trunk)
    tokens, theirs = trunk(x), visual.forward_intermediates(x, output_fmt='NLC', output_extra_tokens=True)
    torch.testing.assert_close(tokens.projected().cls, visual(x), **CLOSE)
    for l, patches in tokens.patches.items(): torch.testing.assert_close(patches, theirs['image_intermediates'][l-1], **CLOSE)
    torch.testing.assert_close(trunk(x, layers=()).projected().cls, visual(x), **CLOSE)   # patches of the last block left out
    assert same(trunk, before)

@pytest.mark.parametrize('new', [48, 16, (24, 56)], ids=str)
@torch.no_grad()
def test_open_clip_positions_as_its_loader(new):
    "Other sizes: what open_clip's checkpoint loader would have made of the table"
    from open_clip.model import resize_pos_embed
    small, big = clip_vit(32), clip_vit(new)
    state = {f'visual.{k}': v for k, v in small.state_dict().items()}
    class Holder: visual = big
    resize_pos_embed(state, Holder)
    big.load_state_dict({k.removeprefix('visual.'): v for k, v in state.items()})
    x = pictures(*big.image_size)
    torch.testing.assert_close(OpenClipTrunk(small)(x).projected().cls, big(x), **CLOSE)

@torch.no_grad()
def test_custom_text_clip_visual():
    import open_clip
    vision, text = dict(image_size=32, patch_size=8, width=64, layers=3, head_width=16), dict(context_length=16, vocab_size=100, width=32, heads=2, layers=2)
    model = shake(open_clip.CustomTextCLIP(32, vision, text))
    x = pictures(32, 32)
    torch.testing.assert_close(OpenClipTrunk(model.visual)(x).projected().cls, model.encode_image(x), **CLOSE)

def test_open_clip_refusals():
    with pytest.raises(ConfigError, match='CoCa'): OpenClipTrunk(clip_vit(attentional_pool=True))
    with pytest.raises(ConfigError, match='pooling'): OpenClipTrunk(clip_vit(pool_type='avg'))
    with pytest.raises(ConfigError, match='cosine'): OpenClipTrunk(clip_vit(scaled_cosine_attn=True))
    with pytest.raises(ConfigError, match='VisionTransformer'): OpenClipTrunk(nn.Linear(3, 3))

@pytest.mark.parametrize('arch', ['ViT-M-16-alt', 'ViT-B-32-quickgelu', 'ViT-B-16-plus-240', 'ViT-H-14-378-quickgelu', 'ViT-bigG-14-CLIPA-336', 'EVA01-g-14'])
def test_every_open_clip_vit_has_a_trunk(arch):
    "Shapes only, on the meta device: the configs with open_clip's own ViT are walked, the others refused"
    import open_clip
    cfg = open_clip.get_model_config(arch)
    with torch.device('meta'):
        if cfg['vision_cfg'].get('timm_model_name'):
            with pytest.raises(ConfigError, match='timm'): load_backbone(arch, pretrained=False)
        else:
            trunk = OpenClipTrunk(open_clip.model._build_vision_tower(cfg['embed_dim'], open_clip.CLIPVisionCfg(**cfg['vision_cfg']), cfg.get('quick_gelu', False)))
            assert trunk.depth == cfg['vision_cfg']['layers'] and trunk.joint == cfg['embed_dim']

# DINOv2 ---------------------------------------------------------------------------------------------------------------

def dino(registers, **kw):
    tf = pytest.importorskip('transformers')
    cfg, model = (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel) if registers else (tf.Dinov2Config, tf.Dinov2Model)
    return shake(model(cfg(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=70, patch_size=14, **kw)))

@pytest.mark.parametrize('H,W', [(70, 70), (98, 98), (14, 350), (56, 84)])
@pytest.mark.parametrize('swiglu', [False, True], ids=['mlp', 'swiglu'])
@pytest.mark.parametrize('registers', [False, True], ids=['plain', 'registers'])
@torch.no_grad()
def test_dino_output(registers, swiglu, H, W):
    model = dino(registers, use_swiglu_ffn=swiglu)
    x, trunk = pictures(H, W), DinoTrunk(model)
    before = copy(trunk)
    tokens, theirs = trunk(x), model(x, output_hidden_states=True)
    assert trunk.prefix == (5 if registers else 1)
    for l in (1, 2, 3): torch.testing.assert_close(tokens.patches[l], theirs.hidden_states[l][:, trunk.prefix:], **CLOSE)
    torch.testing.assert_close(tokens.normed().patches[4], theirs.last_hidden_state[:, trunk.prefix:], **CLOSE)
    torch.testing.assert_close(tokens.normed().cls, theirs.pooler_output, **CLOSE)
    assert same(trunk, before)
    with pytest.raises(ConfigError, match='no text tower'): tokens.projected()

@pytest.mark.parametrize('name', [n for n in BACKBONES if n.startswith('dinov2')])
def test_dino_sizes(name):
    pytest.importorskip('transformers')
    with torch.device('meta'): b = load_backbone(name, pretrained=False)
    assert (b.trunk.width, b.trunk.depth, b.trunk.heads) == bb.DINO[name.split('-')[1]]
    assert b.trunk.prefix == (5 if name.endswith('-reg') else 1) and b.text is None

# timm -----------------------------------------------------------------------------------------------------------------

def timm_vit(**kw):
    from timm.models.vision_transformer import VisionTransformer
    return shake(VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=7, **kw))

TIMM_KINDS = dict(plain={}, registers=dict(reg_tokens=4), no_embed_class=dict(no_embed_class=True, reg_tokens=2), layer_scale=dict(init_values=.2), qk_norm=dict(qk_norm=True),
    pre_norm=dict(pre_norm=True), sub_norms=dict(scale_attn_norm=True, scale_mlp_norm=True), no_positions=dict(pos_embed='none'), averaged=dict(global_pool='avg'))

@pytest.mark.parametrize('kind', TIMM_KINDS)
@torch.no_grad()
def test_timm_output(kind):
    vit = timm_vit(dynamic_img_size=True, **TIMM_KINDS[kind])
    trunk = TimmTrunk(vit)
    before = copy(trunk)
    for H, W in [(32, 48), (48, 48), (16, 96)]:
        x = pictures(H, W)
        tokens, (last, theirs) = trunk(x), vit.forward_intermediates(x, output_fmt='NLC', return_prefix_tokens=True)
        for l, patches in tokens.patches.items(): torch.testing.assert_close(patches, theirs[l-1][0], **CLOSE)
        torch.testing.assert_close(tokens.normed().cls, last[:, 0], **CLOSE)
    assert same(trunk, before)

@torch.no_grad()
def test_timm_distilled():
    import timm
    vit = shake(timm.create_model('deit_tiny_distilled_patch16_224', pretrained=False, depth=2))
    trunk, x = TimmTrunk(vit), pictures(224, 224, 1)
    assert trunk.prefix == 2
    torch.testing.assert_close(trunk(x).normed().patches[2], vit.forward_features(x)[:, 2:], **CLOSE)

def test_timm_refusals():
    with pytest.raises(ConfigError, match='class token'): TimmTrunk(timm_vit(class_token=False, global_pool='avg'))
    for name in ('timm/vit_base_patch16_siglip_224', 'timm/resnet18', 'timm/swin_tiny_patch4_window7_224', 'timm/eva02_tiny_patch14_224', 'timm/vit_base_r50_s16_224'):
        with pytest.raises(ConfigError): find_spec(name)

# the loop -------------------------------------------------------------------------------------------------------------

TRUNKS = dict(open_clip=lambda: OpenClipTrunk(clip_vit()), dino=lambda: DinoTrunk(dino(True)), timm=lambda: TimmTrunk(timm_vit(reg_tokens=1)))
SIZES = dict(open_clip=(32, 32), dino=(70, 70), timm=(32, 48))

@pytest.fixture(params=TRUNKS)
def trunk(request): t = TRUNKS[request.param](); t.size = SIZES[request.param]; return t

def test_backbone_is_the_same_after_every_kind_of_call(trunk):
    H, W = trunk.size
    x, before = pictures(H, W), copy(trunk)
    plain = trunk(x).patches[trunk.depth]
    extra = nn.Parameter(torch.randn(3, trunk.width))
    def edit(x, layer): return torch.cat([x, extra.expand(len(x), -1, -1)], 1) if layer == 0 else x*1.1 if layer == 2 else x
    seen = []
    def watch(step, x, layer): seen.append((layer, step.attention().shape, step.out(step.qkv()[2]).shape))
    for kw in (dict(), dict(layers=1), dict(layers=[-1, 2]), dict(edit=edit), dict(watch=watch), dict(watch=[watch, watch]), dict(edit=edit, watch=watch, positions='bilinear')):
        tokens = trunk(pictures(H+trunk.patch_size, W), **kw)
        tokens.cls.sum().backward() if 'edit' in kw else None
        tokens.normed()
    trunk.train()
    assert not trunk.training and not any(m.training for m in trunk.modules())
    assert same(trunk, before) and torch.equal(trunk(x).patches[trunk.depth], plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trunk.modules())
    assert [s[0] for s in seen[:trunk.depth]] == list(range(1, trunk.depth+1))

def test_gradients_reach_the_edit_and_nothing_else(trunk):
    extra = nn.Parameter(torch.randn(2, trunk.width))
    def edit(x, layer): return torch.cat([x, extra.expand(len(x), -1, -1)], 1) if layer == 0 else x
    tokens = trunk(pictures(*trunk.size), layers=[1, -1], edit=edit)
    assert tokens.extra[trunk.depth].shape == (2, 2, trunk.width) and tokens.extra[1].shape == (2, 2, trunk.width)
    tokens.normed().patches[trunk.depth].pow(2).sum().backward()
    assert extra.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in trunk.parameters())
    plain = trunk(pictures(*trunk.size))
    assert not plain.cls.requires_grad

def test_appended_tokens_and_taps(trunk):
    "An edit that appends and later removes its tokens leaves the patches where they were"
    n = trunk(pictures(*trunk.size)).patches[1].shape[1]
    def edit(x, layer): return torch.cat([x, x[:, :2]], 1) if layer == 1 else x[:, :-2] if layer == 3 else x
    tokens = trunk(pictures(*trunk.size), edit=edit)
    assert {l: e.shape[1] for l, e in tokens.extra.items() if l <= 4} == {1: 2, 2: 2, 3: 0, 4: 0}
    assert all(p.shape[1] == n for p in tokens.patches.values())

def test_attention_is_the_trunks_own(trunk):
    "softmax(q k) v, written out, goes through `out` to the very residual the block adds"
    found = {}
    def watch(step, x, layer):
        a = step.attention()
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
        mid = x + step.out(a @ step.qkv()[2])
        found[layer] = mid + trunk.mlp(layer, mid)
    tokens = trunk(pictures(*trunk.size), watch=watch)
    n = tokens.patches[1].shape[1]
    for l, patches in tokens.patches.items(): torch.testing.assert_close(found[l][:, trunk.prefix:trunk.prefix+n], patches, **CLOSE)

def test_only_what_is_asked_for(trunk):
    x = pictures(*trunk.size)
    full, some, none = trunk(x), trunk(x, layers=[1, 2]), trunk(x, layers=())
    for t in (some, none): torch.testing.assert_close(t.cls, full.cls, **CLOSE)
    assert list(some.patches) == [1, 2] and torch.equal(some.patches[2], full.patches[2]) and none.patches == {} == none.extra

def test_bad_input(trunk):
    p, (H, W) = trunk.patch_size, trunk.size
    for shape, words in [((2, 3, H+1, W), 'multiple of the patch size'), ((2, 3, 0, W), 'multiple'), ((2, 1, H, W), r'\(batch, 3, height, width\)'), ((3, H, W), 'shape')]:
        with pytest.raises(ConfigError, match=words): trunk(torch.zeros(shape))
    with pytest.raises(ConfigError, match='float'): trunk(torch.zeros(1, 3, H, W, dtype=torch.uint8))
    for layers in (0, trunk.depth+1, [0], [trunk.depth+1], [-trunk.depth-1], [1.5]):
        with pytest.raises(ConfigError, match='blocks'): trunk(pictures(H, W), layers=layers)
    with pytest.raises(ConfigError, match='positions'): trunk(pictures(H+p, W), positions='cubic')
    for edit in (lambda x, l: None, lambda x, l: x[:, 1:], lambda x, l: x[0], lambda x, l: x[..., :-1]):
        with pytest.raises(ConfigError, match='edit'): trunk(pictures(H, W), edit=edit)

def test_take_layers():
    assert take_layers(None, 3) == (1, 2, 3) and take_layers(2, 12) == (11, 12) and take_layers([12, 3, -1, 6], 12) == (3, 6, 12)

def test_positions():
    table = torch.randn(4, 6, 8)
    for mode in POSITIONS:
        assert resize_table(table, (4, 6), mode).data_ptr() == table.data_ptr()   # native size: not even copied
        assert resize_table(table, (7, 5), mode).shape == (35, 8)
    torch.testing.assert_close(resize_table(table, (8, 12), 'nearest').view(8, 12, 8)[::2, ::2], table)

# text -----------------------------------------------------------------------------------------------------------------

WORDS = ['a photo of a flawless bolt', 'a photo of a damaged bolt with a long scratch across its head', 'bolt']
TEXT = dict(vocab_size=49408, width=64, heads=4, layers=3)

def clip_model(custom=False, **text):
    import open_clip
    vision = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=16)
    return shake((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(32, vision, {**TEXT, **text}))

def tokenizer():
    import open_clip
    return open_clip.get_tokenizer('ViT-B-16')

@pytest.mark.parametrize('kw', [{}, dict(custom=True), dict(pool_type='eos', eos_id=49407), dict(proj_bias=True), dict(no_causal_mask=True), dict(custom=True, no_causal_mask=True, pool_type='last')], ids=str)
@torch.no_grad()
def test_text_as_encode_text(kw):
    model = clip_model(**kw)
    tower = TextTower(model, tokenizer())
    before, ids = copy(tower), tower.tokenize(WORDS)
    theirs = model.encode_text(ids)
    torch.testing.assert_close(tower.encode(WORDS), theirs, **CLOSE)
    torch.testing.assert_close(tower.encode(WORDS, batch_size=1), theirs, **CLOSE)
    torch.testing.assert_close(tower.encode_embedded(tower.embed(ids), ids), theirs, **CLOSE)
    assert same(tower, before) and (tower.width, tower.joint, tower.context_length) == (64, 32, 77)

def test_text_gradients_reach_learned_tokens_only():
    tower = TextTower(clip_model(), tokenizer())
    ids = tower.tokenize(['X X X X bolt'])
    learned = nn.Parameter(torch.randn(4, 64)*.02)
    x = torch.cat([tower.embed(ids)[:, :1], learned[None], tower.embed(ids)[:, 5:]], 1)
    tower.encode_embedded(x, ids).sum().backward()
    assert learned.grad.abs().sum() > 0 and all(p.grad is None for p in tower.parameters())
    seen = []
    def edit(x, layer): seen.append(layer); return x
    tower.encode_embedded(tower.embed(ids), ids, edit=edit)
    assert seen == [1, 2, 3]

def test_text_refusals():
    tower = TextTower(clip_model(), tokenizer())
    for bad in ([], [3], ['a', None]):
        with pytest.raises(ConfigError): tower.encode(bad)
    with pytest.raises(ConfigError, match='context'): tower.encode_embedded(torch.zeros(1, 80, 64), torch.zeros(1, 80, dtype=torch.long))
    assert tower.encode('bolt').shape == (1, 32)   # one string is one sentence

@torch.no_grad()
def test_whole_text_tower():
    import open_clip
    vision, text = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=16), dict(TEXT, context_length=76, embed_cls=True, output_tokens=True)
    model = shake(open_clip.CoCa(32, multimodal_cfg=dict(context_length=76, width=64, heads=4, layers=1), text_cfg=text, vision_cfg=dict(vision, output_tokens=True)))
    with pytest.raises(ConfigError, match='WholeTextTower'): TextTower(model, tokenizer())
    import functools
    tower = WholeTextTower(model, functools.partial(tokenizer(), context_length=76))
    torch.testing.assert_close(tower.encode(WORDS), model.encode_text(tower.tokenize(WORDS), normalize=False), **CLOSE)
    with pytest.raises(ConfigError, match='strings'): tower.embed(tower.tokenize(WORDS))
    torch.testing.assert_close(OpenClipTrunk(model.visual)(pictures(32, 32)).projected().cls, model.encode_image(pictures(32, 32), normalize=False), **CLOSE)

# weights --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "An empty cache and a server that never answers"
    from huggingface_hub import constants, file_download
    for m in (constants, file_download):
        if hasattr(m, 'HF_HUB_CACHE'): monkeypatch.setattr(m, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(bb, 'reachable', lambda url, seconds=2.5: False)

NAMED = ['ViT-L-14-336', 'ViT-B-16-plus-240', 'ViT-H-14/laion2b_s32b_b79k', 'dinov2-large', 'dinov2-small-reg', 'timm/deit_tiny_patch16_224', 'timm/vit_base_patch14_dinov2.lvd142m']

@pytest.mark.parametrize('name', NAMED)
def test_missing_weights(name, no_network, tmp_path):
    find_spec(name)                                  # imports of the provider are not what is timed
    start = time.perf_counter()
    with pytest.raises(WeightsError) as e: load_backbone(name)
    assert time.perf_counter() - start < 8           # the libraries alone retry for 23 to 47 s
    spec, words = find_spec(name), str(e.value)
    assert name in words and (spec.repo or spec.url) in words and ('~/hub' if spec.repo else '~/.cache/clip') in words
    assert f"load_backbone('{name}')" in words and "load_backbone('tiny')" in words and 'does not answer' in words and '\n' not in words
    assert not is_cached(name)

def test_offline_switch_asks_nobody(no_network, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(bb, 'reachable', lambda *_: pytest.fail('asked the network although HF_HUB_OFFLINE is set'))
    with pytest.raises(WeightsError, match='HF_HUB_OFFLINE'): load_backbone('dinov2-small')

def test_reachable_is_quick(monkeypatch):
    import socket, threading
    server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(1)   # accepts, then says nothing
    for v in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.delenv(v, raising=False)
    start = time.perf_counter()
    assert not bb.reachable(f'http://127.0.0.1:{server.getsockname()[1]}', seconds=.3)
    assert not bb.reachable('http://127.0.0.1:9', seconds=.3)
    assert time.perf_counter() - start < 2
    server.close()
    from http.server import BaseHTTPRequestHandler, HTTPServer
    class Quiet(BaseHTTPRequestHandler):
        def do_HEAD(self): self.send_error(403)
        def log_message(self, *a): pass
    web = HTTPServer(('127.0.0.1', 0), Quiet)
    threading.Thread(target=web.handle_request, daemon=True).start()
    assert bb.reachable(f'http://127.0.0.1:{web.server_port}', seconds=5)
    web.server_close()

def test_download_when_there_is_a_network(no_network, monkeypatch, tmp_path):
    "The first file name that the hub has is taken; other failures become one WeightsError"
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    monkeypatch.setattr(bb, 'reachable', lambda *_: True)
    asked = []
    def download(repo, file):
        asked.append((repo, file))
        if file.endswith('.safetensors'): raise EntryNotFoundError('404')
        return str(tmp_path/'there.bin')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    assert bb.fetch(find_spec('dinov2-base')) == tmp_path/'there.bin'
    assert asked == [('facebook/dinov2-base', 'model.safetensors'), ('facebook/dinov2-base', 'pytorch_model.bin')]
    def broken(repo, file): raise OSError('disk full')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', broken)
    with pytest.raises(WeightsError, match='disk full'): bb.fetch(find_spec('dinov2-base'))
    import open_clip
    monkeypatch.setattr(open_clip, 'download_pretrained_from_url', lambda url: str(tmp_path/url.rpartition('/')[2]))
    assert bb.fetch(find_spec('ViT-B-16-plus-240')).name == 'vit_b_16_plus_240-laion400m_e32-699c4b84.pt'

def test_cache_is_looked_up_first(no_network, monkeypatch, tmp_path):
    "A file in the hub's cache layout is found without asking anybody"
    vit = timm_state()
    repo = tmp_path/'hub'/'models--timm--deit_tiny_patch16_224.fb_in1k'
    (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text('abc')
    (repo/'snapshots'/'abc').mkdir(parents=True); save_file(vit.state_dict(), repo/'snapshots'/'abc'/'model.safetensors')
    monkeypatch.setattr(bb, 'reachable', lambda *_: pytest.fail('asked the network although the file is cached'))
    assert is_cached('timm/deit_tiny_patch16_224')
    assert same(load_backbone('timm/deit_tiny_patch16_224').trunk.model, vit.state_dict())

def timm_state():
    import timm
    torch.manual_seed(3)
    return timm.create_model('deit_tiny_patch16_224', pretrained=False)

@pytest.fixture
def toys(monkeypatch):
    "Small towers under the providers' names, so that files are written in no time"
    import open_clip
    cfg = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2, head_width=16), text_cfg=TEXT)
    monkeypatch.setattr(open_clip.factory, '_MODEL_CONFIGS', dict(open_clip.factory._MODEL_CONFIGS, **{'ViT-toy': cfg}))
    monkeypatch.setitem(bb.DINO, 'small', (64, 2, 2))

def make_weights(name, folder):
    "Random weights of backbone `name`, as its provider would save them"
    torch.manual_seed(5)
    if name.startswith('timm'): model = timm_state(); save_file(model.state_dict(), folder/'model.safetensors'); return model
    if name.startswith('dinov2'):
        model = load_backbone(name, pretrained=False).trunk.model
        model.save_pretrained(folder)
        return model
    import open_clip
    model = open_clip.create_model(name, pretrained=None)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder/'open_clip_model.safetensors')
    return model

@pytest.mark.parametrize('name', ['ViT-toy', 'dinov2-small', 'dinov2-small-reg', 'timm/deit_tiny_patch16_224'])
@torch.no_grad()
def test_own_weights(name, tmp_path, no_network, toys):
    "File and folder, safetensors and torch file, for each provider"
    model = make_weights(name, tmp_path)
    file = next(tmp_path.glob('*.safetensors'))
    want = model.visual if hasattr(model, 'visual') else model
    for weights in (tmp_path, file, str(file)):
        b = load_backbone(name, weights=weights)
        assert same(b.trunk.model, want.state_dict())
    torch.save({'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}}, tmp_path/'own.pth')
    b = load_backbone(name, weights=tmp_path/'own.pth')
    x = b.preprocess(np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8))[None]
    ours = b.trunk(x).projected().cls if b.text else b.trunk(x).normed().cls
    theirs = model.encode_image(x) if b.text else model(x).pooler_output if 'dino' in name else model.forward_features(x)[:, 0]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    if b.text: torch.testing.assert_close(b.text.encode(WORDS), model.encode_text(b.text.tokenize(WORDS)), **CLOSE)
    assert b.fingerprint() == load_backbone(name, weights=file).fingerprint() != load_backbone(name, pretrained=False).fingerprint()
    assert not any(p.requires_grad for p in b.parameters())

class Evil:
    def __reduce__(self): return (Path.touch, (Path('ran_code'),))

def test_refused_checkpoints(tmp_path, monkeypatch, toys):
    monkeypatch.chdir(tmp_path)
    name, state = 'timm/deit_tiny_patch16_224', timm_state().state_dict()
    def refused(file, words, name=name):
        with pytest.raises(WeightsError, match=words) as e: load_backbone(name, weights=file)
        assert str(file) in str(e.value) and '\n' not in str(e.value)
    save_file(state, 'good.safetensors')
    Path('short.safetensors').write_bytes(Path('good.safetensors').read_bytes()[:100_000]); refused('short.safetensors', 'truncated')
    Path('page.safetensors').write_text('<!DOCTYPE html><html>sign in</html>'); refused('page.safetensors', 'web page')
    Path('page.pth').write_text('\n  <html>'); refused('page.pth', 'web page')
    Path('lfs.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n'); refused('lfs.safetensors', 'git-lfs')
    Path('empty.pth').touch(); refused('empty.pth', 'empty')
    Path('noise.bin').write_bytes(bytes(range(256))*40); refused('noise.bin', 'damaged|refused')
    torch.save(state, 'good.pth'); Path('short.pth').write_bytes(Path('good.pth').read_bytes()[:100_000]); refused('short.pth', 'damaged')
    torch.save({'model': Evil()}, 'evil.pth'); refused('evil.pth', 'run code')
    Path('evil.bin').write_bytes(pickle.dumps(Evil())); refused('evil.bin', 'run code|damaged')
    torch.save(timm_state(), 'module.pth'); refused('module.pth', 'run code')
    torch.save([1, 2], 'list.pth'); refused('list.pth', 'list')
    torch.save({'lr': .1}, 'none.pth'); refused('none.pth', 'no tensors')
    refused('absent.pth', 'no such file')
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), 'script.pt'); refused('script.pt', 'TorchScript')
    Path('folder').mkdir(); refused('folder', 'no weights in the folder')
    for n in 'ab': save_file(state, f'folder/{n}.safetensors')
    refused('folder', '2 checkpoints')
    assert not Path('ran_code').exists()
    for other in ('ViT-toy', 'dinov2-small', 'tiny' if bb.TINY.joinpath('config.json').exists() else 'dinov2-small-reg'): refused('good.safetensors', 'another backbone', other)
    save_file({**state, 'pos_embed': torch.zeros(1, 197, 100)}, 'wide.safetensors'); refused('wide.safetensors', 'pos_embed is .1, 197, 100.')

@torch.no_grad()
def test_dinov2_own_release_through_timm(tmp_path):
    "Facebook's own naming is converted by timm"
    import timm
    vit = timm.create_model('vit_small_patch14_dinov2', pretrained=False)
    torch.manual_seed(0)
    state = {k: torch.randn_like(v)*.02 for k, v in vit.state_dict().items()}
    save_file({**state, 'mask_token': torch.zeros(1, 384)}, tmp_path/'dinov2_vits14_pretrain.safetensors')
    b = load_backbone('timm/vit_small_patch14_dinov2', weights=tmp_path)
    assert same(b.trunk.model, state) and b.image_size == (518, 518)

def test_openai_torchscript_by_checksum(tmp_path, monkeypatch):
    "OpenAI's own .pt files are TorchScript: opened if the checksum is theirs, refused otherwise"
    import open_clip
    class Holder(nn.Module):
        def __init__(self): super().__init__(); self.visual = nn.Linear(2, 2); self.register_buffer('input_resolution', torch.tensor(224))
        def forward(self, x): return self.visual(x)
    torch.jit.save(torch.jit.script(Holder()), tmp_path/'x.pt')
    checksum = hashlib.sha256((tmp_path/'x.pt').read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match='OpenAI'): read_state(tmp_path/'x.pt')
    monkeypatch.setattr(open_clip, 'list_pretrained', lambda: [('ViT-X', 'openai')])
    monkeypatch.setattr(open_clip, 'get_pretrained_cfg', lambda m, t: dict(url=f'https://openaipublic.azureedge.net/clip/models/{checksum}/x.pt'))
    assert set(read_state(tmp_path/'x.pt')) == {'visual.weight', 'visual.bias'}

# names ----------------------------------------------------------------------------------------------------------------

def test_short_table_agrees_with_the_providers():
    for name, s in BACKBONES.items():
        if s.provider == 'open_clip':
            theirs = bb._open_clip_spec(f'{s.arch}/{s.tag}')
            assert (theirs.arch, theirs.repo, theirs.url) == (s.arch, s.repo, s.url)
        if s.provider == 'timm': assert (bb._timm_spec(name).repo, bb._timm_spec(name).tag) == (s.repo, s.tag)

@pytest.mark.parametrize('name,words', [('ViT-B-61', 'did you mean'), ('', 'name'), (None, 'name'), ('dinov2-huge', 'dinov2-giant'), ('timm/nothing', 'timm'), ('timm/deit_tiny_patch16_224.mine', 'weights'),
    ('ViT-H-14', 'choose one'), ('ViT-H-14/mine', 'knows no weights'), ('RN50/openai', 'ResNet'), ('coca_ViT-B-32/laion2b_s13b_b90k', 'CoCa'), ('ViT-B-16-SigLIP/webli', 'timm'), ('hf-hub:a/b', 'no backbone')])
def test_bad_names(name, words, no_network):
    with pytest.raises(ConfigError, match=words): load_backbone(name)

def test_quick_gelu_follows_the_weights():
    from open_clip.transformer import QuickGELU
    assert find_spec('ViT-L-14-336').arch == 'ViT-L-14-336-quickgelu' and find_spec('ViT-B-16/dfn2b').arch == 'ViT-B-16-quickgelu' and find_spec('ViT-B-16/laion2b_s34b_b88k').arch == 'ViT-B-16'
    with torch.device('meta'): b = load_backbone('ViT-B-32', pretrained=False)
    assert isinstance(b.trunk.model.transformer.resblocks[0].mlp.gelu, QuickGELU)

# the embedded backbone ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory):
    "A stand-in for the embedded backbone, with a tokenizer of a few sentences and random weights"
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    folder = tmp_path_factory.mktemp('tiny')
    bpe = Tokenizer(models.BPE()); bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(WORDS*3, trainers.BpeTrainer(vocab_size=320, special_tokens=['<pad>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(['<start>', '<end>']); bpe.save(str(folder/'tokenizer.json'))
    n = bpe.get_vocab_size()
    cfg = dict(embed_dim=128, vision_cfg=dict(image_size=128, patch_size=8, width=128, layers=12, head_width=32), text_cfg=dict(width=128, heads=4, layers=4, context_length=32, vocab_size=n),
               mean=[.5]*3, std=[.25]*3, interpolation='bilinear', image_size=128, sot=n-2, eot=n-1, pad=0)
    (folder/'config.json').write_text(json.dumps(cfg))
    torch.manual_seed(0)
    save_file({k: v.half() for k, v in open_clip.CLIP(128, cfg['vision_cfg'], cfg['text_cfg']).state_dict().items()}, folder/'model.safetensors')
    return folder

def test_tiny_from_a_folder(tiny_folder, tmp_path):
    b = load_backbone('tiny', weights=tiny_folder)
    assert (b.trunk.depth, b.trunk.width, b.trunk.patch_size, b.trunk.joint, b.text.joint, b.image_size) == (12, 128, 8, 128, 128, (128, 128))
    assert next(b.parameters()).dtype == torch.float32
    assert b.text.encode(['naïve 日本語 🙂', '', 'x'*5000]).isfinite().all()     # any string at all
    ids = b.text.tokenize(['word '*100])
    assert ids.shape == (1, 32) and ids[0, -1] == ids.max() == b.text.tokenizer.eot    # cut, the end kept
    assert torch.equal(b.text.tokenize(['A BOLT']), b.text.tokenize(['a bolt']))
    start = time.perf_counter(); load_backbone('tiny', weights=tiny_folder); assert time.perf_counter() - start < 2
    broken = shutil.copytree(tiny_folder, tmp_path/'broken'); (broken/'config.json').write_text('{')
    with pytest.raises(WeightsError, match='config.json'): load_backbone('tiny', weights=broken)
    (broken/'model.safetensors').unlink()
    with pytest.raises(WeightsError, match='no weights'): load_backbone('tiny', weights=broken)

@pytest.mark.skipif(not bb.TINY.joinpath('model.safetensors').exists(), reason='the embedded backbone is not in this checkout')
def test_the_embedded_tiny():
    b = load_backbone('tiny')
    assert b.text.encode(['a flawless bolt']).shape == (1, b.trunk.joint) and is_cached('tiny')
    assert load_backbone('tiny', image_size=(64, 160)).trunk(pictures(64, 160)).grid == (64//b.trunk.patch_size, 160//b.trunk.patch_size)
    with pytest.raises(ConfigError, match='multiple'): load_backbone('tiny', image_size=100)

@torch.no_grad()
def test_preprocess(tiny_folder):
    from PIL import Image
    b = load_backbone('tiny', weights=tiny_folder)
    array = np.random.default_rng(0).integers(0, 255, (90, 50, 3), dtype=np.uint8)
    x = b.preprocess(array)
    assert x.shape == (3, 128, 128) and x.dtype == torch.float32
    torch.testing.assert_close(x, b.preprocess(Image.fromarray(array)))
    tv = pytest.importorskip('torchvision.transforms')
    theirs = tv.Compose([tv.Resize((64, 96), tv.InterpolationMode.BICUBIC), tv.ToTensor(), tv.Normalize(b.mean, b.std)])(Image.fromarray(array))
    torch.testing.assert_close(b.preprocess(array, size=(64, 96), interpolation='bicubic'), theirs, **CLOSE)
    with pytest.raises(ConfigError, match='multiple'): b.preprocess(array, size=100)

@torch.no_grad()
def test_real_deit_tiny():
    folder = shared_dir() and shared_dir()/'weights'/'deit_tiny_patch16_224'
    if not folder or not folder.is_dir(): pytest.skip('../shared/weights is not on this machine')
    import timm
    b = load_backbone('timm/deit_tiny_patch16_224', weights=folder)
    vit = timm.create_model('deit_tiny_patch16_224', pretrained=False).eval(); vit.load_state_dict(read_state(next(folder.glob('*.safetensors'))))
    x = pictures(224, 224, 1)
    torch.testing.assert_close(b.trunk(x).normed().cls, vit.forward_features(x)[:, 0], **CLOSE)
    assert b.image_size == (224, 224) and b.mean == (0.485, 0.456, 0.406)
