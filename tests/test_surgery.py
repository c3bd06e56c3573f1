"""Value-value streams against the outputs of the AnoVL and AnomalyCLIP code, and against formulas written out."""
import math
import pytest, torch
from zsad_nb.types import ConfigError, shared_dir
from zsad_nb.trunk import OpenClipTrunk, DinoTrunk, TimmTrunk, merge_heads
from zsad_nb.surgery import ValueStream, self_attention, KINDS
from test_backbones import CLOSE, clip_vit, dino, timm_vit, pictures, copy, same

FIXTURE = dict(atol=1e-5, rtol=1e-4)   # what the fixtures' README recommends

def fixture(name):
    file = shared_dir() and shared_dir()/'fixtures'/f'{name}.safetensors'
    if not file or not file.is_file(): pytest.skip(f'../shared/fixtures/{name}.safetensors is not on this machine')
    from safetensors.torch import load_file
    return load_file(file)

def official_trunk(data, quick_gelu=False):
    from open_clip.transformer import VisionTransformer, QuickGELU
    from torch import nn
    visual = VisionTransformer(64, 16, 64, 4, 4, 4., output_dim=32, act_layer=QuickGELU if quick_gelu else nn.GELU)
    visual.load_state_dict({k.removeprefix('param/visual.'): v for k, v in data.items() if k.startswith('param/visual.')})
    return OpenClipTrunk(visual)

def close(a, b): torch.testing.assert_close(a, b, **FIXTURE)

@torch.no_grad()
def test_anovl():
    data = fixture('anovl')
    trunk, stream = official_trunk(data), ValueStream(keep_parts=True)
    before, entering = copy(trunk), {}
    tokens = trunk(data['in/image'], watch=[stream, lambda step, x, layer: entering.update({layer: x})])
    close(entering[1], data['out/ln_pre_tokens'])
    close(stream.start, data['out/ln_pre_tokens'])
    for l in (1, 2, 3, 4):
        close(stream.taps[l], data[f'out/vv/layer_{l}_tokens'])
        close(tokens.patches[l], data[f'out/clip/layer_{l}_tokens'][:, 1:])
        if l < 4: close(entering[l+1], data[f'out/vv/layer_{l}_original_path_tokens'])
    close(stream.tokens, data['out/official_list/6'].index_copy(1, torch.tensor([0]), stream.tokens[:, :1]))  # class row aside
    close(tokens.projected().cls, data['out/clip/class_embedding'])
    patches = trunk.project(trunk.norm(stream.tokens))[:, 1:]
    close(patches, data['out/patch_embeddings'])
    close(torch.cat([tokens.projected().cls[:, None], patches], 1), data['out/features'])
    close(trunk.project(trunk.norm(data['out/clip/layer_4_tokens'])), data['out/clip/projected_tokens'])
    torch.testing.assert_close(stream.start + sum(stream.parts.values()), stream.tokens, **CLOSE)
    assert same(trunk, before)

@torch.no_grad()
def test_anovl_one_attention_module():
    "Block 2's attention fed directly, without its layer norm"
    data = fixture('anovl')
    trunk, x = official_trunk(data), data['in/attention_x']
    trunk.model.transformer.resblocks[1].ln_1 = torch.nn.Identity()
    qkv = trunk.qkv(2, x)
    close(trunk.out(2, self_attention(qkv, 'vv')), data['out/attention_vv'])
    close(trunk.out(2, self_attention(qkv, 'qk')), data['out/attention_qk'])

@pytest.mark.parametrize('dpam,layers', [(3, 2), (5, 4), (5, None)])
@torch.no_grad()
def test_anomalyclip(dpam, layers):
    "DPAM_layer n is our last n-1 blocks; the stream leaves the original path where its first block begins"
    data = fixture('anomalyclip')
    trunk, stream = official_trunk(data, quick_gelu=True), ValueStream(layers=layers)
    tokens = trunk(data['in/image'], watch=stream)
    for l in (1, 2, 3, 4):
        vv, plain = f'out/dpam{dpam}/vv_tokens_layer_{l}', f'out/dpam{dpam}/tokens_layer_{l}'
        close(stream.taps[l], data[vv if vv in data else plain])
        close(trunk.project(trunk.norm(stream.taps[l])), data[f'out/dpam{dpam}/projected_tokens_layer_{l}'])
    close(tokens.cls @ trunk.model.proj, data[f'out/dpam{dpam}/class_embedding'])   # their class embedding skips ln_post

# formulas -------------------------------------------------------------------------------------------------------------

TRUNKS = dict(open_clip=(lambda: OpenClipTrunk(clip_vit(ls_init_value=.5)), (32, 32)), dino=(lambda: DinoTrunk(dino(True)), (70, 70)), timm=(lambda: TimmTrunk(timm_vit(reg_tokens=1, qk_norm=True)), (32, 48)))

@pytest.fixture(params=TRUNKS)
def trunk(request): make, size = TRUNKS[request.param]; t = make(); t.size = size; return t

def entering(trunk, x):
    seen = {}
    trunk(x, watch=lambda step, x, layer: seen.update({layer: x}))
    return seen

def written_out(trunk, layer, x, kind):
    qkv = trunk.qkv(layer, x)
    if kind == 'v': return trunk.out(layer, qkv[2])
    a, b = (qkv['qkv'.index(c)] for c in kind)
    return trunk.out(layer, (a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ qkv[2])

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_kinds(trunk, kind):
    x = pictures(*trunk.size)
    path, stream = entering(trunk, x), ValueStream(kind, keep_parts=True)
    trunk(x, watch=stream)
    want = path[1]
    for l in range(1, trunk.depth+1):
        part = written_out(trunk, l, path[l], kind)
        want = want + part
        torch.testing.assert_close(stream.parts[l], part, **CLOSE)
        torch.testing.assert_close(stream.taps[l], want, **CLOSE)
    torch.testing.assert_close(stream.tokens, want, **CLOSE)

@pytest.mark.parametrize('layers,chosen', [(2, None), ([2, -1], None), (1, None), ([1], None)], ids=str)
@torch.no_grad()
def test_layers(trunk, layers, chosen):
    x, L = pictures(*trunk.size), trunk.depth
    chosen = range(L-layers+1, L+1) if isinstance(layers, int) else [l % (L+1) for l in layers]
    path, stream = entering(trunk, x), ValueStream(layers=layers)
    trunk(x, watch=stream)
    want = path[min(chosen)]
    for l in range(1, L+1):
        if l in chosen: want = want + written_out(trunk, l, path[l], 'vv')
        torch.testing.assert_close(stream.taps[l], want if l >= min(chosen) else path[l+1], **CLOSE)

@torch.no_grad()
def test_recursive(trunk):
    "AnoVL eq. 7, literally: values of the stream itself"
    x = pictures(*trunk.size)
    stream = ValueStream(recursive=True)
    trunk(x, watch=stream)
    want = entering(trunk, x)[1]
    for l in range(1, trunk.depth+1):
        want = want + written_out(trunk, l, want, 'vv')
        torch.testing.assert_close(stream.taps[l], want, **CLOSE)

@torch.no_grad()
def test_beside_the_trunk(trunk):
    "The stream changes nothing, starts anew, and its kept tokens stay what they were"
    x, before, stream = pictures(*trunk.size), copy(trunk), ValueStream()
    plain, watched = trunk(x), trunk(x, watch=stream)
    assert all(torch.equal(plain.patches[l], watched.patches[l]) for l in plain.patches) and same(trunk, before)
    taps = {l: t.clone() for l, t in stream.taps.items()}
    kept = stream.taps
    trunk(-x, watch=stream)
    assert all(torch.equal(kept[l], taps[l]) for l in taps) and not torch.equal(stream.taps[1], taps[1])
    trunk(x[:1], watch=stream)
    assert len(stream.tokens) == 1
    assert len({t.data_ptr() for t in kept.values()}) == trunk.depth   # no tap is another's memory

def test_with_an_edit(trunk):
    "Tokens an edit appends join the stream; gradients reach them; tokens taken away are refused"
    new = torch.nn.Parameter(torch.randn(2, trunk.width))
    def edit(x, layer): return torch.cat([x, new.expand(len(x), -1, -1)], 1) if layer in (1, 3) else x
    stream = ValueStream()
    trunk(pictures(*trunk.size), edit=edit, watch=stream)
    assert stream.taps[3].shape[1] == stream.taps[1].shape[1] + 2
    stream.tokens.sum().backward()
    assert new.grad.abs().sum() > 0 and all(p.grad is None for p in trunk.parameters())
    def cut(x, layer): return torch.cat([x, x[:, :2]], 1) if layer == 1 else x[:, :-2] if layer == 3 else x
    with pytest.raises(ConfigError, match='took 2 tokens'): trunk(pictures(*trunk.size), edit=cut, watch=ValueStream())

def test_bad_choices(trunk):
    with pytest.raises(ConfigError, match='kind'): ValueStream('vq')
    with pytest.raises(ConfigError, match='kind'): self_attention((torch.zeros(1, 1, 1, 1),)*3, 'xx')
    with pytest.raises(ConfigError, match='blocks'): trunk(pictures(*trunk.size), watch=ValueStream(layers=99))
