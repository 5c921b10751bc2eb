r"""Losses and penalties of generative adversarial networks: pure functions, one number per sample.

With the logits d = D(x) of real images and d' = D(G(z)) of generated ones, and the logistic function S, so that S(d)
is the probability that x is real,

    kind              discriminator                             generator
    minimax           -log S(d) - log(1 - S(d'))                log(1 - S(d'))       Goodfellow et al. 2014, Eq. 1
    non_saturating    -log S(d) - log(1 - S(d'))                -log S(d')           Goodfellow et al. 2014, Sec. 3
    least_squares     1/2 (d - 1)^2 + 1/2 d'^2                  1/2 (d' - 1)^2       Mao et al. 2017, Eq. 9
    wasserstein       d' - d                                    -d'                  Arjovsky et al. 2017, Eqs. 2, 3
    hinge             relu(1 - d) + relu(1 + d')                -d'                  Lim & Ye 2017

Both players minimise, so the discriminator's are the papers' with the other sign. The gradient of the generator's loss
with respect to d' is -S(d') for the first, which vanishes as the discriminator sees through a sample: 3.4e-4 of the
greatest at d' = -8. That of the second is -S(-d'), which is -1 there. A discriminator of several logits per image, one
for each patch, has the mean of its patches.

The best discriminator at each point, where the real density is p and the other q, and what its loss is then:

    minimax, non_saturating    S(d) = p / (p + q)                2 log 2 - 2 JSD(p, q)
    least_squares              d = p / (p + q)                   1/2 sum p q / (p + q)
    hinge                      d = sign(p - q)                   2 sum min(p, q)
    wasserstein                unbounded, and so it needs        over 1-Lipschitz d: -W_1(p, q)

one of

    clip_weights_       each weight into [-c, c] after each step; c = 0.01              Arjovsky et al. 2017, Alg. 1
    gradient_penalty    (||grad D(x^)|| - 1)^2 at x^ = alpha x + (1 - alpha) G(z)       Gulrajani et al. 2017, Eq. 3
    r1_penalty          1/2 ||grad D(x)||^2 at real images, for any kind                Mescheder et al. 2018, Sec. 4.1

with weights that the caller multiplies by, 10 for the gradient penalty and gamma for R1, whose 1/2 is in the function.
For a discriminator with text there are also real images with the text of others (Reed et al. 2016, Alg. 1):

    matching            -log S(d) - 1/2 (log(1 - S(d_mismatched)) + log(1 - S(d')))     likewise for each kind

The log-sigmoids are computed from the logits, so nothing overflows or is rounded to log 0; do not put a sigmoid at the
end of a discriminator. Half precision is computed in float32.

    symbol   code             shape      meaning
    d        real_logits      (B, *)     unbounded, high for real
    d'       fake_logits      (B, *)     likewise of generated images
    alpha    alpha            (B,)       where between an image and a generated one, in [0, 1], one number per pair

Sources: Goodfellow et al. 2014, "Generative Adversarial Networks", arXiv:1406.2661; Mao et al. 2017, "Least Squares
Generative Adversarial Networks", arXiv:1611.04076; Arjovsky, Chintala & Bottou 2017, "Wasserstein GAN",
arXiv:1701.07875; Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028; Lim & Ye 2017,
"Geometric GAN", arXiv:1705.02894; Mescheder, Geiger & Nowozin 2018, "Which Training Methods for GANs do actually
Converge?", arXiv:1801.04406; Reed et al. 2016, "Generative Adversarial Text to Image Synthesis", arXiv:1605.05396.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, relu

from annealers.losses import mean_flat
from annealers.schedulers.gaussian_path import working_dtype

GANLoss = Literal["minimax", "non_saturating", "least_squares", "wasserstein", "hinge"]
GAN_LOSSES: tuple[str, ...] = get_args(GANLoss)
Critic = Callable[[torch.Tensor], torch.Tensor]  # images (B, *) to logits (B, *)

# ---- losses ---------------------------------------------------------------------------------------------------------


def discriminator_loss(kind: GANLoss, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the discriminator minimises.

    Args:
        kind: One of `GAN_LOSSES`.
        real_logits: d of real images, (B, *).
        fake_logits: d' of generated images that are detached from the generator, (B, *).

    Returns:
        One loss per pair, (B,), in at least float32.

    Raises:
        ValueError: If the kind is unknown, or the shapes differ.

    Example:
        >>> real, fake = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [0.0]])
        >>> discriminator_loss("hinge", real, fake)
        tensor([0.0000, 1.5000])
    """
    _check_shapes(real_logits=real_logits, fake_logits=fake_logits)
    return _on_real(kind, real_logits) + _on_fake(kind, fake_logits)


def matching_discriminator_loss(
    kind: GANLoss, real_logits: torch.Tensor, mismatched_logits: torch.Tensor, fake_logits: torch.Tensor
) -> torch.Tensor:
    """What a discriminator of images with text minimises: a real image with the wrong text is as bad as a false one.

    The two are half each, so that real and not real weigh the same (Reed et al. 2016, Alg. 1).

    Args:
        kind: One of `GAN_LOSSES`.
        real_logits: Of real images with their text, (B, *).
        mismatched_logits: Of real images with the text of others, (B, *).
        fake_logits: Of generated images with the text they were generated from, (B, *).

    Returns:
        One loss per triple, (B,), in at least float32.

    Raises:
        ValueError: If the kind is unknown, or the shapes differ.
    """
    _check_shapes(real_logits=real_logits, mismatched_logits=mismatched_logits, fake_logits=fake_logits)
    return _on_real(kind, real_logits) + 0.5 * (_on_fake(kind, mismatched_logits) + _on_fake(kind, fake_logits))


def generator_loss(kind: GANLoss, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the generator minimises.

    Args:
        kind: One of `GAN_LOSSES`.
        fake_logits: d' of generated images, through a discriminator that is not to learn from it, (B, *).

    Returns:
        One loss per sample, (B,), in at least float32.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> logit = torch.tensor([-8.0], requires_grad=True)  # a sample that is seen through
        >>> [torch.autograd.grad(generator_loss(kind, logit).sum(), logit)[0].item() for kind in GAN_LOSSES[:2]]
        [-0.00033535013790242374, -0.9996646642684937]
    """
    _check_shapes(fake_logits=fake_logits)
    d = fake_logits.to(working_dtype(fake_logits))
    if kind == "minimax":
        return mean_flat(logsigmoid(-d))
    if kind == "non_saturating":
        return mean_flat(-logsigmoid(d))
    if kind == "least_squares":
        return mean_flat(0.5 * (d - 1) ** 2)
    if kind in ("wasserstein", "hinge"):
        return mean_flat(-d)
    raise _unknown(kind)


def _on_real(kind: GANLoss, logits: torch.Tensor) -> torch.Tensor:
    """The part of the discriminator's loss that real images have, (B,)."""
    d = logits.to(working_dtype(logits))
    if kind in ("minimax", "non_saturating"):
        return mean_flat(-logsigmoid(d))
    if kind == "least_squares":
        return mean_flat(0.5 * (d - 1) ** 2)
    if kind == "wasserstein":
        return mean_flat(-d)
    if kind == "hinge":
        return mean_flat(relu(1 - d))
    raise _unknown(kind)


def _on_fake(kind: GANLoss, logits: torch.Tensor) -> torch.Tensor:
    """The part of the discriminator's loss that all other images have, (B,)."""
    d = logits.to(working_dtype(logits))
    if kind in ("minimax", "non_saturating"):
        return mean_flat(-logsigmoid(-d))
    if kind == "least_squares":
        return mean_flat(0.5 * d**2)
    if kind == "wasserstein":
        return mean_flat(d)
    if kind == "hinge":
        return mean_flat(relu(1 + d))
    raise _unknown(kind)


# ---- what keeps a critic smooth -------------------------------------------------------------------------------------


def gradient_penalty(critic: Critic, real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """(||grad D(x^)|| - 1)^2 at x^ = alpha x + (1 - alpha) G(z), without a weight; 10 in the paper.

    Computed in float32 with autocast off. A module that `Accelerator.prepare` returned switches it on again in its own
    forward, unseen from here: pass the class's forward on the bare module, `lambda x: type(D).forward(D, x).logits`.

    Args:
        critic: D, images (B, *) to logits (B, *), in which no sample depends on another, so without batch
            normalisation; of several logits per image the mean is taken.
        real: x, (B, *).
        fake: G(z), (B, *); the generator gets no gradient.
        alpha: Uniform on [0, 1], one for each pair, (B,).

    Returns:
        One penalty per pair, (B,). Where gradients are enabled it has a graph back to the parameters of the critic.

    Raises:
        ValueError: If a shape does not fit, alpha is not in [0, 1] (which is looked at on a CPU alone), or the critic
            computes in half precision.
        RuntimeError: Inside `torch.inference_mode`, where there is no autograd; `torch.no_grad` is fine.

    Example:
        >>> real, fake = torch.randn(3, 2), torch.randn(3, 2)
        >>> gradient_penalty(lambda x: x @ torch.tensor([3.0, 4.0]), real, fake, alpha=torch.rand(3))
        tensor([16., 16., 16.])
    """
    _check_shapes(real=real, fake=fake)
    if alpha.shape != real.shape[:1]:
        raise ValueError(f"alpha must be one number per pair, ({len(real)},), got {tuple(alpha.shape)}")
    known = alpha.device.type == "cpu"  # to look at values elsewhere is to wait for the device
    if known and not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"alpha must lie in [0, 1], got {alpha.min().item()} to {alpha.max().item()}")
    dtype = torch.promote_types(working_dtype(real), working_dtype(fake))
    x, g = real.detach().to(dtype), fake.detach().to(dtype)
    alpha = alpha.detach().to(x).reshape((-1,) + (1,) * (x.ndim - 1))
    norm = torch.linalg.vector_norm(_input_gradient(critic, alpha * x + (1 - alpha) * g), dim=1)
    return (norm - 1) ** 2


def r1_penalty(critic: Critic, real: torch.Tensor) -> torch.Tensor:
    """1/2 ||grad D(x)||^2 at real images, without its weight gamma.

    Computed in float32 with autocast off; see `gradient_penalty` for the critic and what is raised.

    Args:
        critic: D, images (B, *) to logits (B, *).
        real: x, (B, *).

    Returns:
        One penalty per sample, (B,).

    Example:
        >>> r1_penalty(lambda x: x @ torch.tensor([3.0, 4.0]), torch.randn(2, 2))
        tensor([12.5000, 12.5000])
    """
    _check_shapes(real=real)
    return 0.5 * _input_gradient(critic, real.detach().to(working_dtype(real))).square().sum(dim=1)


@torch.no_grad()
def clip_weights_(module: nn.Module, limit: float) -> None:
    """Clamps each parameter of a critic into [-limit, limit], in place; the paper's limit is 0.01.

    Raises:
        ValueError: If the limit is not positive.
    """
    if not limit > 0:
        raise ValueError(f"the limit of the weights must be positive, got {limit}")
    for parameter in module.parameters():
        parameter.clamp_(-limit, limit)


def _input_gradient(critic: Critic, x: torch.Tensor) -> torch.Tensor:
    """grad D(x) of each sample, (B, *) -> (B, d)."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a penalty needs autograd, which torch.inference_mode takes away: use torch.no_grad")
    trains = torch.is_grad_enabled()
    no_autocast = torch.autocast(x.device.type, enabled=False)
    # Of the kernels of attention, the plain one can be differentiated twice.
    with torch.enable_grad(), no_autocast, sdpa_kernel(SDPBackend.MATH):
        x.requires_grad_()
        logits = critic(x)
        if logits.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"the critic must return logits for each of {len(x)} images, got shape {tuple(logits.shape)}"
            )
        if logits.dtype != working_dtype(logits):
            raise ValueError(
                f"the critic must compute its penalty in float32, got logits of {logits.dtype}; is autocast switched "
                "on within it?"
            )
        (gradient,) = torch.autograd.grad(mean_flat(logits).sum(), x, create_graph=trains)
    return gradient.reshape(len(x), x.shape[1:].numel())


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_shapes(**tensors: torch.Tensor) -> None:
    """All must have one shape, (B, *)."""
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"need one shape (B, *) for all, got {shapes}")
    if any(shape == () for shape in shapes.values()):
        raise ValueError(f"need an axis of samples, (B, *), got {shapes}")


def _unknown(kind: str) -> ValueError:
    return ValueError(f"kind must be one of {', '.join(GAN_LOSSES)}, got {kind!r}")
