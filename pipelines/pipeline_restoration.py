r"""Inpainting, super-resolution, deblurring, colouring and denoising with a diffusion model that was trained for none.

The pipeline draws from p(x_0 | y), where y = H x_0 + sigma_y n is what was measured:

    method          what it is                                          the law of the result
    "spectral"      p(x_0 | x_t) conditioned on y, one singular         the posterior if the data are N(m, S I) or
                    direction at a time                                 N(m, V diag(S) V^T), at any number of steps
    "covariance"    the same with the correlations that the network     as steps grow the posterior for any Gaussian
                    knows, through its Jacobian                         data, its mean at any number of steps
    "replacement"   known pixels replaced (Lugmayr et al. 2022)         the posterior if pixels are independent
    "ddrm"          the update of Kawar et al. 2022, for comparison     not the posterior

What is said of "covariance" is so where the path begins with pure noise; else it has the error of the start.
Formulas, proof and sources are in `annealers.restoration`, the operators in `annealers.measurements`.

Of the scheduler it uses the path, the placement of levels, what restricts x̂_0 and the calibration; the steps are those
of the method. Any scheduler of annealers will do, and one of Diffusers as
`DDPMAncestralScheduler.from_config(pipeline.scheduler.config)`.

What a network knows at a state is summed up in r_t^2, the variance that each coordinate of x_0 has there. Too large a
value trusts a noisy measurement too much, too small a value leaves it unheard; for a measurement without noise it only
decides the noise of what is not measured:

    uncertainty       r_t^2
    "data_variance"   S sigma^2 / (alpha^2 S + sigma^2), of data with variance S; S = 1 is the choice of PiGDM
    "calibrated"      E|x_0 - x̂_0|^2 / d as measured by `annealers.calibration.calibrate_spacing`
    "network"         (sigma / alpha)^2 Lambda, of this state, by a network in a `PosteriorVarianceModel`; of each
                      pixel for a mask and for denoising, else their mean
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from annealers.measurements import MeasurementOperator
from annealers.pipelines.pipeline_guided_diffusion import (
    ClassLabels,
    Generators,
    GuidedDiffusionPipeline,
    GuidedDiffusionPipelineOutput,
    Trajectory,
)
from annealers.restoration import (
    DDRM,
    Belief,
    Prior,
    Replacement,
    RestorationMethod,
    SpectralMeasurement,
    SpectralPosterior,
    resampled_levels,
)
from annealers.schedulers.gaussian_path import DATA, Level, standard_normal, transition

METHODS = ("spectral", "covariance", "replacement", "ddrm")
UNCERTAINTIES = ("data_variance", "calibrated", "network")


class RestorationPipeline(GuidedDiffusionPipeline):
    """Draws images that fit a measurement.

    The components and their folder are those of `GuidedDiffusionPipeline`, classes and guidance included, so whatever
    `training/train_ddpm.py` wrote loads, and one at hand is taken as `RestorationPipeline(**pipeline.components,
    id2label=pipeline.id2label, null_label=pipeline.null_label)`. The network may also be one of latents, measured as
    latents, without a vae: what is measured of images is not linear in their latents.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> import annealers
        >>> from annealers.measurements import Downsample
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
        >>> pipeline = annealers.RestorationPipeline(unet, annealers.DDPMAncestralScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> small = torch.zeros(2, 1, 4, 4)
        >>> large = pipeline(small, Downsample(2), noise_level=0.1, num_inference_steps=4).images
        >>> len(large), large[0].size
        (2, (8, 8))
    """

    __module__ = "annealers"  # its public name

    @torch.inference_mode(False)  # in which no Jacobian could be had
    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        measurement: torch.Tensor,
        operator: MeasurementOperator,
        noise_level: float = 0.0,
        method: str = "spectral",
        uncertainty: str = "data_variance",
        data_mean: float | torch.Tensor = 0.0,
        data_variance: float | torch.Tensor = 1.0,
        iterations: int = 2,
        jump_length: int = 10,
        resamples: int = 1,
        eta: float = 0.85,
        eta_b: float = 1.0,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        classifier_scale: float = 0.0,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_trajectory: bool = False,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Draws one image for each measurement, or several for one.

        The last step is noise-free unless `scheduler.config.last_step_noise` is set, as in the schedulers. With it the
        result is a draw from the posterior; without it, the mean of the last of these Gaussians, which looks cleaner.

        Args:
            measurement: y, of `operator.measurement_shape`, in the range [-1, 1] of the network. A single one,
                (1, ..), serves the whole batch.
            operator: H, of `annealers.measurements`.
            noise_level: sigma_y, the standard deviation of the noise of y, in the same units; 0 for none.
            method: "spectral", "covariance", "replacement" or "ddrm", see this module's docstring.
            uncertainty: "data_variance", "calibrated" or "network", see there. Not used by "ddrm".
            data_mean: m, a number or (C, H, W); used for the start alone, where it hardly matters.
            data_variance: S, used for the start, and for r_t^2 if `uncertainty` is "data_variance". A number, or one
                per coordinate, (C, H, W), such as `operator.to_spectral(images).var(dim=0)`.
            iterations: Of "covariance": products with the covariance in a step, besides one more; each is a backward
                pass through the network, with the memory that takes. One or two are best with trained networks, whose
                Jacobian is no exact covariance, and as many as there are values measured with an exact one.
            jump_length: Levels that the chain goes back at once when it resamples.
            resamples: How often each of these stretches is walked; 1 is the plain chain, RePaint takes 10. The network
                is called nearly `resamples` times as often.
            eta, eta_b: Of "ddrm": shares of fresh noise, and of the measurement.
            batch_size: Number of images, B. Taken from the measurement, `class_labels`, `generator` or `latents`.
            class_labels, guidance_scale, classifier_scale: As in `GuidedDiffusionPipeline`.
            num_inference_steps: Number of noise levels, N.
            timesteps: Train timesteps to use instead, decreasing.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            latents: Initial standard normal noise, (B, C, H, W); drawn if None.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the state itself.
            return_dict: Return a `GuidedDiffusionPipelineOutput` rather than a tuple.
            return_trajectory: Also return the states on the way; its predictions are the x̂_0 that the measurement has
                corrected.
            callback_on_step_end: Called as `callback(pipeline, i, t, tensors)` after each network call; it returns the
                dict of tensors to go on with, and may set `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: Names of those tensors, of "latents" and "class_labels".

        Returns:
            The images, and the trajectory if it was asked for.

        Raises:
            ValueError: If shapes or the arguments' numbers of images do not fit, a name is unknown, the noise level or
                variance is negative, something is not finite, the method cannot use the operator, the uncertainty was
                not measured, or the scheduler is not on a Gaussian path.
        """
        callback_inputs = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_output_type(output_type)
        self._check_guidance(class_labels, guidance_scale, classifier_scale)
        self._check_settings(method, uncertainty, noise_level, data_mean, data_variance)
        if not isinstance(measurement, torch.Tensor) or not measurement.is_floating_point():
            got = getattr(measurement, "dtype", type(measurement).__name__)
            raise ValueError(f"the measurement must be a floating-point tensor in [-1, 1], got {got}")
        if len(measurement) != 1:
            if batch_size not in (None, len(measurement)):
                raise ValueError(f"{len(measurement)} measurements make as many images, got batch_size={batch_size}")
            batch_size = len(measurement)
        batch_size = self._run_size(batch_size, class_labels, generator, latents)

        self._keep_settings(guidance_scale, classifier_scale)
        labels, null_labels = self._label_tensors(class_labels, batch_size)

        measurement = measurement.expand(batch_size, *measurement.shape[1:])
        noise = self._initial_noise(operator.image_shape(measurement.shape), generator, latents)
        S = data_variance.to(noise) if isinstance(data_variance, torch.Tensor) else data_variance
        prior = Prior(torch.as_tensor(data_mean).to(noise).expand_as(noise), S)
        seen = SpectralMeasurement(operator, measurement.to(noise), noise_level)
        restoration: RestorationMethod
        if method == "spectral":
            restoration = SpectralPosterior(seen, prior)
        elif method == "covariance":
            restoration = SpectralPosterior(seen, prior, iterations)
        elif method == "replacement":
            restoration = Replacement(seen, prior)
        else:
            restoration = DDRM(seen, eta, eta_b)

        self._set_timesteps(num_inference_steps, timesteps)
        schedule = self.scheduler.timesteps.unique_consecutive()  # a sampler may repeat its levels
        levels = [self.scheduler._level(t) for t in schedule.tolist()] + [DATA]
        if method == "covariance":
            self.scheduler._check_terminal_snr(levels[0], "method='covariance', like every Jacobian of x̂_0,")
        walk = resampled_levels(len(schedule), jump_length, resamples)
        self._num_timesteps = len(walk)
        keeps_last_noise = self.scheduler.config.get("last_step_noise", False)

        sample = restoration.start(noise, levels[0])
        states, predictions = [sample], []
        with self.progress_bar(total=len(walk)) as progress_bar:
            for i, here in enumerate(walk):
                if self.interrupt:
                    continue
                if i > 0 and here != walk[i - 1] + 1:  # back to where there is more noise
                    sample = self._renoised(sample, levels[walk[i - 1] + 1], levels[here], generator)
                t, u = levels[here], levels[here + 1]
                output, x_0, covariance = self._prediction(
                    sample, t, schedule[here], labels, null_labels, differentiable=method == "covariance"
                )
                variance = self._variance(output, t, operator, uncertainty, S)
                belief = Belief(self.scheduler._restrict(x_0), variance, covariance)
                if u.sigma > 0 or keeps_last_noise:
                    noise = standard_normal(sample, generator, sample.dtype)
                else:
                    noise = torch.zeros_like(sample)
                sample, denoised = restoration.step(sample, belief, t, u, noise)

                if callback_on_step_end is not None:
                    tensors = {"latents": sample, "class_labels": labels}
                    given = {name: tensors[name] for name in callback_inputs}
                    tensors |= callback_on_step_end(self, i, schedule[here], given)
                    sample, labels = tensors["latents"], tensors["class_labels"]
                if return_trajectory:
                    states.append(sample.cpu())
                    predictions.append(denoised.cpu())
                progress_bar.update()

        images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_trajectory:
            return GuidedDiffusionPipelineOutput(images=images) if return_dict else (images,)
        trajectory = Trajectory(
            samples=torch.stack([state.cpu() for state in states]),
            predictions=torch.stack(predictions) if predictions else None,
            timesteps=schedule.cpu()[walk[: len(predictions)]],
        )
        return GuidedDiffusionPipelineOutput(images, trajectory) if return_dict else (images, trajectory)

    # ---- arguments --------------------------------------------------------------------------------------------------

    def _check_settings(
        self,
        method: str,
        uncertainty: str,
        noise_level: float,
        data_mean: float | torch.Tensor,
        data_variance: float | torch.Tensor,
    ) -> None:
        if self.vae is not None:
            raise ValueError(
                "restoration is of what the network draws, and with a vae these are latents, of which an image's "
                "measurement is not linear: take a pipeline of images, or set pipeline.vae = None and measure latents"
            )
        # not by its class, of which an exported scheduler and an exported pipeline have a copy each
        if not hasattr(self.scheduler, "signal_and_noise"):
            raise ValueError(
                f"restoration needs a scheduler of annealers on a Gaussian path, got {type(self.scheduler).__name__}; "
                f"if the network was trained on one, set "
                f"pipeline.scheduler = DDPMAncestralScheduler.from_config(pipeline.scheduler.config)"
            )
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if uncertainty not in UNCERTAINTIES:
            raise ValueError(f"uncertainty must be one of {UNCERTAINTIES}, got {uncertainty!r}")
        if uncertainty == "calibrated" and self.scheduler.config.get("denoising_error") is None:
            raise ValueError(
                "uncertainty='calibrated' needs the measured denoising error of the network: call "
                "annealers.calibration.calibrate_spacing first"
            )
        variance_type = self.scheduler.config.get("variance_type")
        if uncertainty == "network" and variance_type != "posterior":
            raise ValueError(
                f"uncertainty='network' needs a network in a PosteriorVarianceModel and a scheduler with "
                f"variance_type='posterior', got variance_type={variance_type!r}"
            )
        if not 0 <= noise_level < np.inf:
            raise ValueError(f"noise_level must be at least 0, got {noise_level}")
        if not torch.as_tensor(data_mean).isfinite().all():
            raise ValueError(f"data_mean must be finite, got {data_mean}")
        variance = torch.as_tensor(data_variance)
        if not ((variance > 0) & variance.isfinite()).all():
            raise ValueError(f"data_variance must be positive and finite, got {data_variance}")

    def _initial_noise(
        self, image_shape: torch.Size, generator: Generators | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Standard normal noise in the shape of the images, in float32 at least."""
        channels = self.unet.config.in_channels
        if image_shape[1] != channels:
            raise ValueError(f"the measurement is of images {tuple(image_shape)}, the network's have C = {channels}")
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            return standard_normal(
                torch.empty(image_shape, device=self._execution_device, dtype=dtype), generator, dtype
            )
        if latents.shape != image_shape:
            raise ValueError(f"latents must have the shape {tuple(image_shape)}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device, dtype)

    # ---- what the network says at a state ---------------------------------------------------------------------------

    def _prediction(
        self,
        sample: torch.Tensor,
        level: Level,
        t: torch.Tensor,
        class_labels: torch.Tensor | None,
        null_labels: torch.Tensor | None,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The network's output, x̂_0 of it, unclipped, and the product of Cov[x_0 | x_t] with an image."""
        with torch.set_grad_enabled(differentiable):
            x_t = sample.detach().requires_grad_(differentiable)
            output = self.guided_prediction(x_t, t, class_labels, null_labels)
            x_0 = self.scheduler._original_sample(output[:, : x_t.shape[1]], x_t, level.alpha, level.sigma)

        def covariance(v: torch.Tensor) -> torch.Tensor:
            (product,) = torch.autograd.grad(x_0, x_t, v, retain_graph=True)
            return level.sigma**2 / level.alpha * product

        return output.detach(), x_0.detach(), covariance

    def _variance(
        self,
        output: torch.Tensor,
        level: Level,
        operator: MeasurementOperator,
        uncertainty: str,
        data_variance: float | torch.Tensor,
    ) -> float | torch.Tensor:
        """r^2, broadcastable to the coordinates, (B, C, H, W)."""
        if uncertainty == "data_variance":
            return data_variance * level.sigma**2 / (level.alpha**2 * data_variance + level.sigma**2)
        if uncertainty == "calibrated":
            measured = self.scheduler.config.denoising_error
            return float(np.interp(level.timestep, self.scheduler.train_timesteps, measured))
        ratio = level.sigma / level.alpha if level.alpha > 0 else 0.0  # without signal the output says nothing
        variance = ratio**2 * output[:, output.shape[1] // 2 :].clamp(min=0)
        return variance if operator.is_pixelwise else variance.mean(dim=(1, 2, 3), keepdim=True)

    def _renoised(self, sample: torch.Tensor, here: Level, there: Level, generator: Generators | None) -> torch.Tensor:
        """Draws from q(x_there | x_here) of the path, where there is more noise than here."""
        noise = standard_normal(sample, generator, sample.dtype)
        v = transition(there.alpha, there.sigma, here.alpha, here.sigma).forward_variance
        return there.alpha / here.alpha * sample + v**0.5 * noise
