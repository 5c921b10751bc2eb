"""The divergence against traces of Jacobians by forward- and reverse-mode `torch.func`, and probes against moments.

Estimates are averaged over every probe there is, all signs or the nodes of a Gauss-Hermite rule, not over draws.
"""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from annealers.divergence import divergence, draw_probes

SHAPES = [(), (4,), (2, 2, 2)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def field(matrix):
    """A vector field whose Jacobian is neither symmetric nor diagonal."""

    def function(x):
        flat = x.reshape(len(x), -1)
        return (torch.tanh(flat @ matrix.T) * (1 + flat**2) + 0.3 * flat).reshape(x.shape)

    return function


def jacobians(function, x):
    """(B, d, d), by reverse mode and one sample at a time."""
    d = x[0].numel()
    return torch.stack([torch.func.jacrev(lambda y: function(y[None])[0])(sample).reshape(d, d) for sample in x])


def trace(jacobian):
    return jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)


def all_signs(d):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_exact_divergence_is_the_trace_of_the_jacobian(shape):
    x = draw(5, *shape, seed=1)
    function = field(draw(x[0].numel(), x[0].numel(), seed=2))
    value, div = divergence(function, x)
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close(div, trace(jacobians(function, x)))
    assert div.shape == (5,)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_rademacher_probe_is_exact_where_the_jacobian_is_diagonal(shape):
    x = draw(5, *shape, seed=1)
    _, div = divergence(torch.sin, x, draw_probes(x, 1, generator=seeded(3)))
    torch.testing.assert_close(div, torch.cos(x).reshape(5, -1).sum(1))


def test_rademacher_probes_have_no_bias_and_the_variance_that_is_stated():
    x = draw(3, 4, seed=1)
    function = field(draw(4, 4, seed=2))
    J = jacobians(function, x)
    each = torch.stack([divergence(function, x, v.expand(1, 3, 4))[1] for v in all_signs(4)])  # (16, B)
    torch.testing.assert_close(each.mean(0), trace(J))
    symmetric = (J + J.mT) ** 2 / 2
    off_diagonal = symmetric.sum((1, 2)) - trace(symmetric)
    torch.testing.assert_close(each.var(0, correction=0), off_diagonal)
    assert (off_diagonal > 0.1).all()

    probes = all_signs(4)[:, None].expand(16, 3, 4)
    torch.testing.assert_close(divergence(function, x, probes)[1], trace(J))  # all of them in one call


def test_gaussian_probes_have_no_bias_and_the_variance_that_is_stated():
    x = draw(3, 2, seed=1)
    function = field(draw(2, 2, seed=2))
    J = jacobians(function, x)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact for the fourth moments
    grid = torch.tensor(list(itertools.product(nodes, repeat=2)))
    weight = torch.tensor([a * b for a, b in itertools.product(weights / weights.sum(), repeat=2)])[:, None]
    each = torch.stack([divergence(function, x, v.expand(1, 3, 2))[1] for v in grid])
    mean = (weight * each).sum(0)
    torch.testing.assert_close(mean, trace(J))
    symmetric = (J + J.mT) ** 2 / 2
    expected = symmetric.sum((1, 2)) - trace(symmetric) + 2 * (J.diagonal(dim1=1, dim2=2) ** 2).sum(1)
    torch.testing.assert_close((weight * (each - mean) ** 2).sum(0), expected)


@pytest.mark.parametrize("probes", [None, 3])
def test_a_loss_of_the_divergence_trains_the_parameters(probes):
    x, matrix = draw(5, 3, seed=1), draw(3, 3, seed=2).requires_grad_()
    drawn = None if probes is None else draw_probes(x, probes, generator=seeded(4))
    value, div = divergence(field(matrix), x, drawn)
    (value.sum() + (div**2).sum()).backward()

    def loss(matrix):
        J = torch.func.vmap(torch.func.jacfwd(lambda y: field(matrix)(y[None])[0]))(x)
        parts = trace(J) if drawn is None else torch.einsum("kbi,bij,kbj->b", drawn, J, drawn) / probes
        return field(matrix)(x).sum() + (parts**2).sum()

    torch.testing.assert_close(matrix.grad, torch.func.grad(loss)(matrix.detach()))


def test_gradients_reach_an_x_that_wants_them_and_a_graph_is_made_only_where_gradients_are_enabled():
    x = draw(5, 3, seed=1).requires_grad_()
    _, div = divergence(lambda y: y**3, x)
    (grad,) = torch.autograd.grad(div.sum(), x)
    torch.testing.assert_close(grad, 6 * x.detach())

    matrix = draw(3, 3, seed=2).requires_grad_()
    with torch.no_grad():
        value, div = divergence(field(matrix), x)
        assert not torch.is_grad_enabled()
    assert not value.requires_grad and not div.requires_grad


def test_attention_can_be_trained_by_its_divergence():
    """The fast kernels of attention have no second derivative."""
    x, weight = draw(2, 4, 3, seed=1).float(), draw(3, 3, seed=2).float().requires_grad_()

    def attention(x, weight):
        return torch.nn.functional.scaled_dot_product_attention(x @ weight, x, x)

    _, div = divergence(lambda x: attention(x, weight), x)
    div.sum().backward()

    def exact(weight):
        return sum(trace(torch.func.jacfwd(lambda y: attention(y, weight))(s).reshape(12, 12)) for s in x[:, None])

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(div.detach().sum(), exact(weight.detach()))
        torch.testing.assert_close(weight.grad, torch.func.grad(exact)(weight.detach()), rtol=1e-4, atol=1e-4)


def test_half_precision_is_summed_in_float32():
    x = torch.zeros(2, 4097, dtype=torch.bfloat16)  # a number that bfloat16 does not have
    value, div = divergence(lambda x: 1.0 * x, x, draw_probes(x, 1, generator=seeded(0)))
    assert value.dtype == torch.bfloat16 and div.dtype == torch.float32
    assert div.tolist() == [4097.0, 4097.0]


def test_an_empty_batch_has_an_empty_divergence():
    assert divergence(torch.sin, torch.zeros(0, 3))[1].shape == (0,)
    assert divergence(torch.sin, torch.zeros(0, 3), torch.ones(2, 0, 3))[1].shape == (0,)


# ---- probes ---------------------------------------------------------------------------------------------------------


def test_probes_have_the_moments_of_their_law():
    """Mean 0, variance 1, and a fourth moment of 1 for signs and 3 for normal numbers, within 4.5 standard errors."""
    x = torch.zeros(100, 50, dtype=torch.float64)
    signs = draw_probes(x, 4, "rademacher", seeded(1))
    assert signs.shape == (4, 100, 50) and signs.dtype == torch.float64
    assert signs.unique().tolist() == [-1, 1]
    normal = draw_probes(x, 4, "gaussian", seeded(1))
    n = normal.numel()
    assert abs(signs.mean()) < 4.5 / n**0.5 and abs(normal.mean()) < 4.5 / n**0.5
    assert abs((normal**2).mean() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((normal**4).mean() - 3) < 4.5 * (96 / n) ** 0.5
    for probes in (signs, normal):  # coordinates, samples and probes are not correlated with their neighbours
        for dim in range(3):
            products = probes * probes.roll(1, dim)
            assert abs(products.mean()) < 4.5 * products.std() / n**0.5


def test_with_generators_of_their_own_the_probes_of_a_sample_do_not_depend_on_its_neighbours():
    x = torch.zeros(3, 2, 2)
    together = draw_probes(x, 2, generator=[seeded(7), seeded(8), seeded(9)])
    alone = draw_probes(x[:1], 2, generator=[seeded(8)])
    assert torch.equal(together[:, 1:2], alone)
    assert draw_probes(x.bfloat16(), 1).dtype == torch.bfloat16


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.zeros_like, lambda x: x.detach() ** 2], ids=["constant", "detached"])
def test_a_function_that_autograd_cannot_follow_is_refused(function):
    with pytest.raises(ValueError, match="does not depend on x"):
        divergence(function, torch.ones(2, 3))
    bias = torch.ones(3, requires_grad=True)  # the output has a graph, which does not lead to x
    with pytest.raises(ValueError, match="does not depend on x"):
        divergence(lambda x: function(x) + bias, torch.ones(2, 3))


def test_inference_mode_is_named_as_the_cause():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        divergence(torch.sin, torch.ones(2, 3))


def test_shapes_that_do_not_fit_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"keep the shape \(2, 3\), got \(2,\)"):
        divergence(lambda x: x.sum(1), x)
    for wrong in (torch.ones(2, 3), torch.ones(1, 2, 4), torch.ones(0, 2, 3)):
        with pytest.raises(ValueError, match=r"probes must have the shape \(K, \*\(2, 3\)\)"):
            divergence(torch.sin, x, wrong)


def test_probes_that_cannot_be_drawn_are_refused():
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"positive integer, got {count}"):
            draw_probes(torch.ones(2, 3), count)
    with pytest.raises(ValueError, match="got 'signs'"):
        draw_probes(torch.ones(2, 3), 1, "signs")
