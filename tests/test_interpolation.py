"""Properties of the line and of the arc between latents."""

import math

import pytest
import torch

from annealers.pipelines.interpolation import INTERPOLATIONS, between, on_the_arc, on_the_line


def normal(*shape, number=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("method", INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(50, 128), (50, 2), (20, 4, 3, 3)])
def test_a_walk_begins_and_ends_at_the_latents_themselves(method, shape):
    a, b = normal(*shape, number=1), 2.5 * normal(*shape, number=2)
    walk, weights = between(a, b, 5, method)
    assert torch.equal(walk[:, 0], a) and torch.equal(walk[:, -1], b)
    assert walk.shape == (shape[0], 5, *shape[1:]) and weights.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_a_line_is_the_weighted_mean():
    a, b, weights = normal(3, 2, 2, number=1), normal(3, 2, 2, number=2), torch.tensor([0.0, 0.3, 1.0])
    expected = torch.stack([a, 0.7 * a + 0.3 * b, b], dim=1)
    torch.testing.assert_close(on_the_line(a, b, weights), expected, rtol=0, atol=1e-6)


def test_on_an_arc_the_direction_turns_and_the_length_changes_at_one_rate():
    a, b = normal(20, 6, number=1).double(), 3 * normal(20, 6, number=2).double()
    walk, weights = between(a, b, 8, "spherical")
    units = walk / walk.norm(dim=2, keepdim=True)
    turns = torch.linalg.vecdot(units[:, 1:], units[:, :-1]).arccos()  # (20, 7)
    whole = torch.linalg.vecdot(units[:, 0], units[:, -1]).arccos()
    torch.testing.assert_close(turns, (whole / 7).unsqueeze(1).expand(20, 7), rtol=0, atol=1e-9)
    lengths = on_the_line(a.norm(dim=1), b.norm(dim=1), weights)
    torch.testing.assert_close(walk.norm(dim=2), lengths, rtol=1e-12, atol=0)


def test_an_arc_stays_in_the_plane_of_its_ends():
    a, b = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]])
    angles = torch.tensor([[0.0, 30.0, 45.0, 90.0], [90.0, 120.0, 135.0, 180.0]]) * math.pi / 180
    directions = torch.stack([angles.cos(), angles.sin(), torch.zeros(2, 4)], dim=-1)
    weights = torch.tensor([0.0, 1 / 3, 0.5, 1.0])
    expected = torch.tensor([[[2.0]], [[3.0]]]) * directions
    torch.testing.assert_close(on_the_arc(a, b, weights), expected, rtol=0, atol=1e-6)


def test_an_arc_of_draws_of_the_prior_does_not_pass_near_the_origin_as_their_line_does():
    a, b, weights = normal(20, 4, 8, 8, number=1), normal(20, 4, 8, 8, number=2), torch.linspace(0, 1, 7)
    usual = 16.0  # the root of 256 dimensions
    assert (on_the_arc(a, b, weights).flatten(2).norm(dim=2) / usual - 1).abs().max() < 0.2
    assert (on_the_line(a, b, weights).flatten(2).norm(dim=2)[:, 3] / usual).max() < 0.85


def test_an_arc_of_nearly_parallel_latents_is_their_line_without_a_jump():
    a, weights = normal(1, 6).double(), torch.linspace(0, 1, 5, dtype=torch.float64)
    for angle in (0.0, 1e-8, 0.99e-3, 1.01e-3):
        side = normal(1, 6, number=2).double()
        side = side - (side * a).sum() / (a * a).sum() * a
        b = a * math.cos(angle) + side / side.norm() * a.norm() * math.sin(angle)
        torch.testing.assert_close(on_the_arc(a, b, weights), on_the_line(a, b, weights), rtol=0, atol=1e-6)


def test_between_equal_latents_is_nothing_else():
    a = normal(3, 16)
    walk, _ = between(a, a, 6, "spherical")
    torch.testing.assert_close(walk, a.unsqueeze(1).expand(3, 6, 16), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [-2.0, -4.0], "no shortest arc between opposite"),
        ([0.0, 0.0], [1.0, 0.0], "a latent of zeros"),
        ([1.0, 0.0], [0.0, 0.0], "a latent of zeros"),
    ],
)
def test_where_there_is_no_arc_it_is_refused_and_there_is_a_line(a, b, message):
    a, b = torch.tensor([a]), torch.tensor([b])
    with pytest.raises(ValueError, match=message):
        between(a, b, 3, "spherical")
    assert torch.equal(between(a, b, 3, "linear")[0][:, 1], (a + b) / 2)


def test_a_walk_of_half_precision_is_computed_in_single():
    a, b = normal(2, 8, number=1).bfloat16(), normal(2, 8, number=2).bfloat16()
    walk, weights = between(a, b, 9, "spherical")
    assert walk.dtype == weights.dtype == torch.float32
    assert torch.equal(walk, between(a.float(), b.float(), 9, "spherical")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 1}, "steps >= 2, the two ends, got 1"), ({"method": "cubic"}, "'spherical'.*, got 'cubic'")],
)
def test_a_walk_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        between(normal(2, 3), normal(2, 3), **{"steps": 3, "method": "linear"} | arguments)
