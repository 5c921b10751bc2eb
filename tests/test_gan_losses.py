r"""Losses of generative adversarial networks against values of hand, the optima of discrete laws, and closed forms.

Laws of six points make expectations exact: each pair of a real and a generated point counts with its probability.
"""

import doctest
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance
from torch import nn
from torch.func import functional_call

from annealers import gan_losses
from annealers.gan_losses import (
    GAN_LOSSES,
    clip_weights_,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    matching_discriminator_loss,
    r1_penalty,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(count, seed=0, dtype=torch.float64):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[:, None]


# ---- values and gradients -------------------------------------------------------------------------------------------

TABLE = [  # kind, d, d', of the discriminator, of the generator; S(ln 3) = 3/4, S(-ln 4) = 1/5
    ("minimax", LN3, -LN4, math.log(4 / 3) + math.log(5 / 4), math.log(4 / 5)),
    ("non_saturating", LN3, -LN4, math.log(4 / 3) + math.log(5 / 4), math.log(5)),
    ("least_squares", 3.0, -2.0, 2.0 + 2.0, 4.5),
    ("wasserstein", 3.0, -2.0, -5.0, 2.0),
    ("hinge", 0.25, -0.5, 0.75 + 0.5, 0.5),
    ("hinge", 1.5, -1.5, 0.0, 1.5),
    ("hinge", -1.0, 2.0, 2.0 + 3.0, -2.0),
]


@pytest.mark.parametrize(("kind", "real", "fake", "discriminator", "generator"), TABLE)
def test_losses_have_the_values_of_hand(kind, real, fake, discriminator, generator):
    real, fake = column(real, LN3), column(fake, -LN4)
    assert discriminator_loss(kind, real, fake)[0].item() == pytest.approx(discriminator, rel=1e-14, abs=1e-14)
    assert generator_loss(kind, fake)[0].item() == pytest.approx(generator, rel=1e-14)
    assert discriminator_loss(kind, real, fake).shape == generator_loss(kind, fake).shape == (2,)


MATCHING = [  # d = ln 3, of the wrong text ln 2, d' = -ln 4: S = 3/4, 2/3, 1/5; then 3, 1, -2
    ("non_saturating", (LN3, LN2, -LN4), math.log(4 / 3) + 0.5 * math.log(3) + 0.5 * math.log(5 / 4)),
    ("minimax", (LN3, LN2, -LN4), math.log(4 / 3) + 0.5 * math.log(3) + 0.5 * math.log(5 / 4)),
    ("least_squares", (3.0, 1.0, -2.0), 2.0 + 0.25 + 1.0),
    ("wasserstein", (3.0, 1.0, -2.0), -3.0 + 0.5 - 1.0),
    ("hinge", (0.5, 1.0, -0.5), 0.5 + 1.0 + 0.25),
]


@pytest.mark.parametrize(("kind", "logits", "expected"), MATCHING)
def test_a_real_image_with_the_wrong_text_counts_half_of_what_is_not_real(kind, logits, expected):
    loss = matching_discriminator_loss(kind, *(column(d, d) for d in logits))
    assert loss.tolist() == [pytest.approx(expected, rel=1e-14)] * 2


GRADIENTS = {  # of the generator's loss, at logits -40, -8, 0, 8, 40
    "minimax": [-4.248354255291589e-18, -3.3535013046647811e-4, -0.5, -0.99966464986953352, -1.0],
    "non_saturating": [-1.0, -0.99966464986953352, -0.5, -3.3535013046647811e-4, -4.248354255291589e-18],
    "least_squares": [-41.0, -9.0, -1.0, 7.0, 39.0],
    "wasserstein": [-1.0] * 5,
    "hinge": [-1.0] * 5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_the_minimax_generator_learns_nothing_where_it_is_seen_through_and_the_others_do(kind, dtype):
    logits = column(-40, -8, 0, 8, 40, dtype=dtype).requires_grad_()
    generator_loss(kind, logits).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert logits.grad.flatten().tolist() == pytest.approx(GRADIENTS[kind], rel=tolerance, abs=0)


@pytest.mark.parametrize("kind", ["minimax", "non_saturating"])
def test_a_discriminator_that_is_wrong_is_pushed_and_one_that_is_right_is_let_be(kind):
    real, fake = (column(-40, 40, dtype=torch.float32).requires_grad_() for _ in range(2))
    loss = discriminator_loss(kind, real, fake)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([40.0, 40.0])
    assert real.grad.flatten().tolist() == pytest.approx([-1.0, -4.2483543e-18], rel=1e-6, abs=0)
    assert fake.grad.flatten().tolist() == pytest.approx([4.2483543e-18, 1.0], rel=1e-6, abs=0)


def test_the_logarithms_keep_their_digits_far_out():
    far = column(30.0)  # log(1 + exp(-30)), of which a threshold would make 0 or 30
    expected = pytest.approx(9.3576229688393e-14, rel=1e-12, abs=0)
    assert generator_loss("non_saturating", far).item() == expected
    assert -generator_loss("minimax", -far).item() == expected
    assert discriminator_loss("minimax", far, -40 * far).item() == expected
    assert discriminator_loss("minimax", 40 * far, -far).item() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_half_precision_is_computed_in_single(kind, dtype):
    real, fake = (column(*values, dtype=dtype) for values in ((40.0, -40.0, 600.0), (-40.0, 600.0, 2.3)))
    for loss, single in (
        (discriminator_loss(kind, real, fake), discriminator_loss(kind, real.float(), fake.float())),
        (generator_loss(kind, fake), generator_loss(kind, fake.float())),
        (matching_discriminator_loss(kind, real, fake, fake), discriminator_loss(kind, real.float(), fake.float())),
    ):
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        torch.testing.assert_close(loss, single)


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_the_logits_of_an_image_are_averaged_whatever_their_shape(kind):
    real, fake = normal(3, 12), normal(3, 12, seed=1)
    singly = discriminator_loss(kind, real.flatten(), fake.flatten()).reshape(3, 12).mean(dim=1)
    shaped = generator_loss(kind, fake.flatten()).reshape(3, 12).mean(dim=1)
    for shape in ((3, 12), (3, 1, 3, 4), (3, 1, 12)):
        torch.testing.assert_close(discriminator_loss(kind, real.reshape(shape), fake.reshape(shape)), singly)
        torch.testing.assert_close(generator_loss(kind, fake.reshape(shape)), shaped)


# ---- the best discriminator -----------------------------------------------------------------------------------------

P = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.08, 0.02], dtype=torch.float64)
Q = torch.tensor([0.05, 0.10, 0.25, 0.10, 0.10, 0.40], dtype=torch.float64)
PLACES = torch.tensor([-2.0, -1.5, 0.0, 0.3, 1.0, 4.0], dtype=torch.float64)


def expected_loss(kind, logits):
    """Of a discriminator that has one logit at each point."""
    real, fake = logits.repeat_interleave(6), logits.repeat(6)
    return (P.repeat_interleave(6) * Q.repeat(6) * discriminator_loss(kind, real, fake)).sum()


def trained(kind):
    logits = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(kind, logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach()


@pytest.mark.parametrize("kind", ["minimax", "non_saturating"])
def test_the_best_discriminator_knows_the_posterior_and_its_loss_the_jensen_shannon_divergence(kind):
    logits = trained(kind)
    torch.testing.assert_close(logits.sigmoid(), P / (P + Q), atol=1e-6, rtol=0)
    divergence = jensenshannon(P.numpy(), Q.numpy()) ** 2
    assert divergence > 0.1  # far from the trivial 2 log 2
    assert expected_loss(kind, logits).item() == pytest.approx(2 * LN2 - 2 * divergence, rel=1e-9)


def test_the_best_least_squares_discriminator_is_the_posterior_itself():
    logits = trained("least_squares")
    torch.testing.assert_close(logits, P / (P + Q), atol=1e-6, rtol=0)
    expected = 0.5 * (P * Q / (P + Q)).sum()
    assert expected_loss("least_squares", logits).item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_best_hinge_discriminator_is_a_sign_and_its_loss_twice_the_overlap():
    steps = torch.arange(-12, 13, dtype=torch.float64) / 4
    logits = torch.zeros(6, dtype=torch.float64)
    for point in range(6):  # the loss is a sum over the points
        losses = [expected_loss("hinge", torch.where(torch.arange(6) == point, d, logits)) for d in steps]
        logits[point] = steps[torch.stack(losses).argmin()]
    assert logits.tolist() == (P - Q).sign().tolist()
    overlap = torch.minimum(P, Q).sum()
    assert expected_loss("hinge", logits).item() == pytest.approx(2 * overlap.item(), rel=1e-12)


def test_the_best_critic_of_slope_one_measures_the_earth_movers_distance():
    distance = wasserstein_distance(PLACES, PLACES, P, Q)
    gaps, surplus = PLACES.diff(), (P - Q).cumsum(0)[:-1]  # what has to be carried over each gap
    potential = torch.cat([torch.zeros(1, dtype=torch.float64), (-surplus.sign() * gaps).cumsum(0)])
    assert expected_loss("wasserstein", potential).item() == pytest.approx(-distance, rel=1e-12)
    for slopes in (
        2 * torch.rand(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    ).unbind():
        other = torch.cat([torch.zeros(1, dtype=torch.float64), (slopes * gaps).cumsum(0)])
        assert expected_loss("wasserstein", other) > -distance


# ---- penalties ------------------------------------------------------------------------------------------------------


def images(count=4, seed=0, dtype=torch.float64):
    return normal(count, 2, 4, 4, seed=seed, dtype=dtype), normal(count, 2, 4, 4, seed=seed + 1, dtype=dtype)


def network(dtype=torch.float64):
    """Convolutions and a smooth activation, so that finite differences are good ones."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 1)
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4, 3), (5, 2, 2, 2, 2)])
def test_penalties_of_a_linear_critic_are_closed_forms(shape):
    real, fake, weight = normal(*shape), normal(*shape, seed=1), 3 * normal(*shape[1:], seed=2)

    def critic(x):
        return (x * weight).reshape(5, -1).sum(dim=1, keepdim=True) + 7

    norm = weight.square().sum().sqrt().item()
    assert gradient_penalty(critic, real, fake, uniform(5)).tolist() == [pytest.approx((norm - 1) ** 2, rel=1e-13)] * 5
    assert r1_penalty(critic, real).tolist() == [pytest.approx(norm**2 / 2, rel=1e-13)] * 5


def test_the_gradient_is_penalised_between_each_pair_where_its_own_alpha_says():
    (real, fake), alpha = images(), torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    penalty = gradient_penalty(lambda x: 0.5 * x.square().sum(dim=(1, 2, 3)), real, fake, alpha)  # gradient x^
    for i, a in enumerate(alpha.tolist()):
        norm = (a * real[i] + (1 - a) * fake[i]).norm().item()
        assert penalty[i].item() == pytest.approx((norm - 1) ** 2, rel=1e-12)


def test_one_pair_with_many_alphas_has_as_many_penalties():
    real, fake = (x[:1].expand(64, -1, -1, -1) for x in images())
    critic, alpha = network(), uniform(64)
    penalties = gradient_penalty(critic, real, fake, alpha)
    assert len(penalties.unique()) == 64
    shared = gradient_penalty(critic, real, fake, alpha[:1].expand(64))
    assert penalties.std() > 1e-3 and shared.std() < 1e-12


def test_r1_is_of_the_gradient_at_each_real_image():
    real, _ = images()
    matrix = normal(32, 32, seed=5)
    critic = lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x.flatten(1), matrix, x.flatten(1))  # noqa: E731
    gradient = real.flatten(1) @ (matrix + matrix.T) / 2
    torch.testing.assert_close(r1_penalty(critic, real), 0.5 * gradient.square().sum(dim=1))


def test_a_penalty_is_of_the_mean_of_the_logits_as_the_losses_are():
    (real, fake), weights = images(), normal(6, 32, seed=3)
    norm = weights.mean(dim=0).norm().item()

    def patches(x):
        return (x.flatten(1) @ weights.T).reshape(4, 1, 2, 3)

    assert gradient_penalty(patches, real, fake, uniform(4)).tolist() == [pytest.approx((norm - 1) ** 2)] * 4
    assert r1_penalty(patches, real).tolist() == [pytest.approx(norm**2 / 2)] * 4


@pytest.mark.parametrize("kind", ["gradient_penalty", "r1"])
def test_the_gradient_of_a_penalty_is_that_of_finite_differences(kind):
    (real, fake), alpha, net = images(2), uniform(2), network()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def penalty(*values):
        def critic(x):
            return functional_call(net, dict(zip(names, values, strict=True)), (x,))

        return gradient_penalty(critic, real, fake, alpha) if kind == "gradient_penalty" else r1_penalty(critic, real)

    # A last bias moves no gradient; it may be unused in the graph.
    assert torch.autograd.gradcheck(penalty, parameters, eps=1e-6, atol=1e-8, rtol=1e-5)
    gradients = torch.autograd.grad(penalty(*parameters).sum(), parameters[:-1])
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)


def test_a_critic_without_slope_has_a_finite_gradient():
    (real, fake), weight = images(), torch.zeros(32, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ weight, real, fake, uniform(4))
    penalty.sum().backward()
    assert penalty.tolist() == [1.0] * 4 and weight.grad.isfinite().all()


def test_a_pair_is_penalised_whoever_else_is_in_the_batch():
    (real, fake), alpha, critic = images(), uniform(4), network()
    together = gradient_penalty(critic, real, fake, alpha), r1_penalty(critic, real)
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(gradient_penalty(critic, real[one], fake[one], alpha[one]), together[0][one])
        torch.testing.assert_close(r1_penalty(critic, real[one]), together[1][one])


def test_a_penalty_teaches_the_critic_alone():
    (real, fake), alpha = images(), uniform(4)
    scale, net = torch.ones((), dtype=torch.float64, requires_grad=True), network()
    real = real.requires_grad_()
    (gradient_penalty(net, real, scale * fake, alpha) + r1_penalty(net, real)).sum().backward()
    assert scale.grad is None and real.grad is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in list(net.parameters())[:-1])


def test_without_gradients_a_penalty_is_the_same_and_has_no_graph():
    (real, fake), alpha, net = images(), uniform(4), network()
    expected = gradient_penalty(net, real, fake, alpha), r1_penalty(net, real)
    assert all(penalty.requires_grad for penalty in expected)
    with torch.no_grad():
        measured = gradient_penalty(net, real, fake, alpha), r1_penalty(net, real)
    assert not any(penalty.requires_grad for penalty in measured)
    torch.testing.assert_close(measured, expected)
    assert not real.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        r1_penalty(net, real)


def test_a_critic_with_attention_can_be_differentiated_twice():
    torch.manual_seed(0)
    project = nn.Linear(4, 4, dtype=torch.float64)

    def critic(x):
        tokens = project(x.reshape(len(x), 1, 8, 4))
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).square().sum(dim=(1, 2, 3))

    real, fake = images()
    (gradient_penalty(critic, real, fake, uniform(4)) + r1_penalty(critic, real)).sum().backward()
    assert project.weight.grad.abs().max() > 0


# ---- mixed precision ------------------------------------------------------------------------------------------------


def gradients_of(penalty, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(penalty.sum(), list(net.parameters())[:-1])])


def under_autocast(wrapped):
    """A network with a record of the types it computes in, and as Accelerate prepares it if `wrapped`."""
    net, seen = network(torch.float32), []
    net[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    if wrapped:
        net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
    return net, seen


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["gradient_penalty", "r1"])
def test_penalties_are_in_single_precision_under_autocast_which_then_goes_on(kind, wrapped):
    (real, fake), alpha = images(dtype=torch.float32), uniform(4, dtype=torch.float32)
    net, seen = under_autocast(wrapped)

    def penalty(critic):
        return gradient_penalty(critic, real, fake, alpha) if kind == "gradient_penalty" else r1_penalty(critic, real)

    with torch.autocast("cpu", torch.bfloat16):
        net(real)
        mixed = penalty(lambda x: type(net).forward(net, x))
        net(real)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert mixed.dtype == torch.float32
    plain = network(torch.float32)
    expected, ours = gradients_of(penalty(plain), plain), gradients_of(mixed, net)
    assert (ours - expected).norm() < 1e-6 * expected.norm()
    rough = network(torch.float32).bfloat16().float()  # as coarse as one rounding of the weights: what is at stake
    assert (gradients_of(penalty(rough), rough) - expected).norm() > 1e-3 * expected.norm()


def test_a_penalty_in_half_precision_is_refused():
    (real, fake), net = images(dtype=torch.float32), under_autocast(wrapped=True)[0]
    with pytest.raises(ValueError, match="in float32, got logits of torch.bfloat16; is autocast switched on"):
        gradient_penalty(net, real, fake, uniform(4))
    with pytest.raises(ValueError, match="got logits of torch.bfloat16"):
        r1_penalty(net, real)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_penalised_in_single(dtype):
    (real, fake), net = images(dtype=torch.float32), network(torch.float32)
    real, fake, alpha = real.to(dtype), fake.to(dtype), uniform(4, dtype=torch.float32)
    penalty = gradient_penalty(net, real, fake, alpha), r1_penalty(net, real)
    assert all(values.dtype == torch.float32 for values in penalty)
    torch.testing.assert_close(penalty[0], gradient_penalty(net, real.float(), fake.float(), alpha))
    torch.testing.assert_close(penalty[1], r1_penalty(net, real.float()))


# ---- weights --------------------------------------------------------------------------------------------------------


def test_clipping_moves_what_is_outside_to_the_edge_and_nothing_else():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[0].weight.data = torch.tensor([[0.05, 0.3, -0.2], [-0.1, 7.0, -0.01]])
    before = {name: values.clone() for name, values in net.state_dict().items()}
    parameters = [p.data_ptr() for p in net.parameters()]
    clip_weights_(net, 0.1)
    assert [p.data_ptr() for p in net.parameters()] == parameters  # those of the optimizer
    names = dict(net.named_parameters())
    for name, values in net.state_dict().items():
        expected = np.clip(before[name].numpy(), -0.1, 0.1) if name in names else before[name].numpy()
        assert np.array_equal(values.numpy(), expected.astype(values.numpy().dtype)), name
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())


@pytest.mark.parametrize("limit", [0.0, -0.01, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="must be positive, got"):
        clip_weights_(nn.Linear(1, 1), limit)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_named_with_those_there_are():
    logits = torch.zeros(2, 1)
    message = "one of minimax, non_saturating, least_squares, wasserstein, hinge, got 'wgan'"
    for call in (
        lambda: discriminator_loss("wgan", logits, logits),
        lambda: generator_loss("wgan", logits),
        lambda: matching_discriminator_loss("wgan", logits, logits, logits),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_shapes_that_differ_are_refused():
    a, b = torch.zeros(2, 1), torch.zeros(2, 1, 3, 3)
    with pytest.raises(ValueError, match=r"one shape .* {'real_logits': \(2, 1\), 'fake_logits': \(2, 1, 3, 3\)"):
        discriminator_loss("hinge", a, b)
    with pytest.raises(ValueError, match=r"'mismatched_logits': \(2, 1, 3, 3\)"):
        matching_discriminator_loss("hinge", a, b, a)
    with pytest.raises(ValueError, match=r"'real': \(2, 1\), 'fake': \(2, 1, 3, 3\)"):
        gradient_penalty(lambda x: x, a, b, torch.rand(2))
    with pytest.raises(ValueError, match="need an axis of samples"):
        generator_loss("hinge", torch.zeros(()))
    with pytest.raises(ValueError, match="floating-point"):
        generator_loss("hinge", torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (3,)])
def test_an_alpha_that_is_not_one_per_pair_is_refused(shape):
    with pytest.raises(ValueError, match=r"one number per pair, \(4,\), got"):
        gradient_penalty(network(), *images(), torch.full(shape, 0.5))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_alpha_outside_the_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"in \[0, 1\], got"):
        gradient_penalty(network(), *images(), torch.tensor([0.0, 1.0, value, 0.5], dtype=torch.float64))


def test_no_value_on_a_device_is_waited_for(monkeypatch):
    """Tensors without values stand for those of a device that is still at work."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # of which there is none without values
    x, alpha = torch.randn(4, 3, device="meta"), torch.rand(4, device="meta")
    assert gradient_penalty(lambda x: x.square().sum(dim=1), x, x, alpha).shape == (4,)
    assert r1_penalty(lambda x: x.square().sum(dim=1), x).shape == (4,)
    for kind in GAN_LOSSES:
        assert discriminator_loss(kind, x, x).shape == generator_loss(kind, x).shape == (4,)


def test_a_critic_that_has_no_logit_for_each_image_is_refused():
    with pytest.raises(ValueError, match=r"logits for each of 4 images, got shape \(1,\)"):
        r1_penalty(lambda x: x.sum()[None], images()[0])
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        r1_penalty(lambda x: x.sum(), images()[0])


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(gan_losses, extraglobs={"torch": torch})
    assert results.failed == 0 and results.attempted >= 7
