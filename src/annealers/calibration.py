r"""What a network knows at each noise level, measured on data: for the placement of steps and the variance of each.

One number per train timestep, the denoising error, decides what a step of ancestral sampling costs in the variational
bound, and so where a given number of steps is best placed (Watson et al. 2021; see `schedulers.step_placement`):

    E_t = E|x_0 - x̂_0(x_t)|^2 / d
    KL of a step t -> s = 1/2 (SNR_s - SNR_t) E_t              with the variance "fixed_small", in nats per coordinate
                          1/2 log(1 + (SNR_s - SNR_t) E_t)     with the best isotropic variance (Bao et al. 2022)

The variance of each coordinate at one state is in the derivative of the network. By Tweedie's formula of second order
(Meng et al. 2021), with the Jacobian J of x̂_0 at x_t,

    Cov[x_0 | x_t] = sigma^2 / alpha^2 Lambda,      Lambda = alpha J = I - sigma grad eps-hat,

and for random signs u the product u * (Lambda u) has the diagonal of Lambda as its mean (Bekas et al. 2007; the idea
of Hutchinson's trace estimator). Its variance at coordinate i is the sum of Lambda_ij^2 over the others, j != i: one
probe is exact where the coordinates are independent of each other given x_t.

Sources: Watson, Ho, Norouzi, Chan 2021, "Learning to Efficiently Sample from Diffusion Probabilistic Models",
arXiv:2106.03802; Bao, Li, Zhu, Zhang 2022, "Analytic-DPM", arXiv:2201.06503; Bao, Li, Sun, Zhu, Zhang 2022,
"Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models", arXiv:2206.07309; Meng,
Song, Li, Ermon 2021, "Estimating High Order Gradients of the Data Distribution by Denoising", arXiv:2111.04726; Bekas,
Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 57; Steele, Lea,
Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA (the mixing function of the default probes).

    symbol    code                      shape   meaning
    x_0       batch                     (B, *)  data
    x_t       sample                    (B, *)  state
    SNR       snr                       ()      alpha^2 / sigma^2
    E         mean                      (T,)    denoising error, in units of the data squared
    u         signs                     (B, *)  probe, +-1
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.logging import tqdm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from annealers.losses import simple_loss
from annealers.schedulers.gaussian_path import GaussianPathScheduler, standard_normal, working_dtype

PROBE_METHODS = ("jvp", "finite_difference")
DIFFERENCE_STEP = 1 / 16  # of a finite difference, in units of sigma, the scale on which a denoiser varies
SMALLEST_ERROR = 1e-30  # of data known exactly, so that it has an inverse

Generators = torch.Generator | list[torch.Generator]
Model = Callable[..., Any]


# ---- the denoising error and the placement of steps -----------------------------------------------------------------


class DenoisingError(NamedTuple):
    """The error at each train timestep, (T,), and the standard error of that mean over the samples, (T,)."""

    mean: np.ndarray
    standard_error: np.ndarray


@torch.no_grad()
def denoising_error(
    model: Model,
    scheduler: GaussianPathScheduler,
    batches: torch.Tensor | Iterable[torch.Tensor],
    timesteps: Iterable[int] | None = None,
    generator: Generators | None = None,
    **model_kwargs: object,
) -> DenoisingError:
    """Measures E|x_0 - x̂_0(x_t)|^2 / d. Nothing is clipped.

    A sample meets the same noise at every timestep, so the curve is smoother than its standard error says. Between
    measured timesteps 1 / error is linear in the SNR, which is exact for Gaussian data of one variance, and wherever
    the error is constant or falls like 1 / SNR; the standard error is linear in the timestep.

    Args:
        model: The network, `model(sample, timestep, **model_kwargs)`; it returns a tensor or has it as `.sample`. Of
            a second half of its channels, a learned variance, nothing is used.
        scheduler: Says what the network predicts, and on which path.
        batches: Data x_0 in the network's range, (B, *), or batches of it; a few hundred samples are enough.
        timesteps: Train timesteps to measure at, besides the first and the last. None for all T. Each is one network
            call per batch.
        generator: Source of the noise; a list gives each sample of a batch its own.

    Raises:
        ValueError: If there are fewer than two samples, a timestep is not on the path, the output does not have the
            shape of the sample, or the last level has no signal and the network predicts noise there.
    """
    measured = _measured_timesteps(scheduler, timesteps)
    if isinstance(batches, torch.Tensor):
        batches = [batches]
    calls = len(batches) * len(measured) if isinstance(batches, Sequence) else None
    errors = []  # of each batch, (timesteps, B)
    with tqdm(total=calls, desc="measuring the denoising error") as progress:
        for batch in batches:
            noise = standard_normal(batch, generator, working_dtype(batch))
            of_batch = []
            for t in measured:
                x_t = scheduler.add_noise(batch, noise, t)
                prediction = first_channels(model(x_t, torch.tensor(t, device=x_t.device), **model_kwargs), x_t)
                of_batch.append(simple_loss(scheduler.original_sample(prediction, x_t, t), batch))
                progress.update()
            errors.append(torch.stack(of_batch).double().cpu())

    count = sum(of_batch.shape[1] for of_batch in errors)
    if count < 2:
        raise ValueError(f"a standard error needs at least two samples, got {count}")
    values = torch.cat(errors, dim=1)
    mean = values.mean(dim=1).numpy()
    standard_error = (values.std(dim=1) / math.sqrt(count)).numpy()
    everywhere = scheduler.train_timesteps
    return DenoisingError(
        _interpolated(mean, _snr(scheduler, measured), _snr(scheduler, everywhere)),
        np.interp(everywhere, measured, standard_error),
    )


def calibrate_spacing(
    scheduler: GaussianPathScheduler,
    model: Model,
    batches: torch.Tensor | Iterable[torch.Tensor],
    timesteps: Iterable[int] | None = None,
    generator: Generators | None = None,
    **model_kwargs: object,
) -> DenoisingError:
    """Measures the denoising error and stores it in the config, where `save_pretrained` keeps it.

    It is what `timestep_spacing="optimal"` needs, for any number of steps. The arguments and the result are those of
    `denoising_error`.

    Example:
        >>> import torch
        >>> from annealers import DDPMAncestralScheduler
        >>> from annealers.exact import Gaussian
        >>> scheduler = DDPMAncestralScheduler(clip_sample=False)
        >>> network, data = Gaussian(0.0, variance=0.25).as_model(scheduler), torch.randn(256, 3, 8, 8) / 2
        >>> error = calibrate_spacing(scheduler, network, data, timesteps=range(0, 1000, 50))
        >>> scheduler = DDPMAncestralScheduler.from_config(scheduler.config, timestep_spacing="optimal")
        >>> scheduler.set_timesteps(10)
    """
    measured = denoising_error(model, scheduler, batches, timesteps, generator, **model_kwargs)
    scheduler.register_to_config(denoising_error=measured.mean.tolist())
    scheduler._mark_as_default(["denoising_error"], marked=False)
    return measured


def bound_of_schedule(
    scheduler: GaussianPathScheduler,
    timesteps: Sequence[float] | torch.Tensor | None = None,
    variance_type: str = "fixed_small",
) -> float:
    """The part of the variational bound that a schedule decides, in bits per coordinate: lower is better.

    It is the divergence of all steps from the last train timestep to the first, by way of `timesteps`; a schedule that
    does not reach these ends is continued to them. What is left of the bound, the divergence of the last level from
    pure noise and the likelihood of the data given the first, is the same for all schedules.

    Args:
        scheduler: One whose denoising error is measured, see `calibrate_spacing`.
        timesteps: The schedule, in any order. None for the one that is set.
        variance_type: "fixed_small", or "optimal" for the best isotropic variance of each step.

    Raises:
        ValueError: If the error is not measured, the variance is neither, or a timestep is off the table.
    """
    if variance_type not in ("fixed_small", "optimal"):
        raise ValueError(f"variance_type must be 'fixed_small' or 'optimal', got {variance_type!r}")
    known = scheduler.config.get("denoising_error")
    if known is None:
        raise ValueError("the bound needs the measured denoising error of the network: call calibrate_spacing first")
    visited = scheduler.timesteps if timesteps is None else timesteps
    visited = np.asarray(visited.cpu() if isinstance(visited, torch.Tensor) else visited)
    everywhere = scheduler.train_timesteps
    first, last = everywhere[0], everywhere[-1]
    if visited.min() < first or visited.max() > last:
        raise ValueError(f"timesteps must lie in {first} .. {last}, got {visited.min()} .. {visited.max()}")

    snr = _snr(scheduler, np.unique([first, last, *visited])[::-1])
    error = _interpolated(np.asarray(known), _snr(scheduler, everywhere), snr)
    gain = np.diff(snr) * error[:-1]
    nats = 0.5 * (gain if variance_type == "fixed_small" else np.log1p(gain))
    return float(nats.sum() / math.log(2))


def _measured_timesteps(scheduler: GaussianPathScheduler, timesteps: Iterable[int] | None) -> list[int]:
    """The train timesteps to measure at, increasing, the first and the last among them."""
    everywhere = scheduler.train_timesteps
    chosen = everywhere if timesteps is None else [everywhere[0], everywhere[-1], *timesteps]
    measured = sorted({int(t) for t in chosen})
    if measured[0] < everywhere[0] or measured[-1] > everywhere[-1]:
        raise ValueError(
            f"timesteps must lie in {everywhere[0]} .. {everywhere[-1]}, got {measured[0]} .. {measured[-1]}"
        )
    scheduler._check_terminal_snr(scheduler._level(measured[-1]))
    return measured


def _snr(scheduler: GaussianPathScheduler, timesteps: Sequence[float] | np.ndarray) -> np.ndarray:
    alpha, sigma = scheduler.signal_and_noise(torch.as_tensor(np.ascontiguousarray(timesteps)))
    return (alpha**2 / sigma**2).numpy()


def _interpolated(error: np.ndarray, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The error at wanted SNR, from the error at known SNR, decreasing: 1 / error is linear in SNR."""
    precision = 1 / np.maximum(error, SMALLEST_ERROR)
    return 1 / np.interp(wanted, known[::-1], precision[::-1])


# ---- the variance of each coordinate at one state -------------------------------------------------------------------


@torch.no_grad()
def posterior_variance(
    model: Model,
    scheduler: GaussianPathScheduler,
    sample: torch.Tensor,
    timestep: int | float | torch.Tensor,
    probes: int = 1,
    generator: Generators | None = None,
    method: str = "jvp",
    **model_kwargs: object,
) -> torch.Tensor:
    """Estimates the diagonal of Lambda = alpha^2 / sigma^2 Cov[x_0 | x_t] at each state, without bias.

    It costs, per probe, one product with the Jacobian ("jvp", about two forward passes and, with attention, the memory
    of its plain form), or two network calls ("finite_difference").

    Args:
        model: The network, as in `denoising_error`.
        scheduler: Says what the network predicts, and on which path.
        sample: x_t, (B, *).
        timestep: Train timestep, () or (B,).
        probes: Number of probes u to average over.
        generator: Source of the signs, which are then independent between samples. None for signs that are a fixed
            function of timestep, coordinate and probe: then a sample is not changed by its neighbours or by chance.
        method: "jvp", forward-mode differentiation, exact; or "finite_difference", a central difference over +-sigma /
            16 along u, for networks with an operation that has no forward derivative. Not for half precision.

    Returns:
        The estimate, (B, *), in the working precision. The exact values are not negative, and above 1 only between
        modes; of estimates this holds on average.

    Raises:
        ValueError: If `probes` is not positive, the method is unknown or the output has not the shape of the sample.
        NotImplementedError: If an operation of the network has no forward derivative.
    """

    def network(x: torch.Tensor) -> torch.Tensor:
        return first_channels(model(x, timestep, **model_kwargs), x)

    return _prediction_and_lambda(network, scheduler, sample, timestep, probes, generator, method)[1]


@dataclass
class PosteriorVarianceOutput(BaseOutput):
    """Output of `PosteriorVarianceModel`.

    Args:
        sample: The prediction and, as the second half of the channels, the estimate of Lambda_ii. (B, 2C, *).
    """

    sample: torch.Tensor


class PosteriorVarianceModel(nn.Module):
    """Wraps a network so that it returns twice the channels: its prediction and the variance of each coordinate.

    That is what a scheduler with `variance_type="posterior"` takes, in any loop or pipeline that hands it the whole
    output. A call costs `probes` products with the Jacobian, each about two forward passes, the prediction included;
    or, by "finite_difference", 1 + 2 `probes` forward passes. Other attributes are those of the network.

    Args:
        model: The network, called as `model(sample, timestep, ...)`.
        scheduler: Says what the network predicts, and on which path.
        probes, generator, method: As in `posterior_variance`.

    Example:
        >>> import torch
        >>> from annealers import DDPMAncestralScheduler
        >>> from annealers.exact import Gaussian
        >>> scheduler = DDPMAncestralScheduler(clip_sample=False, variance_type="posterior", last_step_noise=True)
        >>> model = PosteriorVarianceModel(Gaussian(0.0, variance=0.25).as_model(scheduler), scheduler)
        >>> model(torch.zeros(1, 3, 8, 8), 999).sample.shape
        torch.Size([1, 6, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: GaussianPathScheduler,
        probes: int = 1,
        generator: Generators | None = None,
        method: str = "jvp",
    ) -> None:
        super().__init__()
        _check_probes(probes, method)
        self.model = model
        self.scheduler = scheduler
        self.probes, self.generator, self.method = probes, generator, method

    @torch.no_grad()
    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        *args: object,
        return_dict: bool = True,
        **kwargs: object,
    ) -> PosteriorVarianceOutput | tuple[torch.Tensor]:
        """Predicts at `sample`, (B, C, *).

        Args:
            sample: x_t, (B, C, *).
            timestep: Train timestep, a number, () or (B,).
            args, kwargs: Handed on to the network.
            return_dict: Whether to return a `PosteriorVarianceOutput` instead of a tuple.

        Returns:
            The prediction and Lambda_ii, (B, 2C, *), in the dtype of the prediction.
        """

        def network(x: torch.Tensor) -> torch.Tensor:
            return first_channels(self.model(x, timestep, *args, **kwargs), x)

        prediction, variance = _prediction_and_lambda(
            network, self.scheduler, sample, timestep, self.probes, self.generator, self.method
        )
        output = torch.cat([prediction, variance.to(prediction.dtype)], dim=1)
        return PosteriorVarianceOutput(output) if return_dict else (output,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _prediction_and_lambda(
    network: Callable[[torch.Tensor], torch.Tensor],
    scheduler: GaussianPathScheduler,
    sample: torch.Tensor,
    timestep: int | float | torch.Tensor,
    probes: int,
    generator: Generators | None,
    method: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the network, (B, *), and the mean of u * (Lambda u) over the probes, (B, *)."""
    _check_probes(probes, method)
    timesteps = torch.as_tensor(timestep, device=sample.device)
    alpha, sigma = (
        coefficient.reshape(-1, *[1] * (sample.ndim - 1))
        for coefficient in scheduler.signal_and_noise(timesteps, dtype=working_dtype(sample))
    )

    def denoised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = network(x)
        return scheduler.original_sample(prediction, x, timesteps), prediction

    prediction: Any = None if method == "jvp" else network(sample)
    total = torch.zeros_like(sample, dtype=alpha.dtype)
    for probe in range(probes):
        signs = _signs(sample, timesteps, probe, generator)
        if method == "jvp":
            derivative, prediction = _forward_derivative(denoised, sample, signs)
        else:
            step = DIFFERENCE_STEP * sigma
            ahead, behind = (denoised((sample + way * step * signs).to(sample.dtype))[0] for way in (1, -1))
            derivative = (ahead - behind) / (2 * step)
        total += signs * alpha * derivative
    return prediction, total / probes


def _forward_derivative(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivative of the first output of the function along a direction, and its second output."""
    x = x.contiguous()  # an expanded tensor has no dual number
    try:
        with sdpa_kernel(SDPBackend.MATH):  # of the kernels of attention, the one that has a forward derivative
            outputs: Any = torch.func.jvp(function, (x,), (direction,), has_aux=True)
    except NotImplementedError as error:
        raise NotImplementedError(
            "an operation of the network has no forward derivative: use method='finite_difference', which is "
            "approximate and calls the network twice per probe"
        ) from error
    _, derivative, other = outputs
    return derivative, other


def _signs(sample: torch.Tensor, timesteps: torch.Tensor, probe: int, generator: Generators | None) -> torch.Tensor:
    """A probe u of +-1, (B, *), in the dtype of the sample."""
    if generator is not None:
        return torch.where(standard_normal(sample, generator, working_dtype(sample)) < 0, -1.0, 1.0).to(sample.dtype)
    coordinates = torch.arange(sample[0].numel(), device=sample.device)
    levels = timesteps.reshape(-1, 1).float().view(torch.int32).long()  # the bits of the number
    bits = _mixed(_mixed(_mixed(coordinates) + probe) + levels) >> 32 & 1  # (1 or B, D)
    return (1 - 2 * bits).to(sample.dtype).reshape(-1, *sample.shape[1:]).expand_as(sample)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's step on 64-bit integers: neighbouring words in, unrelated words out. Overflow is meant to wrap."""
    words = words + _signed(0x9E3779B97F4A7C15)
    words = (words ^ _shifted_right(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted_right(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shifted_right(words, 31)


def _shifted_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Without copies of the sign, unlike >>."""
    return words >> bits & (1 << 64 - bits) - 1


def _signed(word: int) -> int:
    """A 64-bit word as a signed integer."""
    return word - (1 << 64) if word >> 63 else word


def first_channels(output: Any, sample: torch.Tensor) -> torch.Tensor:
    """The output of a network, in whatever it is wrapped, without its second half of channels, if it has one."""
    if not isinstance(output, torch.Tensor):
        output = output[0] if isinstance(output, tuple) else output.sample
    if sample.ndim > 1 and output.ndim == sample.ndim and output.shape[1] == 2 * sample.shape[1]:
        output = output[:, : sample.shape[1]]
    if output.shape != sample.shape:
        raise ValueError(
            f"the model output must have the shape of the sample, {tuple(sample.shape)}, or twice its channels, "
            f"got {tuple(output.shape)}"
        )
    return output


def _check_probes(probes: int, method: str) -> None:
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a positive integer, got {probes!r}")
    if method not in PROBE_METHODS:
        raise ValueError(f"method must be one of {PROBE_METHODS}, got {method!r}")
