r"""Likelihoods of diffusion models in bits per dimension, of images of 256 levels scaled to [-1, 1].

**Variational bound** of the chain over the levels t_1 > .. > t_N of any schedule (Ho et al. 2020, Eq. 5; Nichol &
Dhariwal 2021, Sec. 4, for schedules that skip levels), at most

    -log2 p(x_0) / d <= L_T + sum_i KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - E log p(x_0 | x_{t_N}),    s = t_{i+1}

in expectation over the noise; nothing is dequantised, because the last term is the probability of a bin.

**Probability-flow ODE** (Song et al. 2021, Eqs. 13, 39-40). On every Gaussian path, in the variance-preserving
coordinates x with alpha^2 + sigma^2 = 1 and the time lambda = log sigma / alpha,

    dx / dlambda = f = sigma (eps-hat - sigma x),        d log p / dlambda = -div f,
    log p(x_start) = log N(x_end; 0, I) + integral of div f,

by the chain rule from dy / dς = eps-hat, y = x / alpha, ς = sigma / alpha. It begins on the first train timestep, as
the network does, so it is the density of data with that little noise. Images get uniform noise as wide as a level,
x_0 + (u - 1/2) 2/255, and

    -log2 P(x_0) / d <= -E_u log2 p(x_0 + noise) / d + log2(255 / 2)                 Theis et al. 2015, Sec. 3.1

A uniform density on the 256 bins has 8 bits: the width of a bin is 2/255 here, not the 2/256 for which 7 is added.

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Nichol & Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672; Song, Sohl-Dickstein, Kingma, Kumar, Ermon,
Poole 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456; Theis, van
den Oord, Bethge 2015, "A note on the evaluation of generative models", arXiv:1511.01844.

    symbol    code                shape   meaning
    x_0       images              (B, *)  data
    ς         noise_ratio         (B,)    sigma / alpha, the noise level in units of the data
    lambda    log_ratio           (B,)    log ς, the time of the flow
    d                             ()      number of values in a sample
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin
from diffusers.utils.logging import tqdm
from scipy.interpolate import PchipInterpolator

from annealers.calibration import Model
from annealers.divergence import PROBE_KINDS, Generators, divergence, draw_probes
from annealers.losses import decoder_term, divergence_term, prior_bound_term
from annealers.metrics import mean_and_standard_error
from annealers.ode import solve_each
from annealers.schedulers import DDPMAncestralScheduler
from annealers.schedulers.gaussian_path import Level, standard_normal, working_dtype
from annealers.schedulers.reverse_variance import TWO_HEADED, VARIANCE_TYPES

BIN_WIDTH = 2 / 255  # of the 256 levels on [-1, 1]
LOG_2 = math.log(2)

# eps-hat (b, *) at variance-preserving states (b, *) and noise ratios (b,), for the samples `rows` (b,) of the batch
NoisePrediction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class BitsPerDim:
    """Bits per dimension of N samples, and what kind of number they are.

    Args:
        values: One per sample, (N,).
        kind: What was computed, for people.
    """

    values: torch.Tensor
    kind: str

    @property
    def mean(self) -> float:
        return self.values.double().mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean, over the samples."""
        return mean_and_standard_error(self.values)[1]

    def __str__(self) -> str:
        error = f" ± {self.standard_error:.3f}" if len(self.values) > 1 else ""
        return f"{self.mean:.3f}{error} bits/dim ({self.kind}, n = {len(self.values)})"


# ---- the variational bound ------------------------------------------------------------------------------------------


@dataclass
class VariationalBound(BitsPerDim):
    """The bound and its parts, which add up to `values`, each (N,), in bits per dimension.

    Args:
        prior: L_T, what the last level still tells of x_0.
        steps: The divergences of all steps but the last.
        decoder: The negative log-likelihood of the last step, to the data.
    """

    prior: torch.Tensor
    steps: torch.Tensor
    decoder: torch.Tensor


def chain_scheduler(
    scheduler: ConfigMixin, variance_type: str | None = None, timestep_spacing: str | None = None
) -> DDPMAncestralScheduler:
    """The ancestral chain on the path of any scheduler, of annealers or Diffusers, with nothing clipped.

    Args:
        scheduler: Whose config says path, prediction and, unless it is given here, the variance and the spacing.
        variance_type: See `DDPMAncestralScheduler`; None for that of the config, "fixed_small" if it has none.
        timestep_spacing: The same; for likelihoods "linspace", which reaches both ends, or "optimal".

    Raises:
        ValueError: If the config describes no path that is known here, as those of score SDEs and EDM do not, or a
            degradation other than noise.
    """
    if scheduler.config.get("degradation", "noise") != "noise":
        raise ValueError(f"need a process of Gaussian noise, got degradation={scheduler.config['degradation']!r}")
    described = "beta_schedule" in scheduler.config or "shift" in scheduler.config
    if not described and scheduler.config.get("trained_betas") is None:
        raise ValueError(
            "need a scheduler whose config has a 'beta_schedule', 'trained_betas' or the 'shift' of a flow, got "
            f"{type(scheduler).__name__}; annealers.load_score_sde_ve brings folders with a ScoreSdeVeScheduler here"
        )
    chosen = {"variance_type": variance_type, "timestep_spacing": timestep_spacing}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    # Diffusers drops the settings that it lists as defaults, among them all that were given by position.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return DDPMAncestralScheduler.from_config(config, clip_sample=False, thresholding=False, **chosen)


@torch.no_grad()
def variational_bound(
    model: Model,
    scheduler: ConfigMixin,
    images: torch.Tensor,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | torch.Tensor | None = None,
    variance_type: str | None = None,
    timestep_spacing: str | None = None,
    evaluated_steps: int | None = None,
    generator: Generators | None = None,
    **model_kwargs: object,
) -> VariationalBound:
    """The variational bound of images on any schedule, with any variance.

    Args:
        model: The network, `model(sample, timesteps, **model_kwargs)`, called with one timestep per sample; it returns
            a tensor or has it as `.sample`. A learned variance that the variance type does not use is dropped.
        scheduler: Of annealers or Diffusers: says what the network predicts, and on which path.
        images: x_0, levels of 8-bit images scaled to [-1, 1], (B, *).
        num_inference_steps: Number of levels N, spaced as the scheduler says; None, without `timesteps`, for all.
        timesteps: The levels themselves instead.
        variance_type, timestep_spacing: Instead of the scheduler's, see `chain_scheduler`.
        evaluated_steps: Steps to compute per image, at most and besides the last, one at random in each of as many
            parts of the schedule, to stand for all: the result is an estimate without bias, and says so. None for all.
        generator: Source of the noise; a list gives each image its own.

    Raises:
        ValueError: If both `num_inference_steps` and `timesteps` are given, or `evaluated_steps` is not positive.
    """
    chain = chain_scheduler(scheduler, variance_type, timestep_spacing)
    if num_inference_steps is not None or timesteps is not None:
        chain.set_timesteps(num_inference_steps, timesteps=timesteps)
    return variational_bounds(model, [chain], images, evaluated_steps, generator, **model_kwargs)[0]


@torch.no_grad()
def variational_bounds(
    model: Model,
    chains: Sequence[DDPMAncestralScheduler],
    images: torch.Tensor,
    evaluated_steps: int | None = None,
    generator: Generators | None = None,
    **model_kwargs: object,
) -> list[VariationalBound]:
    """The bounds of several chains on one path, with different schedules or variances.

    A level is visited once, for all chains that have it, so they meet the same noise there and share the network call.

    Args:
        model, images, evaluated_steps, generator, model_kwargs: As in `variational_bound`. Where only some steps are
            computed, chains of the same schedule share them.
        chains: Made by `chain_scheduler`, each with its schedule set; it is the whole chain otherwise.

    Returns:
        The bound of each chain.

    Raises:
        ValueError: If there is no chain, the chains are not on one path, or `evaluated_steps` is not positive.
    """
    _check_chains(chains)
    path = chains[0]
    _check_range(images)
    x_0 = images.to(working_dtype(images))
    zeros = torch.zeros(len(x_0), dtype=x_0.dtype, device=x_0.device)
    steps, decoder = [zeros.clone() for _ in chains], [zeros.clone() for _ in chains]
    visits, samplings = _plan(chains, evaluated_steps)

    def visit(t: torch.Tensor) -> tuple[torch.Tensor, Any]:
        x_t = path.add_noise(x_0, standard_normal(x_0, generator, x_0.dtype), t)
        return x_t, model(x_t.to(images.dtype), t, **model_kwargs)

    def arguments(index: int, seen: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_t, output = seen
        return _output(output, x_0, chains[index]), x_0, x_t

    def everywhere(timestep: float) -> torch.Tensor:
        return torch.full((len(x_0),), timestep, dtype=path.timesteps.dtype, device=x_0.device)

    with tqdm(total=len(visits) + sum(len(sampling.parts) for sampling in samplings), desc="variational bound") as bar:
        for timestep, walkers in visits.items():
            t = everywhere(timestep)
            seen = visit(t)
            for index, following in walkers:
                total, term = (decoder, decoder_term) if following == _data(path) else (steps, divergence_term)
                total[index] += term(chains[index], *arguments(index, seen), t, everywhere(following))
            bar.update()
        for sampling in samplings:
            levels = torch.tensor(sampling.levels, dtype=path.timesteps.dtype, device=x_0.device)
            for start, stop in sampling.parts:
                position = start + (_uniform(x_0, generator) * (stop - start)).long()
                t = levels[position]
                seen = visit(t)
                for index in sampling.walkers:
                    divergence = divergence_term(chains[index], *arguments(index, seen), t, levels[position + 1])
                    steps[index] += (stop - start) * divergence
                bar.update()

    bounds = []
    for index, chain in enumerate(chains):
        prior = prior_bound_term(chain, x_0, chain.timesteps[0].item())
        estimated = [f", estimated by {len(s.parts)} of them and the last" for s in samplings if index in s.walkers]
        variance = VARIANCE_TYPES[chain.config.variance_type]
        kind = f"variational bound, {variance}, {len(chain.timesteps)} steps{''.join(estimated)}"
        total = prior + steps[index] + decoder[index]
        bounds.append(VariationalBound(total, kind, prior, steps[index], decoder[index]))
    return bounds


def _check_chains(chains: Sequence[DDPMAncestralScheduler]) -> None:
    if not chains:
        raise ValueError("need at least one chain")
    everywhere = torch.as_tensor(chains[0].train_timesteps)
    for chain in chains:
        same_path = len(chain) == len(chains[0]) and chain.config.prediction_type == chains[0].config.prediction_type
        if not same_path or not all(map(torch.equal, *(c.signal_and_noise(everywhere) for c in (chain, chains[0])))):
            raise ValueError("the chains must be on one path, with one prediction type")
        chain._check_terminal_snr(chain._level(chain.timesteps[0].item()))


def _data(path: DDPMAncestralScheduler) -> int:
    """The timestep of the data."""
    return int(path.train_timesteps[0]) - 1


class _Sampling(NamedTuple):
    """A schedule of which one step in each part, (start, stop), is computed, for the chains that walk it."""

    levels: tuple[float, ...]
    parts: list[tuple[int, int]]
    walkers: list[int]


def _plan(
    chains: Sequence[DDPMAncestralScheduler], evaluated_steps: int | None
) -> tuple[dict[float, list[tuple[int, float]]], list[_Sampling]]:
    """The levels to visit, decreasing, each with the chains there and where they go next; and those to sample from."""
    if evaluated_steps is not None and (
        isinstance(evaluated_steps, bool) or not isinstance(evaluated_steps, int) or evaluated_steps < 1
    ):
        raise ValueError(f"evaluated_steps must be a positive integer, got {evaluated_steps!r}")
    visits: dict[float, list[tuple[int, float]]] = {}
    samplings: dict[tuple[float, ...], _Sampling] = {}
    for index, chain in enumerate(chains):
        levels = tuple(chain.timesteps.tolist())
        steps = list(zip(levels, [*levels[1:], _data(chain)], strict=True))
        if evaluated_steps is not None and evaluated_steps < len(levels) - 1:
            sampling = samplings.setdefault(levels, _Sampling(levels, _parts(chain, evaluated_steps), []))
            sampling.walkers.append(index)
            steps = steps[-1:]
        for timestep, following in steps:
            visits.setdefault(timestep, []).append((index, following))
    return dict(sorted(visits.items(), reverse=True)), list(samplings.values())


def log_information(chain: DDPMAncestralScheduler, timesteps: torch.Tensor) -> np.ndarray:
    """log(1 + SNR) at train timesteps, (N,): twice what x_t tells of standard normal data, in nats per value."""
    alpha, sigma = chain.signal_and_noise(timesteps.cpu())
    return torch.log1p((alpha / sigma) ** 2).numpy()


def _parts(chain: DDPMAncestralScheduler, count: int) -> list[tuple[int, int]]:
    """The steps of a schedule but the last, cut into at most `count` contiguous parts, as (start, stop).

    Each part has the same share of log(1 + SNR), as far as whole steps allow, so for standard normal data all cost
    alike. The few steps near the data, which cost most, are then parts of their own.
    """
    information = log_information(chain, chain.timesteps)  # increasing
    ends = np.searchsorted(information, np.linspace(information[0], information[-1], count + 1)[1:-1])
    ends = np.unique([0, *ends, len(information) - 1]).tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def _uniform(x: torch.Tensor, generator: Generators | None) -> torch.Tensor:
    """One number in [0, 1) per sample, (B,), from generators that also draw its noise."""
    normal = standard_normal(x.reshape(len(x), -1)[:, 0], generator, torch.float64)
    return torch.special.ndtr(normal).clamp(max=1 - 2**-53)


def _output(output: Any, sample: torch.Tensor, chain: DDPMAncestralScheduler) -> torch.Tensor:
    """The output of the network, without a learned variance that this chain does not use."""
    output = output if isinstance(output, torch.Tensor) else output.sample
    if chain.config.variance_type not in TWO_HEADED and output.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
        return output[:, : sample.shape[1]]
    return output


# ---- the probability-flow ODE ---------------------------------------------------------------------------------------


@dataclass
class FlowBits(BitsPerDim):
    """Bits per dimension by the flow.

    Args:
        calls: Network calls of each sample, (N,).
    """

    calls: torch.Tensor


class FlowLogProb(NamedTuple):
    """The log-density of each sample in nats, (B,), its latent, (B, *), and its network calls, (B,)."""

    log_prob: torch.Tensor
    latent: torch.Tensor
    calls: torch.Tensor


def probability_flow_log_prob(
    noise_prediction: NoisePrediction,
    x_0: torch.Tensor,
    smallest_ratio: float,
    largest_ratio: float,
    probes: torch.Tensor | None = None,
    relative_tolerance: float = 1e-5,
    absolute_tolerance: float = 1e-5,
) -> FlowLogProb:
    """Log-density of the flow that turns N(0, I) at the largest noise ratio into data at the smallest.

    Each sample has its own error control and its own probes, so it does not depend on its neighbours. The divergence
    is integrated along with the state, per dimension, under the same tolerances.

    Args:
        noise_prediction: eps-hat(x, ς, rows), (b, *), at variance-preserving states x (b, *) and noise ratios (b,).
        x_0: Data, taken to have the smallest noise ratio, (B, *).
        smallest_ratio, largest_ratio: Where the flow begins and ends, sigma / alpha.
        probes: (K, B, *), fixed along the flow, for Hutchinson's estimate, without bias; None for the exact
            divergence, which costs as many backward passes as a sample has values.
        relative_tolerance, absolute_tolerance: Of the error of each step in each coordinate.

    Raises:
        ValueError: If the ratios are not positive and increasing.
        RuntimeError: If a sample does not arrive, see `solve_each`.
    """
    if not 0 < smallest_ratio < largest_ratio < math.inf:
        raise ValueError(f"need 0 < smallest_ratio < largest_ratio, got {smallest_ratio} and {largest_ratio}")
    x_0 = x_0.to(working_dtype(x_0))
    shape, d = x_0.shape[1:], x_0[0].numel()

    def derivative(log_ratio: torch.Tensor, state: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ratio = log_ratio.exp()
        sigma = (ratio / (1 + ratio**2).sqrt()).to(state.dtype).reshape(-1, *[1] * len(shape))

        def flow(x: torch.Tensor) -> torch.Tensor:
            return sigma * (noise_prediction(x, ratio, rows) - sigma * x)

        x = state[:, :d].reshape(-1, *shape)
        velocity, div = divergence(flow, x, None if probes is None else probes[:, rows])
        return torch.cat([velocity.reshape(len(x), d), div[:, None].to(state.dtype) / d], dim=1)

    with torch.no_grad():
        alpha = 1 / math.sqrt(1 + smallest_ratio**2)
        start = torch.cat([alpha * x_0.reshape(len(x_0), d), torch.zeros_like(x_0.reshape(len(x_0), d)[:, :1])], dim=1)
        ends = math.log(smallest_ratio), math.log(largest_ratio)
        end, calls = solve_each(derivative, start, *ends, relative_tolerance, absolute_tolerance)
        latent, integral = end[:, :d].double(), d * end[:, d].double()
        prior = -0.5 * (latent**2 + math.log(2 * math.pi)).sum(dim=1)
        log_prob = prior + integral + d * math.log(alpha)  # the last, because x_start = alpha x_0
    return FlowLogProb(log_prob, latent.to(x_0.dtype).reshape(x_0.shape), calls)


class NetworkNoise:
    """eps-hat of a network at any noise ratio, between its train timesteps too.

    On a flow path the timestep of a ratio is T ς / (1 + ς); elsewhere it is interpolated by a monotone cubic in log ς
    (Fritsch & Carlson 1980), smooth enough for the error control. Networks with sinusoidal or Fourier embeddings take
    fractional timesteps.

    Args:
        model: The network, as in `variational_bound`.
        scheduler: Of annealers or Diffusers: says what the network predicts, and on which path.
        dtype: In which the network takes its samples; None for that of the states.
        model_kwargs: Conditions, such as `class_labels`; tensors with one entry per sample follow their samples.

    Attributes:
        smallest_ratio, largest_ratio: The noise ratios of the first train timestep and of the last that has signal.
    """

    def __init__(
        self, model: Model, scheduler: ConfigMixin, dtype: torch.dtype | None = None, **model_kwargs: object
    ) -> None:
        self.model, self.dtype, self.model_kwargs = model, dtype, model_kwargs
        self.path = chain_scheduler(scheduler, variance_type="fixed_small")  # a learned variance is of no use here
        ratios = self.path._ratios()
        if len(ratios) < 2:
            raise ValueError(f"a flow needs two train timesteps with signal, got {len(ratios)}")
        self.smallest_ratio, self.largest_ratio = float(ratios[0]), float(ratios[-1])
        self._timestep = PchipInterpolator(np.log(ratios), self.path.train_timesteps[: len(ratios)].astype(float))

    def timesteps(self, ratio: torch.Tensor) -> torch.Tensor:
        """The fractional train timesteps of noise ratios, (b,)."""
        ratio = ratio.double().clamp(self.smallest_ratio, self.largest_ratio)
        if self.path._is_flow:
            return ratio / (1 + ratio) * len(self.path)
        return torch.from_numpy(self._timestep(ratio.log().cpu().numpy())).to(ratio.device)

    def __call__(self, x: torch.Tensor, ratio: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """eps-hat at variance-preserving states, (b, *)."""
        column = ratio.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        alpha = 1 / (1 + column) if self.path._is_flow else 1 / (1 + column**2).sqrt()
        x_t = x * (alpha * (1 + column**2).sqrt())  # in the coordinates of the path
        kwargs = {name: _rows_of(value, rows) for name, value in self.model_kwargs.items()}
        output = self.model(x_t.to(self.dtype or x.dtype), self.timesteps(ratio).to(x.dtype), **kwargs)
        prediction = _output(output, x, self.path).to(x.dtype)
        noise, _ = self.path._noise_and_original(prediction, x_t, Level(0, alpha, alpha * column))
        return noise


def probability_flow_bits(
    model: Model,
    scheduler: ConfigMixin,
    images: torch.Tensor,
    probes: int | None = 1,
    probe_kind: str = "rademacher",
    relative_tolerance: float = 1e-5,
    absolute_tolerance: float = 1e-5,
    generator: Generators | None = None,
    **model_kwargs: object,
) -> FlowBits:
    """Bits per dimension of images by the probability-flow ODE, with uniform dequantisation.

    Args:
        model, scheduler, images, model_kwargs: As in `variational_bound`.
        probes: Hutchinson probes per image, or None for the exact divergence.
        probe_kind: "rademacher" or "gaussian".
        relative_tolerance, absolute_tolerance: Of each step of each image.
        generator: Source of the dequantisation and of the probes; a list gives each image its own.

    Returns:
        One value per image; its expectation over the dequantisation is an upper bound on -log2 P(x_0) / d.
    """
    if probe_kind not in PROBE_KINDS:
        raise ValueError(f"probes must be one of {PROBE_KINDS}, got {probe_kind!r}")
    noise = NetworkNoise(model, scheduler, images.dtype, **model_kwargs)
    x = dequantised(images, generator)
    drawn = None if probes is None else draw_probes(x, probes, probe_kind, generator)
    log_prob, _, calls = probability_flow_log_prob(
        noise, x, noise.smallest_ratio, noise.largest_ratio, drawn, relative_tolerance, absolute_tolerance
    )
    by = "exact divergence" if probes is None else f"{probes} {probe_kind} probe{'s' if probes > 1 else ''}"
    kind = f"probability flow, {by}, uniform dequantisation"
    return FlowBits(discrete_bits(log_prob, x[0].numel()), kind, calls)


def dequantised(images: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
    """Adds noise uniform on the bin of each value, (B, *), so that images of 256 levels in [-1, 1] have a density."""
    _check_range(images)
    uniform = torch.special.ndtr(standard_normal(images, generator, torch.float64))
    return (images.double() + (uniform - 0.5) * BIN_WIDTH).to(working_dtype(images))


def _check_range(images: torch.Tensor) -> None:
    largest = images.abs().max().item() if images.numel() else 0.0
    if not largest <= 1 + BIN_WIDTH / 2:  # half precision rounds
        raise ValueError(f"images must be 8-bit levels scaled to [-1, 1], got values of magnitude {largest:g}")


def discrete_bits(log_prob: torch.Tensor, d: int) -> torch.Tensor:
    """Bits per dimension of images with these log-densities in nats on [-1, 1], (B,) -> (B,)."""
    return -log_prob.double() / (d * LOG_2) - math.log2(BIN_WIDTH)


def _rows_of(value: object, rows: torch.Tensor) -> object:
    """The entries of a condition for these samples; what is no tensor with a batch axis goes to all."""
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
