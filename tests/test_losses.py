"""The loss room: the authors' numbers and gradients at 1e-5, and batches in which some pictures have no mask."""
import pytest, torch
from zsad_nb.losses import dice, focal, image_bce, token_margin
from zsad_nb.scoring import fuse, pool_top
from zsad_nb.types import ConfigError, shared_dir

@pytest.fixture(scope='module')
def fx():
    shared = shared_dir()
    if shared is None or not (shared/'fixtures/losses.safetensors').is_file(): pytest.skip('the fixtures of ../shared are not here')
    from safetensors.torch import load_file
    return load_file(shared/'fixtures/losses.safetensors')

def same(a, b): torch.testing.assert_close(a.reshape(b.shape), b, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('repo', ['visualad', 'vip2'])
def test_focal(fx, repo):
    t = fx['in/focal_target']
    n, a = fx['in/focal_prob'].double().unbind(1)
    p = torch.where(a < .5, a, 1 - n).requires_grad_()  # the fixture holds both sides; the smaller one has the digits, and 1 - p in float32 would lose them
    loss = focal(p, t); loss.backward()
    same(loss.float(), fx[f'out/focal_{repo}'])
    theirs = fx[f'out/focal_{repo}_grad_prob']          # of the pair; ours moves both sides at once
    same(p.grad.float(), theirs[:, 1] - theirs[:, 0])
    same(focal(p.detach().reshape(-1, 1, 1), t.reshape(-1, 1, 1), reduce=False).float(), fx['out/focal_per_pixel'].flatten())

def test_focal_at_the_extremes(fx):
    p, t = fx['in/focal_extreme_prob'][:, 1].clone().requires_grad_(), fx['in/focal_extreme_target']
    same(focal(p.reshape(-1, 1, 1), t.reshape(-1, 1, 1), reduce=False), fx['out/focal_extreme_per_pixel'].flatten())
    focal(p, t).backward(); assert p.grad.isfinite().all()

def test_on_a_sigmoid_map(fx):
    s, t = fx['in/visualad_map'].sigmoid(), fx['in/focal_target']
    same(focal(s, t), fx['out/visualad_focal_on_sigmoid_map']); same(dice(s, t), fx['out/visualad_dice_on_sigmoid_map'])

def test_dice(fx):
    x, t = fx['in/dice_input'].clone().requires_grad_(), fx['in/dice_target']
    loss = dice(x, t); loss.backward()
    same(loss, fx['out/dice_visualad']); same(loss, fx['out/dice_vip2']); same(x.grad, fx['out/dice_grad_input'])
    same(dice(x[:1], 0*t[:1]), fx['out/dice_empty_target']); same(dice(0*x, 0*t), fx['out/dice_zero_input_empty_target'])

def test_dice_of_one_picture_is_the_correct_one(fx):
    x, t = fx['in/dice_input'], fx['in/dice_target']
    values = dice(x, t, reduce=False)
    i = int((values - fx['out/dice_vip2_batch_of_one_correct']).abs().argmin())
    same(dice(x[i:i+1], t[i:i+1]), fx['out/dice_vip2_batch_of_one_correct'])
    same(dice(x[i], t[i]), fx['out/dice_vip2_batch_of_one_squeezed'])          # what the squeeze makes of it: rows as pictures

def test_token_margin(fx):
    a, n = fx['in/contrast_anomaly'], fx['in/contrast_normal']
    same(token_margin(a, n), fx['out/contrast_margin05'])
    same(token_margin(a, n, margin=1., reduce=False), 1 + fx['out/contrast_cosine'])
    assert token_margin(a, n, reduce=False)[1] == 0

def test_image_bce(fx):
    score = pool_top(fuse(fx['in/visualad_maps'].transpose(0, 1), 'sum'))      # VisualAD eq. 9, ceil
    same(score, fx['out/visualad_image_score']); same(image_bce(score, fx['in/labels']), fx['out/visualad_image_bce'])

def test_vip2_layer(fx):
    p, t = fx['in/vip2_layer_map'], fx['in/focal_target']
    same(focal(p[:, 1], t) + dice(p[:, 1], t) + dice(p[:, 0], 1 - t), fx['out/vip2_layer_loss'])

# without fixtures

def maps(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 6, 7, generator=g), (torch.rand(n, 6, 7, generator=g) > .7).float()

@pytest.mark.parametrize('loss', [focal, dice])
def test_some_pictures_without_masks(loss):
    (p, t), has = maps(), torch.tensor([True, False, True, False])
    torch.testing.assert_close(loss(p[has], t[has]), loss(p, t, reduce=False)[has].mean())
    torch.testing.assert_close(loss(p, t), loss(p, t, reduce=False).mean())

def test_gradients():
    p, t = (x.double() for x in maps()); p.requires_grad_()
    a, n = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    assert torch.autograd.gradcheck(lambda p: focal(p, t), p) and torch.autograd.gradcheck(lambda p: dice(p, t), p)
    assert torch.autograd.gradcheck(token_margin, (a, n)) and torch.autograd.gradcheck(lambda x: image_bce(x, torch.tensor([0, 1, 1])), torch.randn(3, dtype=torch.float64, requires_grad=True))

def test_half_precision_is_widened():
    p, t = torch.rand(1, 518, 518), (torch.rand(1, 518, 518) > .99).float()
    for loss in (focal, dice):
        low = loss(p.bfloat16(), t)
        assert low.dtype == torch.float32 and abs(low - loss(p.bfloat16().float(), t)) < 1e-6

def test_shapes_are_checked():
    p, t = maps()
    for f in (focal, dice):
        with pytest.raises(ConfigError, match='cannot be compared with masks of shape'): f(p, t[:, :3])
    with pytest.raises(ConfigError, match='cannot be compared'): image_bce(torch.zeros(3), torch.zeros(2))
