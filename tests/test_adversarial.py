"""The adaptive weight, and that both players learn from their own loss alone."""

import doctest

import pytest
import torch
from torch import nn

from annealers import GANDiscriminator, NoisyClassifierModel, VQVAEModel
from annealers.adversarial import AdaptiveWeight, adaptive_weight, frozen, last_layer_gradient
from annealers.feature_loss import FeatureLoss
from annealers.training.train_vqvae import VQVAEObjective


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- who learns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "group", "spectral"])
def test_a_frozen_call_gives_the_same_and_a_gradient_to_its_argument_alone(norm):
    torch.manual_seed(0)
    discriminator = GANDiscriminator(in_channels=1, block_out_channels=(8, 16), norm=norm).eval()
    x, y = normal(2, 1, 8, 8).requires_grad_(), normal(2, 1, 8, 8).requires_grad_()
    logits = frozen(discriminator, x).logits
    expected = discriminator(y).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert all(p.grad is None for p in discriminator.parameters())
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert all(p.grad is not None and p.requires_grad for p in discriminator.parameters())


# ---- the adaptive weight --------------------------------------------------------------------------------------------


def test_the_adaptive_weight_makes_both_gradients_of_the_last_layer_as_long():
    weight = normal(3, 2).requires_grad_()
    features = normal(5, 3, seed=1)
    reconstruction, adversarial = (features @ weight).square().sum(), 7 * (features @ weight).sin().sum()
    gradients = [last_layer_gradient(loss, weight) for loss in (reconstruction, adversarial)]
    torch.testing.assert_close(gradients[0], 2 * features.T @ (features @ weight.detach()))
    balance = adaptive_weight(*gradients)
    assert balance.item() * gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=1e-4)
    assert not balance.requires_grad
    (reconstruction + adversarial).backward()  # the graphs are still there


@pytest.mark.parametrize(
    ("reconstruction", "adversarial", "expected"),
    [(3.0, 1.0, 3 / 1.0001), (0.0, 1.0, 0.0), (2e-4, 0.0, 2.0), (5.0, 0.0, 1e4), (1e9, 1.0, 1e4)],
)
def test_the_adaptive_weight_is_a_ratio_with_a_floor_below_and_a_ceiling(reconstruction, adversarial, expected):
    balance = adaptive_weight(torch.tensor([reconstruction]), torch.tensor([adversarial], requires_grad=True))
    assert balance.item() == pytest.approx(expected) and not balance.requires_grad


def test_the_weight_of_a_step_is_that_of_all_its_batches_and_waits_for_the_next():
    weight, batches = normal(4).requires_grad_(), normal(3, 6, 4, seed=1)

    def losses(batch):
        return (batch @ weight).square().mean(), (batch @ weight).tanh().mean()

    balance = AdaptiveWeight()
    assert balance.value == 0
    for batch in batches:
        balance.observe(*losses(batch), weight)
        assert balance.value == 0
    balance.update(micro_batches=3)
    whole = [torch.autograd.grad(loss, weight)[0] for loss in losses(batches.flatten(0, 1))]
    expected = whole[0].norm() / (whole[1].norm() + 1e-4)
    torch.testing.assert_close(balance.value, expected)
    assert list(balance.state_dict()) == ["value"]
    balance.observe(torch.zeros(()) * weight.sum(), weight.sum(), weight)
    balance.update()
    assert balance.value == 0  # the steps before are forgotten
    with pytest.raises(RuntimeError, match="no gradient was observed"):
        balance.update()


# ---- the game -------------------------------------------------------------------------------------------------------

BALANCE = 0.7


def objective_of(adversary=True, features=False, likelihood="gaussian"):
    torch.manual_seed(0)
    network = VQVAEModel(
        in_channels=1,
        sample_size=8,
        block_out_channels=(8, 8),
        latent_channels=4,
        num_vq_embeddings=8,
        likelihood=likelihood,
        mid_block_add_attention=False,
    )
    classifier = NoisyClassifierModel(sample_size=8, in_channels=1, dropout=0.5) if features else None
    discriminator = GANDiscriminator(in_channels=1, block_out_channels=(8, 16)) if adversary else None
    objective = VQVAEObjective(network, FeatureLoss(classifier) if features else None, 0.3, discriminator).train()
    if adversary:
        objective.adaptive_weight.value.fill_(BALANCE)
    return objective


def drawn(adversarial_weight=None):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    draws = {"images": images, "seen": images + 0.01, "restart_priority": torch.rand(4, 4, 4)}
    return draws if adversarial_weight is None else draws | {"adversarial_weight": adversarial_weight}


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def backward(objective, **draws):
    terms = objective(**draws)
    assert all(term.shape == (4,) for term in terms.values())
    terms["loss"].mean().backward()
    return terms


def test_before_the_adversary_starts_the_autoencoder_learns_as_without_one():
    plain, waiting = objective_of(adversary=False), objective_of()
    ours, theirs = backward(plain, **drawn()), backward(waiting, **drawn(0.0))
    assert torch.equal(ours["loss"], theirs["loss"])
    for name, gradient in gradients(plain.network).items():
        assert torch.equal(gradient, waiting.network.get_parameter(name).grad), name
    assert all(p.grad.abs().max() == 0 for p in waiting.discriminator.parameters())
    started = objective_of()
    backward(started, **drawn(0.5))
    assert any((p.grad != gradients(plain.network)[n]).any() for n, p in started.network.named_parameters())


def test_each_player_learns_from_its_own_loss_alone():
    objective, weight = objective_of(), 0.5
    backward(objective, **drawn(weight))
    other, draws = objective_of(), drawn(weight)
    output = other.network(draws["seen"], draws["restart_priority"])
    logits = other.discriminator(output.sample).logits
    autoencoder = (output.nll / 64 + 0.25 * output.commitment).mean() - weight * BALANCE * logits.mean()
    fooled = other.discriminator(output.sample.detach()).logits
    judged = other.discriminator(draws["images"]).logits
    discriminator = (1 - judged).relu().mean() + (1 + fooled).relu().mean()
    for player, loss in ((objective.network, autoencoder), (objective.discriminator, discriminator)):
        own = other.network if player is objective.network else other.discriminator
        expected = torch.autograd.grad(loss, list(own.parameters()), retain_graph=True)
        for ours, theirs in zip(player.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.grad, theirs, atol=1e-6, rtol=1e-4)


def test_the_weight_that_is_observed_balances_reconstruction_and_adversary_at_the_last_layer():
    objective = objective_of(likelihood="discretized_logistic")
    terms = backward(objective, **drawn(0.5))
    assert terms["adaptive_weight"].tolist() == [pytest.approx(BALANCE)] * 4
    objective.adaptive_weight.update()
    other, draws = objective_of(likelihood="discretized_logistic"), drawn(0.5)
    output, last = other.network(draws["seen"]), other.network.decoder.conv_out.weight
    of_nll = torch.autograd.grad(output.nll.mean() / 64, last, retain_graph=True)[0].norm()
    of_game = torch.autograd.grad(-other.discriminator(output.sample).logits.mean(), last)[0].norm()
    torch.testing.assert_close(objective.adaptive_weight.value, of_nll / (of_game + 1e-4))
    assert not terms["adaptive_weight"].requires_grad


# ---- features -------------------------------------------------------------------------------------------------------


def test_the_feature_term_reaches_the_decoder_and_not_the_feature_network():
    objective = objective_of(adversary=False, features=True)
    assert not objective.feature_loss.classifier.training  # though the objective is
    terms = backward(objective, **drawn())
    expected = terms["nll"] / 64 + 0.25 * terms["commitment"] + 0.3 * terms["features"]
    torch.testing.assert_close(terms["loss"], expected)
    assert all(not p.requires_grad and p.grad is None for p in objective.feature_loss.parameters())
    objective.zero_grad()
    objective(**drawn())["features"].sum().backward()
    assert objective.network.decoder.conv_out.weight.grad.abs().max() > 0
    assert objective.network.encoder.conv_in.weight.grad.abs().max() > 0


def test_the_distance_is_that_of_unit_features_at_each_level_and_pixel():
    torch.manual_seed(0)
    classifier = NoisyClassifierModel(sample_size=8, in_channels=1, block_out_channels=(8, 16), norm_num_groups=4)
    distance, levels = FeatureLoss(classifier), []
    for block in classifier.down_blocks:
        block.register_forward_hook(lambda _, __, output: levels.append(output[0]))
    x, y = normal(3, 1, 8, 8), normal(3, 1, 8, 8, seed=1)
    classifier(x, 0), classifier(y, 0)
    expected = torch.zeros(3)
    for f_x, f_y in zip(levels[:2], levels[2:], strict=True):
        cosine = nn.functional.cosine_similarity(f_x, f_y, dim=1)  # |a - b|^2 = 2 - 2 cos of unit vectors
        expected += (2 - 2 * cosine).mean(dim=(1, 2))
    torch.testing.assert_close(distance(x, y), expected)
    assert distance(x, x).tolist() == [0, 0, 0] and (distance(x, y) > 0).all()
    torch.testing.assert_close(distance(x[1:2], y[1:2])[0], distance(x, y)[1])


def test_a_feature_loss_stays_in_evaluation_mode():
    distance = FeatureLoss(NoisyClassifierModel(sample_size=8, in_channels=1, dropout=0.5))
    outer = nn.ModuleList([distance]).train()
    assert not any(module.training for module in outer[0].modules())
    x, y = normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=1)
    assert torch.equal(distance(x, y), distance(x, y))


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(FeatureLoss.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
