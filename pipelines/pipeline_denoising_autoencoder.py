r"""The walk of a denoising autoencoder to the manifold of its data: denoise a little, again and again.

    x <- (1 - eta) x + eta DAE(x) = x + eta sigma^2 s(x),    s(x) = (DAE(x) - x) / sigma^2 = grad log p_sigma(x)

The second form holds for the best denoiser of data with noise of standard deviation sigma (Alain & Bengio 2014): the
walk is gradient ascent on the log-density of the noisy data. It begins at images, which it cleans or completes to ones
that the autoencoder knows, or at noise, and ends on an attractor. The same attractor is found from many places, and
the walk draws no noise after the start, so where it ends is no sample of the data; for that take the score to
`annealers.schedulers.langevin`, or one of the other pipelines.

Source: Alain & Bengio 2014, "What Regularized Auto-Encoders Learn from the Data-Generating Distribution",
arXiv:1211.4246, Thm. 1; the walk, its attractors and their rates are in `annealers.denoising`.

    symbol    code          shape           meaning
    x         sample        (B, C, H, W)    state; where it begins, and the image in [-1, 1] at last
    DAE(x)    denoised      (B, C, H, W)    D(E(x))
    eta       step_size     ()              part of the way to DAE(x), 0 < eta <= 1
    sigma     noise_std     ()              the noise that the autoencoder was trained on, of its config
"""

import math

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from annealers.attractors import iterative_denoising
from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.class_labels import common_batch_size
from annealers.pipelines.image_inputs import Images, check_output_type, image_tensor
from annealers.pipelines.pipeline_guided_diffusion import Generators, GuidedDiffusionPipelineOutput, Trajectory


class DenoisingAutoencoderPipeline(AnnealersPipeline):
    """Walks from images or from noise to what a denoising autoencoder knows.

    Args:
        autoencoder: `AutoencoderModel`, as a rule one with `noise_std` > 0; a plain one repeats its reconstruction.

    Raises:
        ValueError: If the autoencoder returns other channels than it takes.

    Example:
        >>> import torch
        >>> import annealers
        >>> autoencoder = annealers.AutoencoderModel(
        ...     in_channels=1, out_channels=1, sample_size=8, block_out_channels=(8, 8), flat_latent=True,
        ...     noise_std=0.5)
        >>> pipeline = annealers.DenoisingAutoencoderPipeline(autoencoder)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = pipeline(batch_size=2, generator=torch.Generator().manual_seed(0)).images  # from noise
        >>> cleaned = pipeline(images, num_inference_steps=3).images
        >>> len(cleaned), cleaned[0].size
        (2, (8, 8))
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "autoencoder"

    def __init__(self, autoencoder: ModelMixin) -> None:
        taken, returned = autoencoder.config.in_channels, autoencoder.config.out_channels
        if taken != returned:
            raise ValueError(
                f"a walk needs an autoencoder that returns what it takes, got channels {taken} and {returned}"
            )
        super().__init__(autoencoder=autoencoder)

    @torch.no_grad()
    def __call__(
        self,
        image: Images | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 20,
        step_size: float = 0.5,
        noise_level: float | None = None,
        generator: Generators | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_trajectory: bool = False,
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Walks to the manifold.

        Args:
            image: Where to begin: PIL images, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [-1, 1],
                of any values. None begins at zero, the grey image, and adds noise.
            batch_size: Number of images, B. Taken from `image` or `generator` if they have a length; 1 if none does.
            num_inference_steps: Number of steps; each is one call of the autoencoder.
            step_size: eta, in (0, 1]; 1 puts DAE(x) in the place of x.
            noise_level: Standard deviation of noise that is added to where the walk begins; None is none for images,
                and 1 without.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the state itself.
            return_dict: Return a `GuidedDiffusionPipelineOutput` rather than a tuple.
            return_trajectory: Also return the states on the way, with DAE(x) as their predictions and the numbers of
                the steps as their timesteps, for `annealers.figures`.

        Returns:
            The images, and the trajectory if it was asked for.

        Raises:
            ValueError: If the arguments disagree on B, a number is out of range, images are of another shape than the
                autoencoder takes, or the output type does not exist for this number of channels.
        """
        check_output_type(output_type, self.autoencoder.config.in_channels, whose="autoencoder")
        if noise_level is None:
            noise_level = 1.0 if image is None else 0.0
        if not 0 <= noise_level < math.inf:
            raise ValueError(f"noise_level must be finite and not negative, got {noise_level}")

        sample = self._start(image, batch_size, noise_level, generator)
        predictions: list[torch.Tensor] = []

        def denoiser(x: torch.Tensor) -> torch.Tensor:
            denoised = self._denoised(x)
            if return_trajectory:
                predictions.append(denoised.cpu())
            return denoised

        states = iterative_denoising(
            denoiser, sample, step_size, num_inference_steps, return_trajectory, progress_bar=self.progress_bar
        )
        sample = states[-1] if return_trajectory else states
        images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_trajectory:
            return GuidedDiffusionPipelineOutput(images=images) if return_dict else (images,)
        trajectory = Trajectory(
            samples=states.cpu(),
            predictions=torch.stack(predictions) if predictions else None,
            timesteps=torch.arange(len(predictions)),
        )
        return GuidedDiffusionPipelineOutput(images, trajectory) if return_dict else (images, trajectory)

    @torch.no_grad()
    def score(self, image: Images) -> torch.Tensor:
        """(DAE(x) - x) / sigma^2 at images given as to the call, (B, C, H, W): the score of the noisy data.

        Raises:
            ValueError: If the autoencoder is a plain one, or the images are of another shape than it takes.
        """
        sigma = self.autoencoder.config.noise_std
        if sigma == 0:
            raise ValueError("a plain autoencoder, noise_std=0, knows no score: take one that was trained on noise")
        sample = self._start(image, None, 0.0, None)
        return (self._denoised(sample) - sample) / sigma**2

    def _denoised(self, sample: torch.Tensor) -> torch.Tensor:
        """DAE(x) of a half-precision autoencoder too, in the dtype of the state."""
        return self.autoencoder.denoise(sample.to(self.autoencoder.dtype)).to(sample.dtype)

    def _start(
        self, image: Images | None, batch_size: int | None, noise_level: float, generator: Generators | None
    ) -> torch.Tensor:
        """Where the walk begins, (B, C, H, W), in at least float32: the images or zero, and noise."""
        autoencoder, device = self.autoencoder, self._execution_device
        dtype = torch.promote_types(autoencoder.dtype, torch.float32)
        sample = None
        if image is not None:
            sample = image_tensor(image, autoencoder.config.in_channels, bounded=False).to(device, dtype)
        batch_size = common_batch_size(
            batch_size=batch_size,
            image=None if sample is None else len(sample),
            generator=len(generator) if isinstance(generator, list) else None,
        )
        if sample is None:
            shape = (batch_size, autoencoder.config.in_channels, *autoencoder.image_size)
            sample = torch.zeros(shape, device=device, dtype=dtype)
        if noise_level == 0:
            return sample
        return sample + noise_level * randn_tensor(sample.shape, generator=generator, device=device, dtype=dtype)
