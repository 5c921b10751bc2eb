r"""Predictor-corrector sampling.

A predictor walks from one noise level to the next; on the new level, M Langevin steps correct the law of the state:

    predict    x_s ~ N(mean, variance) of the chosen reverse step t -> s           see `reverse_steps`
    correct    x <- x + delta s(x) + sqrt(2 delta) z,  M times                     Song et al. 2021, Algorithms 1-5

    sigma         delta = 2 (r sigma)^2                     the same for all samples; the default
    norm          delta = 2 (r |z| / |s|)^2                 each sample its own
    batch_norm    delta = 2 (r mean|z| / mean|s|)^2         as published: a sample depends on its batch
    reversal      delta = beta~ / (2 M)                     beta~: variance of the ancestral step that leads here

r is the corrector's signal-to-noise ratio. delta <= sigma^2, so r <= sqrt(1/2), keeps the corrector a contraction for
any data; "norm" is held to that too. A step by norms depends on the state and so does not keep the law exactly.
"reversal" makes a deterministic predictor and its corrections, together, the reversed SDE, which is half probability
flow and half Langevin dynamics.

`leimkuhler_matthews` averages each noise with the next,

    x <- x + delta s(x) + sqrt(2 delta) (z_k + z_{k+1}) / 2

which leaves a Gaussian law of any variance unchanged, where the plain step makes it too wide by delta / 2. The average
needs a z_k that the state already contains: the one of the last corrector step or, for the first, a share of the
predictor's noise. If that holds too little, what lacks is drawn anew (with none at all, sqrt(3) z in its place, right
to first order).

Published signal-to-noise ratios are 0.16 for variance-exploding and 0.01 for variance-preserving networks (Song et al.
2021, App. G); with exact scores larger ones, 0.3 to 0.45, are better on any path.

The network is called once on the first level, where unit noise needs no correction, and M + 1 times on each of the
others: M corrections, then the prediction. `timesteps` repeats them so, and `order` is M + 1. With layout="full" the
first level is corrected too, which is the order of the published code. On levels outside of `corrector_range` nothing
is corrected, and their M + 1 calls are M + 1 prediction steps instead.

    symbol    code              shape    meaning
    x         sample            (B, *)   state
    s         -eps-hat / sigma  (B, *)   score
    delta     step_size         ()       step size of the corrector, (B, 1, ..) when measured by norms
    r         snr               ()       signal-to-noise ratio of the corrector
    M         corrector_steps   ()       corrections on a level

Sources: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, "Score-Based Generative Modeling through Stochastic
Differential Equations", arXiv:2011.13456; Leimkuhler & Matthews 2013, "Rational Construction of Stochastic Numerical
Methods for Molecular Sampling", Appl. Math. Res. Express 2013; Lu, Zhou, Bao, Chen, Li, Zhu 2022, "DPM-Solver++",
arXiv:2211.01095 (the second-order probability flow).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from annealers.schedulers.gaussian_path import (
    DATA,
    GaussianPathSchedulerOutput,
    Level,
    Visit,
    noise_ratio,
    standard_normal,
    transition,
    working_dtype,
)
from annealers.schedulers.langevin import langevin_step, langevin_visits, signal_kept, warn_of_end_variance
from annealers.schedulers.path_tables import strictly_decreasing
from annealers.schedulers.reverse_steps import (
    ddim,
    ddpm,
    euler_maruyama,
    modified_euler_maruyama,
    probability_flow,
    reverse_diffusion,
)
from annealers.schedulers.reverse_variance import VARIANCE_TYPES, ReverseVariance
from annealers.schedulers.secant import (
    Innovation,
    contraction,
    measured_slopes,
    missing_variance,
    secant_coefficient,
)
from annealers.schedulers.self_estimated_variance import SELF_ESTIMATED, spread_of_original

PREDICTORS = (
    "ddpm",
    "ddim",
    "euler_maruyama",
    "modified_euler_maruyama",
    "reverse_diffusion",
    "probability_flow",
    "secant",
    "none",
)
SDE_STEPS = {
    "euler_maruyama": euler_maruyama,
    "modified_euler_maruyama": modified_euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
}
CORRECTORS = ("langevin", "leimkuhler_matthews")
SLOPES_PER = ("sample", "channel")
STEP_SIZE_RULES = ("sigma", "norm", "batch_norm", "reversal")
LAYOUTS = ("heun", "full")
LARGEST_SNR = math.sqrt(0.5)


class ContainedNoise(NamedTuple):
    """Noise that the state is known to contain, as x = (what does not depend on it) + scale z."""

    z: torch.Tensor
    scale: float | torch.Tensor


class Evaluation(NamedTuple):
    """A network call, as a step sees it: in the working precision, eps-hat and x̂_0 consistent with each other."""

    x: torch.Tensor
    eps: torch.Tensor
    x_0: torch.Tensor
    variance_values: torch.Tensor | None
    generator: torch.Generator | list[torch.Generator] | None

    def noise(self) -> torch.Tensor:
        return standard_normal(self.x, self.generator, self.x.dtype)


class Prediction(NamedTuple):
    """x̂_0 as the last prediction step saw it."""

    level: Level
    x_0: torch.Tensor


class PredictorCorrectorScheduler(ReverseVariance):
    """Samples by predictor and corrector steps. The arguments that Diffusers has keep its names and defaults.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, sigma_min,
            sigma_max, prediction_type: The path and the network, as in `DDPMAncestralScheduler`.
        predictor: "ddpm" with the variance of `variance_type`, "ddim" with `eta`, "euler_maruyama",
            "modified_euler_maruyama", "reverse_diffusion", "probability_flow" of `solver_order`, "secant" with `eta`
            and without corrections, which has the best quality at equal network calls of the stochastic ones (see
            `secant`), or "none": the levels are corrected only, with the closing call that denoises, as in
            `AnnealedLangevinScheduler`.
        variance_type: Variance of the predictor "ddpm", as in `DDPMAncestralScheduler`, or "self_estimated" or
            "self_estimated_isotropic", which need no calibration: see `self_estimated_variance`.
        eta: Share of the ancestral noise in "ddim" and "secant", 0 .. 1. None is 0 for "ddim" and 1 for "secant".
        slopes_per: "sample" or "channel": what "secant" and the self-estimated variances measure as one. The second is
            for latents whose channels differ in scale.
        solver_order: Order of "probability_flow", 1 or 2; 2 extrapolates, and wants levels that are even in log SNR,
            as those of "karras" spacing nearly are: with "leading" ones the last extrapolation goes far astray.
        corrector: "langevin" or "leimkuhler_matthews".
        corrector_steps: M, >= 0.
        snr: r, in 0 .. sqrt(1/2): delta = 2 (r sigma)^2.
        step_size_rule: "sigma", "norm", "batch_norm" or "reversal", which does not use `snr`; see the file.
        corrector_range: The part of the train timesteps, (low, high) in 0 .. 1, on whose levels the corrector acts.
            None is all of them.
        layout: "heun" or "full": whether the first level is corrected as well.
        last_step_noise: Whether the step to the data keeps the noise of `variance_type`, or of "secant". It is part of
            the exact law, and right for levels that end near the data, as those of "karras" spacing do.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: How x̂_0 is kept in
            range, as in `DDPMAncestralScheduler`.
        mean_squared_noise: As in `DDPMAncestralScheduler`.
        timestep_spacing, steps_offset, denoising_error, shift, use_dynamic_shifting, time_shift_type, shift_terminal:
            The levels, as in `DDPMAncestralScheduler`.

    Example:
        >>> from annealers import PredictorCorrectorScheduler
        >>> scheduler = PredictorCorrectorScheduler(corrector_steps=1, timestep_spacing="trailing")
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps.tolist(), scheduler.order
        ([999, 666, 666, 332, 332], 2)
    """

    __module__ = "annealers"  # the name that model_index.json records

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        predictor: str = "ddpm",
        variance_type: str | None = "fixed_small",
        eta: float | None = None,
        slopes_per: str = "sample",
        solver_order: int = 1,
        corrector: str = "langevin",
        corrector_steps: int = 1,
        snr: float = 0.16,  # variance-exploding networks, Song et al. 2021, App. G
        step_size_rule: str = "sigma",
        corrector_range: tuple[float, float] | list[float] | None = None,
        layout: str = "heun",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        last_step_noise: bool = False,
        mean_squared_noise: list[float] | None = None,
        denoising_error: list[float] | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        for name, value, choices in (
            ("predictor", predictor, PREDICTORS),
            ("variance_type", variance_type, [*VARIANCE_TYPES, *SELF_ESTIMATED]),
            ("solver_order", solver_order, (1, 2)),
            ("slopes_per", slopes_per, SLOPES_PER),
            ("corrector", corrector, CORRECTORS),
            ("step_size_rule", step_size_rule, STEP_SIZE_RULES),
            ("layout", layout, LAYOUTS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        fewest = 1 if predictor == "none" else 0
        if isinstance(corrector_steps, bool) or not isinstance(corrector_steps, int) or corrector_steps < fewest:
            raise ValueError(
                f"corrector_steps must be an integer >= {fewest} with predictor={predictor!r}, got {corrector_steps!r}"
            )
        if not 0 <= snr <= LARGEST_SNR:
            raise ValueError(
                f"snr must lie in 0 .. sqrt(1/2) = {LARGEST_SNR:.4f}, where the corrector's step, 2 (snr sigma)^2, is "
                f"at most sigma^2 and so stable for any data, got {snr}"
            )
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0 .. 1, got {eta}")
        if predictor == "secant" and corrector_steps > 0:
            raise ValueError(
                "predictor='secant' reads its own last step off the state, which a correction in between changes: set "
                f"corrector_steps=0, got {corrector_steps}"
            )
        if variance_type in SELF_ESTIMATED and predictor != "ddpm":
            raise ValueError(f"variance_type={variance_type!r} is for predictor='ddpm', got predictor={predictor!r}")
        if corrector_range is not None and (
            len(corrector_range) != 2 or not 0 <= corrector_range[0] <= corrector_range[1] <= 1
        ):
            raise ValueError(f"corrector_range must be (low, high) with 0 <= low <= high <= 1, got {corrector_range}")
        self._entries_per_level = corrector_steps if predictor == "none" else corrector_steps + 1
        self.order = self._entries_per_level
        self._build_path()

    # ---- the network calls on each level ----------------------------------------------------------------------------

    def _visits(self, levels: list[Level]) -> list[Visit]:
        """M corrections, which stay, and then the prediction, which leaves, on each level; the first is a start."""
        if self.config.predictor == "none":
            if self.num_inference_steps is not None and self.config.step_size_rule == "sigma" and self.config.snr > 0:
                warn_of_end_variance(levels, 2 * self.config.snr**2, self.config.corrector_steps)
            return langevin_visits(levels, self.config.corrector_steps, denoise=True)
        stops: list[tuple[Level, int]] = []  # a level, and the corrections on it
        corrected = [self._is_corrected(level) for level in levels]
        for i, level in enumerate(levels):
            if i == 0 and self.config.layout == "heun":
                stops.append((level, 0))
            elif corrected[i]:
                stops.append((level, self.config.corrector_steps))
            elif self.num_inference_steps is None:  # the whole chain, before set_timesteps: nothing is in between
                stops.append((level, 0))
            elif stops[-1:] == [] or corrected[i - 1] or (i == 1 and self.config.layout == "heun"):
                # the first of a run of levels that are not corrected
                end = next((j for j in range(i, len(levels)) if corrected[j]), len(levels))
                stops += [(between, 0) for between in self._subdivided(levels, i, end)]
        visits = []
        for (here, corrections), (there, _) in zip(stops, [*stops[1:], (DATA, 0)], strict=True):
            visits += [Visit(here, here)] * corrections + [Visit(here, there)]
        return visits

    def _is_corrected(self, level: Level) -> bool:
        if self.config.corrector_range is None:
            return True
        low, high = self.config.corrector_range
        return low <= level.timestep / max(self.train_timesteps[-1], 1) <= high

    def _subdivided(self, levels: list[Level], begin: int, end: int) -> list[Level]:
        """M + 1 levels in the place of each of levels[begin:end], evenly spaced.

        In the layout "heun" they lie on the way to each level, which is the last of its M + 1, and in "full" on the
        way from it, which is the first. Either way the level itself is at a position that `order` divides.
        """
        parts, M = end - begin, self.config.corrector_steps
        beyond = self.train_timesteps[0] - 1  # the data
        marks = [level.timestep for level in levels] + [beyond]
        if self.config.layout == "heun":
            anchors, first = marks[begin - 1 : end], 1
            floor, ceiling = anchors[-1], anchors[0] - 1
        else:
            anchors, first = marks[begin : end + 1], 0
            floor, ceiling = anchors[-1] + 1, anchors[0]
        positions = (np.arange(parts * (M + 1)) + first) / (M + 1)
        wanted = np.interp(positions, np.arange(parts + 1), anchors)
        if self._is_flow:
            return [self._level(np.float32(timestep)) for timestep in wanted]
        room = int(ceiling - floor) + 1
        if len(wanted) > room:
            raise ValueError(
                f"outside of corrector_range={tuple(self.config.corrector_range)} each level becomes {M + 1} steps, "
                f"{len(wanted)} between the timesteps {ceiling} and {floor}, where there are {room}: use fewer "
                "levels, fewer corrector_steps or a wider range"
            )
        offsets = strictly_decreasing(np.round(wanted - floor).astype(np.int64), room)
        return [self._level(int(offset + floor)) for offset in offsets]

    # ---- reverse: noise to data -------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> GaussianPathSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes the step that is due on the level of `timestep`: a correction, or the prediction of the next level.

        Args:
            model_output: Output of the network at (`sample`, `timestep`), (B, *); with learned variance (B, 2C, *).
            timestep: The entry of `timesteps` that the sample is on.
            sample: x, (B, *).
            generator: Source of the noise; a list gives each sample its own.
            return_dict: Whether to return a `GaussianPathSchedulerOutput` rather than a tuple.

        Returns:
            The next x and x̂_0, both (B, *), in the dtype of `sample`.

        Raises:
            ValueError: If the output's shape does not fit, the timestep is not in the schedule, there is none yet, or
                the variance is "optimal" and not calibrated.
        """
        self._check_ready()
        position = self._position(timestep)
        visit = here, there = self._schedule[position]
        if position != self._step_index:  # a run begins here: nothing is remembered of another
            self._forget()

        dtype = working_dtype(sample)
        x = sample.to(dtype)
        prediction, variance_values = self._split(model_output.to(dtype), sample)
        eps, x_0 = self._noise_and_original(prediction, x, here)
        call = Evaluation(x, eps, x_0, variance_values, generator)
        if self._is_correction(visit):
            x = self._correct(call, position)
            if there != here:
                x = self._moved(x, signal_kept(here, there))
        elif self.config.predictor == "none":
            x = x_0
        else:
            x = self._predict(call, here, there)

        self._step_index = position + 1
        x, x_0 = x.to(sample.dtype), x_0.to(sample.dtype)
        return GaussianPathSchedulerOutput(x, x_0) if return_dict else (x, x_0)

    @property
    def is_correction_due(self) -> bool:
        """Whether the network call that comes next is for a correction; a pipeline's callback may ask."""
        due = (self._begin_index or 0) if self._step_index is None else self._step_index
        return due < len(self._schedule) and self._is_correction(self._schedule[due])

    @property
    def num_corrections(self) -> int:
        """How many network calls of the schedule are for corrections."""
        return sum(self._is_correction(visit) for visit in self._schedule)

    def _is_correction(self, visit: Visit) -> bool:
        """A correction stays on its level, but for the last on a level that nothing predicts from."""
        return visit.here == visit.there or (self.config.predictor == "none" and visit.there != DATA)

    @property
    def _per_channel(self) -> bool:
        return self.config.slopes_per == "channel"

    def _forget(self) -> None:
        self._contained: ContainedNoise | None = None
        self._last_prediction: Prediction | None = None
        self._innovation: Innovation | None = None

    # ---- predictor --------------------------------------------------------------------------------------------------

    def _predict(self, call: Evaluation, t: Level, s: Level) -> torch.Tensor:
        """A state on level s, drawn from the law of the chosen reverse step."""
        if self.config.predictor == "secant":
            return self._secant_step(call, t, s)
        if self.config.variance_type in SELF_ESTIMATED:
            return self._self_estimated_step(call, t, s)
        mean, deviation = self._reverse_step(call, t, s)
        self._last_prediction = Prediction(t, call.x_0)
        return self._drawn(mean, deviation, call)

    def _reverse_step(self, call: Evaluation, t: Level, s: Level) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Mean and standard deviation of x_s; only the predictor "ddpm" may have noise in the step to the data."""
        predictor, is_last = self.config.predictor, s.sigma == 0
        x, eps, x_0 = call.x, call.eps, call.x_0
        if predictor == "ddpm":
            law = transition(t.alpha, t.sigma, s.alpha, s.sigma)
            mean = law.mean(x, x_0)
            if is_last and not self.config.last_step_noise:
                return mean, 0.0
            return mean, self._standard_deviation(t, s, law, call.variance_values)
        if predictor == "probability_flow":
            past = self._last_prediction if self.config.solver_order == 2 else None
            return probability_flow(x, x_0, t, s, *(past or (None, None))), 0.0
        if predictor == "ddim":
            step = ddim(eps, x_0, t, s, self.config.eta or 0.0)
        elif t.alpha == 0:
            step = ddpm(x, x_0, t, s)
        else:
            step = SDE_STEPS[predictor](x, eps, t, s, self._is_brownian)
        return step.mean, 0.0 if is_last else step.variance**0.5

    def _secant_step(self, call: Evaluation, t: Level, s: Level) -> torch.Tensor:
        """See `secant`; in the coordinates y = x / alpha of level s."""
        eps, x_0 = call.eps, call.x_0
        b, variance = contraction(t, s, 1.0 if self.config.eta is None else self.config.eta)
        mean = x_0 + math.sqrt(max((s.sigma / s.alpha) ** 2 - variance, 0.0)) * eps
        past, is_last = self._innovation, s.sigma == 0
        if past is not None:
            change, noise_level = x_0 - past.original, t.sigma / t.alpha
            slopes = measured_slopes(change, call.x / t.alpha - past.expected, past, self._per_channel)
            if not is_last:
                steps = b, past.contraction, noise_ratio(past.start, past.level)
                c = secant_coefficient(slopes.along_change, *steps)
                mean = mean + c.to(mean.dtype) * change
                variance = variance + missing_variance(slopes, c, noise_level, *steps)
            elif self.config.last_step_noise:
                variance = slopes.average * noise_level**2

        y = self._drawn(mean, variance**0.5, call)
        if not is_last:
            expected = x_0 + noise_ratio(t, s) * (s.sigma / s.alpha) * eps
            noise, deviation = self._contained or (None, 0.0)
            self._innovation = Innovation(t, s, x_0, expected, b, noise, deviation)
        return s.alpha * y

    def _self_estimated_step(self, call: Evaluation, t: Level, s: Level) -> torch.Tensor:
        """The ancestral step with the covariance that the last two calls measured, see `self_estimated_variance`."""
        x, x_0 = call.x, call.x_0
        law = transition(t.alpha, t.sigma, s.alpha, s.sigma)
        mean = law.mean(x, x_0)
        x_s, variance, past = mean, law.posterior_variance, self._innovation
        if past is not None and (s.sigma > 0 or self.config.last_step_noise):
            is_isotropic = self.config.variance_type == "self_estimated_isotropic"
            direction, rest = spread_of_original(x_0, x / t.alpha, past, is_isotropic, self._per_channel)
            spread = law.original_weight * t.sigma / t.alpha
            variance = variance + spread**2 * rest
            if direction is not None:
                sign = standard_normal(x.reshape(len(x), -1)[:, :1], call.generator, x.dtype).sign()
                x_s = x_s + spread * sign.reshape((-1,) + (1,) * (x.ndim - 1)) * direction

        x_s = self._drawn(x_s, variance**0.5, call)
        if s.sigma > 0 and t.alpha > 0:
            moved = (t.sigma / t.alpha) ** 2 - (s.sigma / s.alpha) ** 2
            noise, deviation = self._contained or (None, 0.0)
            self._innovation = Innovation(t, s, x_0, mean / s.alpha, 0.0, noise, deviation / s.alpha, moved)
        return x_s

    def _drawn(self, mean: torch.Tensor, deviation: float | torch.Tensor, call: Evaluation) -> torch.Tensor:
        """mean + deviation z; remembers z, and draws none if the deviation is known to be 0."""
        self._contained = None
        if isinstance(deviation, float) and deviation == 0:
            return mean
        z = call.noise()
        self._contained = ContainedNoise(z, deviation)
        return mean + (deviation.to(z.dtype) if isinstance(deviation, torch.Tensor) else deviation) * z

    # ---- corrector --------------------------------------------------------------------------------------------------

    def _correct(self, call: Evaluation, position: int) -> torch.Tensor:
        """One Langevin step on the level of this position."""
        x, level = call.x, self._schedule[position].here
        z = call.noise()
        step_size = self._step_size(call.eps, z, position)
        if isinstance(step_size, float) and step_size == 0:
            return x
        noise, variance = z, 2 * step_size
        if self.config.corrector == "leimkuhler_matthews":
            noise = (self._noise_in(call, (0.5 * step_size) ** 0.5) + z) / 2
            variance = step_size
            self._contained = ContainedNoise(z, (0.5 * step_size) ** 0.5)
        if self.config.variance_type in SELF_ESTIMATED and level.alpha > 0:
            deviation, moved = (2 * step_size) ** 0.5 / level.alpha, variance / level.alpha**2
            self._innovation = Innovation(level, level, call.x_0, x / level.alpha, 0.0, noise, deviation, moved)
        return langevin_step(x, call.eps, level.sigma, step_size, noise)

    def _moved(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """A state on the next level, with the noise that it is known to contain."""
        if self._contained is not None:
            z, scale = self._contained
            self._contained = ContainedNoise(z, scale * factor)
        return x * factor

    def _step_size(self, eps: torch.Tensor, z: torch.Tensor, position: int) -> float | torch.Tensor:
        """delta, () or (B, 1, ..); at most sigma^2 but for "batch_norm", and finite where the score is zero."""
        level, r, rule = self._schedule[position].here, self.config.snr, self.config.step_size_rule
        sigma = level.sigma
        if r == 0 and rule != "reversal":
            return 0.0
        if rule == "sigma":
            return 2 * (r * sigma) ** 2
        if rule == "reversal":
            start = next((visit.here for visit in self._schedule[position::-1] if visit.here != level), None)
            if start is None:  # the first level, to which no step leads
                return 0.0
            arrival = transition(start.alpha, start.sigma, level.alpha, level.sigma)
            return arrival.posterior_variance / (2 * self.config.corrector_steps)
        score_norm, noise_norm = sample_norm(eps) / sigma, sample_norm(z)
        if rule == "batch_norm":  # as published, but for a zero score
            score_norm, noise_norm = score_norm.mean(0, keepdim=True), noise_norm.mean(0, keepdim=True)
            return torch.where(score_norm > 0, 2 * (r * noise_norm / score_norm) ** 2, sigma**2)
        return (2 * (r * noise_norm / score_norm) ** 2).clamp(max=sigma**2)

    def _noise_in(self, call: Evaluation, scale: float | torch.Tensor) -> torch.Tensor:
        """A noise w that x contains with the given scale, as far as it does.

        If x = m + b z, then with b >= scale a share of z and a new z' make w of variance 1 with Cov[x, w] = scale. If
        there is less, w = z with new noise of variance 2 - 2 b / scale, which keeps the variance of x to first order.
        """
        new = call.noise()
        if self._contained is None:
            return math.sqrt(3) * new
        z, b = self._contained
        share = torch.as_tensor(b / scale, dtype=z.dtype)
        within = (1 / share).clamp(max=1)
        missing = torch.where(share >= 1, (1 - within**2).clamp(min=0), (2 - 2 * share).clamp(min=0))
        return within * z + missing.sqrt() * new


def sample_norm(values: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each sample, (B, 1, ..)."""
    norms = values.reshape(len(values), -1).norm(dim=1)
    return norms.reshape((-1,) + (1,) * (values.ndim - 1))
