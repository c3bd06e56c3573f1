"""The scoring room: equal to scipy where scipy has it, differentiable, and clear about bad input."""
import numpy as np, pytest, torch
from scipy.ndimage import gaussian_filter
from zsad_nb import scoring
from zsad_nb.detector import finish_map
from zsad_nb.types import ConfigError, ZsadError

@pytest.mark.parametrize('sigma', [.3, 1., 4., 8., 25.])
@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (5, 3), (37, 61), (128, 128)])
def test_gaussian_is_scipys(sigma, shape):
    m = np.random.default_rng(0).random((2, *shape), np.float32)
    want = np.stack([gaussian_filter(o, sigma, mode='reflect', truncate=4.) for o in m])
    np.testing.assert_allclose(scoring.gaussian(torch.tensor(m), sigma), want, atol=1e-5)

def test_gradients():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: finish_map(scoring.fuse(x, 'sum'), (9, 11), 3, True, 1.5), x)
    s = torch.tensor([-3., -1e-4, 0., 1e-4, 3.], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scoring.secant, s)

def test_two_class_is_the_softmax():
    cos = torch.rand(4, 9, 2)*2 - 1
    for t in (1., .07): torch.testing.assert_close(scoring.two_class(cos, t), (cos/t).softmax(-1)[..., 1], atol=1e-6, rtol=1e-5)
    assert scoring.two_class(torch.tensor([[-1., 1.]]), 1e-3).isfinite().all()

def test_finish_is_linear():
    a, b = torch.rand(2, 6, 7, dtype=torch.float64)
    how = dict(size=(30, 41), box=3, align_corners=True, sigma=3.)
    torch.testing.assert_close(finish_map(a + 2*b, **how), finish_map(a, **how) + 2*finish_map(b, **how))
    torch.testing.assert_close(finish_map(torch.ones(4, 4), **how), torch.ones(30, 41))

def test_secant_is_exact_in_float32():
    s = torch.linspace(-20, 20, 10001)
    torch.testing.assert_close(.5 + scoring.secant(s)*s, s.sigmoid(), atol=2e-7, rtol=0)
    assert scoring.secant(torch.tensor([1e30, -1e30])).isfinite().all()

def test_top_pooling():
    m = torch.rand(3, 518, 518)
    flat = m.flatten(1).sort(descending=True).values
    torch.testing.assert_close(scoring.pool_top(m), flat[:, :2684].mean(1))
    torch.testing.assert_close(scoring.pool_top(m, rounding='floor'), flat[:, :2683].mean(1))
    torch.testing.assert_close(scoring.pool_top(m, 50), flat[:, :50].mean(1))

def test_per_picture_text():
    p, t = torch.randn(3, 8, 5), torch.randn(3, 2, 5)
    got = scoring.cosine(p, t)
    for i in range(3): torch.testing.assert_close(got[i], scoring.cosine(p[i:i+1], t[i])[0])

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_bad_maps(value):
    m = torch.zeros(4, 6, 6); m[2, 3, 3] = value
    with pytest.raises(ZsadError, match='map of picture 2 of this batch has 1 values that are NaN or infinite'): scoring.check_maps(m)

@pytest.mark.parametrize('call, words', [
    (lambda: scoring.fuse(torch.rand(1, 2, 3, 3), [1.]), '1 weights for 2 layers'), (lambda: scoring.fuse(torch.rand(1, 2, 3, 3), 'max'), "'mean', 'sum', 'last'"),
    (lambda: scoring.box_mean(torch.rand(3, 3), 4), 'odd side'), (lambda: scoring.to_grid(torch.rand(5), (2, 2)), 'do not fill'),
    (lambda: scoring.pool_top(torch.rand(3, 3), 1.5), r'\(0, 1\]'), (lambda: scoring.pool_top(torch.rand(3, 3), 10), 'top 10 of 9'),
    (lambda: scoring.gaussian(torch.rand(3, 3), -1), 'negative'), (lambda: scoring.contrast(torch.rand(3)), 'two sides'), (lambda: scoring.two_class(torch.rand(2), -1.), 'above 0')])
def test_bad_settings(call, words):
    with pytest.raises(ConfigError, match=words): call()
