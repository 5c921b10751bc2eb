r"""A variational autoencoder: images x of a normal latent z, and an encoder that guesses z from x.

    p(z) = N(0, I),    p(x | z) one of the laws of `annealers.models.pixel_likelihood`
    q(z | x) = N(mu(x), diag sigma(x)^2),    z = mu + sigma * eps,    eps ~ N(0, I)

    log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z))                              Kingma & Welling 2014, Eq. 3
    KL = 1/2 sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2)                           ibid., App. B
    log p(x) >= E[log 1/k sum_{i=1}^k p(x | z_i) p(z_i) / q(z_i | x)],  z_i ~ q       Burda et al. 2016, Eq. 8

Everything is a sum over the values of an image or of its latent, in nats, one number for each image. With labels y all
of it but p(z) is given y, which encoder and decoder see as constant planes beside the image and the latent (Sohn et
al. 2015, Sec. 4.1, with p(z | y) = p(z)).

Sources: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114; Burda, Grosse & Salakhutdinov 2016,
"Importance Weighted Autoencoders", arXiv:1509.00519; Sohn, Yan & Lee 2015, "Learning Structured Output Representation
using Deep Conditional Generative Models", NeurIPS. Encoder and decoder are those of Rombach et al. 2022, "High-
Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, so it serves their pipelines as `vae`.

    symbol       code            shape           meaning
    x            sample, x       (B, C, H, W)    image in [-1, 1]
    y            class_labels    (B,)            class ids
    z            latents, z      (B, C_z, h, w)  (B, C_z, 1, 1) if it is flat
    eps          noise           as z            what z is drawn with
    mu, sigma    latent_dist     as z            a `DiagonalGaussianDistribution`
    lambda       parameters      (B, P, H, W)    what the decoder says of x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from annealers.models.convolutional import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    check_images,
    feature_size,
    reduction_factor,
    with_class_planes,
)
from annealers.models.importance_weighting import importance_weighted_bound
from annealers.models.pixel_likelihood import (
    Generators,
    PixelLikelihood,
    at_least_float32,
    make_likelihood,
    normal_numbers,
)

TILE_OVERLAP = 0.25  # of a tile with the next; AutoencoderKL's


@dataclass
class VAEOutput(BaseOutput):
    """What a variational autoencoder makes of images; -ELBO = nll + kl.

    Args:
        sample: E[x | z], (B, C, H, W).
        latent_dist: q(z | x), in at least float32.
        latents: The z that was drawn, (B, C_z, h, w).
        nll: -log p(x | z) in nats, (B,).
        kl: KL(q(z | x) || p(z)) in nats, (B,).
    """

    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution
    latents: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor


class VAEModel(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A convolutional variational autoencoder, of images or of images given their class.

    Args:
        in_channels: C.
        sample_size: Side of the images, or (height, width). A spatial latent takes other sizes, too.
        latent_channels: C_z.
        block_out_channels: Channels of each resolution level; each level but the last ends by halving the image.
        layers_per_block: Residual blocks per level of the encoder; a level of the decoder has one more.
        norm_num_groups: Groups of the normalisation.
        mid_block_add_attention: Self-attention at the lowest resolution.
        flat_latent: Whether the latent is a vector, (C_z, 1, 1), rather than a map, (C_z, H / f, W / f).
        likelihood: "bernoulli", "gaussian", "discretized_logistic" or "discretized_mix_logistic".
        num_levels: Number of values that a channel of a pixel may have, but for "bernoulli", which has two.
        sigma: Standard deviation of "gaussian", in units of images in [-1, 1]; that at first if it is learnt.
        learn_sigma: Whether it is learnt. One that is too large switches the latent off, and one at the root of the
            mean squared error is the best.
        num_mixtures: Components of "discretized_mix_logistic".
        num_class_embeds: Number of classes; None if the model knows of none.
        scaling_factor: What latents are multiplied by before a latent diffusion model sees them, 1 over their standard
            deviation.
        shift_factor: What is taken off before, for pipelines that do.
        latents_mean, latents_std: The same for each channel, for pipelines that do so.
        force_upcast: Whether pipelines run the model in float32 even if its weights are of half precision. The laws of
            this model are computed in float32 in any case.

    Raises:
        ValueError: If the levels do not divide the size, or an option is out of range.

    Example:
        >>> from annealers import VAEModel
        >>> model = VAEModel(in_channels=1, sample_size=8, latent_channels=2, block_out_channels=(8, 16))
        >>> output = model(torch.rand(5, 1, 8, 8) * 2 - 1)
        >>> output.latents.shape, output.nll.shape, output.kl.shape
        (torch.Size([5, 2, 4, 4]), torch.Size([5]), torch.Size([5]))
    """

    __module__ = "annealers"  # its public name
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["pixel_likelihood"]  # log sigma counts once for every value of an image

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        mid_block_add_attention: bool = True,
        flat_latent: bool = False,
        likelihood: str = "gaussian",
        num_levels: int = 256,
        sigma: float = 1.0,
        learn_sigma: bool = True,
        num_mixtures: int = 10,
        num_class_embeds: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        if latent_channels < 1 or (num_class_embeds is not None and num_class_embeds < 1):
            raise ValueError(
                f"need latent_channels >= 1 and num_class_embeds >= 1 or None, got {latent_channels} and "
                f"{num_class_embeds}"
            )
        self.pixel_likelihood = make_likelihood(likelihood, in_channels, num_levels, sigma, learn_sigma, num_mixtures)
        label_planes = 0 if num_class_embeds is None else block_out_channels[0]
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, label_planes)
        shared = (
            sample_size,
            tuple(block_out_channels),
            layers_per_block,
            norm_num_groups,
            mid_block_add_attention,
            flat_latent,
        )
        self.encoder = ConvolutionalEncoder(in_channels + label_planes, 2 * latent_channels, *shared)
        self.decoder = ConvolutionalDecoder(
            latent_channels + label_planes, self.pixel_likelihood.parameter_channels, *shared
        )
        latent_size = (1, 1) if flat_latent else feature_size(sample_size, block_out_channels)
        self.latent_shape = (latent_channels, *latent_size)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_latent_min_size = latent_size  # of tiles; their images are f times as large

    @property
    def likelihood(self) -> PixelLikelihood:
        """p(x | lambda); the submodule has another name, since the config has one of this name."""
        return self.pixel_likelihood

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Shape of the noise of one image, which is that of its latent."""
        return self.latent_shape

    # ---- images to latents ------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """q(z | x), or q(z | x, y).

        Args:
            x: Images in [-1, 1], (B, C, H, W).
            class_labels: y, (B,), of a model with classes.
            return_dict: Return an `AutoencoderKLOutput` rather than a tuple.

        Raises:
            ValueError: If the images or the labels do not fit the model.
        """
        if self.use_slicing and len(x) > 1:
            moments = torch.cat([self._encode_tiles(*one) for one in _single(x, class_labels)])
        else:
            moments = self._encode_tiles(x, class_labels)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def moments(self, x: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """mu and log sigma^2 beside each other, (B, 2 C_z, h, w)."""
        self._check_images(x)
        return self.encoder(self._with_class_planes(x, class_labels))

    def _encode_tiles(self, x: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        f = reduction_factor(self.config.block_out_channels)
        if not self.use_tiling:
            return self.moments(x, class_labels)
        self._check_images(x)
        return blended_tiles(lambda tile: self.moments(tile, class_labels), x, self.tile_latent_min_size, f, 1)

    # ---- latents to images ------------------------------------------------------------------------------------------

    @apply_forward_hook
    def decode(
        self,
        z: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        generator: Generators | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """E[x | z], or E[x | z, y]; `likelihood.draw(decoder_parameters(z))` draws x itself.

        Args:
            z: Latents, (B, C_z, h, w).
            class_labels: y, (B,), of a model with classes.
            return_dict: Return a `DecoderOutput` rather than a tuple.
            generator: Not used, since nothing is drawn; pipelines pass one.

        Raises:
            ValueError: If the latents or the labels do not fit the model.
        """
        if self.use_slicing and len(z) > 1:
            sample = torch.cat([self._decode_tiles(*one) for one in _single(z, class_labels)])
        else:
            sample = self._decode_tiles(z, class_labels)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decoder_parameters(self, z: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """lambda, what the likelihood needs, (B, P, H, W)."""
        return self._parameters_of(z, class_labels)

    def _parameters_of(self, z: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        C_z, *flat_size = self.latent_shape
        if z.ndim != 4 or z.shape[1] != C_z or (self.config.flat_latent and list(z.shape[2:]) != flat_size):
            sides = "1, 1" if self.config.flat_latent else "h, w"
            raise ValueError(f"latents must be (B, {C_z}, {sides}), got {tuple(z.shape)}")
        return self.decoder(self._with_class_planes(z, class_labels))

    def prior_sample(self, batch_size: int, generator: Generators | None = None) -> torch.Tensor:
        """z ~ N(0, I), (B, C_z, h, w); a list of generators gives each sample its own."""
        shape = (batch_size, *self.latent_shape)
        return normal_numbers(shape, generator, self.device, self.dtype)

    def _decode_tiles(self, z: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        def mean(tile: torch.Tensor) -> torch.Tensor:
            return self.likelihood.mean(self._parameters_of(tile, class_labels))

        if not self.use_tiling:
            return mean(z)
        return blended_tiles(mean, z, self.tile_latent_min_size, 1, reduction_factor(self.config.block_out_channels))

    # ---- the bounds -------------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        sample_posterior: bool = True,
        noise: torch.Tensor | None = None,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> VAEOutput | tuple:
        """The two terms of the bound at one z for each image.

        Args:
            sample: x in [-1, 1], (B, C, H, W).
            class_labels: y, (B,), of a model with classes.
            sample_posterior: Draw z; otherwise z = mu, and nll + kl is no bound.
            noise: eps, (B, C_z, h, w); drawn if None.
            generator: What it is drawn with; a list gives each image its own.
            return_dict: Return a `VAEOutput` rather than a tuple.

        Raises:
            ValueError: If shapes do not fit the model or each other, or the likelihood does not allow a value.
        """
        posterior = DiagonalGaussianDistribution(at_least_float32(self.moments(sample, class_labels)))
        z = posterior.mean
        if sample_posterior:
            if noise is None:
                noise = normal_numbers(z.shape, generator, z.device, z.dtype)
            if noise.shape != z.shape:
                raise ValueError(f"noise must be {tuple(z.shape)}, got {tuple(noise.shape)}")
            z = z + posterior.std * noise.to(z.dtype)
        parameters = self._parameters_of(z, class_labels)
        with torch.autocast(sample.device.type, enabled=False):
            nll = -self.likelihood.log_prob(parameters, sample)
            kl = posterior.kl()
            mean = self.likelihood.mean(parameters)
        output = VAEOutput(sample=mean, latent_dist=posterior, latents=z, nll=nll, kl=kl)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    @apply_forward_hook
    def log_prob(
        self,
        x: torch.Tensor,
        num_samples: int,
        chunk_size: int = 10,
        class_labels: torch.Tensor | None = None,
        generator: Generators | None = None,
    ) -> torch.Tensor:
        """The importance-weighted bound of log p(x) in nats, (B,), in at least float32; tighter the larger k is.

        With k = 1 it is the bound that is trained, with log q / p at the z that was drawn in the place of its mean.

        Args:
            x: Images in [-1, 1], (B, C, H, W).
            num_samples: k, for each image.
            chunk_size: How many of them are decoded at once; nothing but memory and time depends on it.
            class_labels: y, (B,), of a model with classes.
            generator: What z is drawn with; a list gives each image its own.

        Raises:
            ValueError: If a number is below one, or see `forward`.
        """
        posterior = DiagonalGaussianDistribution(at_least_float32(self.moments(x, class_labels)))
        shape, device, dtype = posterior.mean.shape, posterior.mean.device, posterior.mean.dtype

        def log_weights(c: int) -> torch.Tensor:
            # One draw at a time: what they are does not depend on the size of the chunks.
            eps = torch.stack([normal_numbers(shape, generator, device, dtype) for _ in range(c)])  # (c, B, C_z, h, w)
            z = posterior.mean + posterior.std * eps
            labels = None if class_labels is None else class_labels.repeat(c)
            parameters = self._parameters_of(z.flatten(0, 1), labels)
            with torch.autocast(x.device.type, enabled=False):
                log_likelihood = self.likelihood.log_prob(parameters, x.repeat(c, 1, 1, 1)).unflatten(0, (c, -1))
                log_prior_over_posterior = (0.5 * (eps**2 - z**2 + posterior.logvar)).flatten(2).sum(dim=2)
            return log_likelihood + log_prior_over_posterior

        return importance_weighted_bound(log_weights, num_samples, chunk_size)

    # ---- labels, shapes, tiles --------------------------------------------------------------------------------------

    def enable_tiling(self) -> None:
        """Encodes and decodes in overlapping tiles of the size of the training images, to save memory.

        Raises:
            ValueError: If the latent is flat, which is of the whole image.
        """
        if self.config.flat_latent:
            raise ValueError("a model with flat_latent=True cannot encode tiles: its latent is of the whole image")
        super().enable_tiling()

    def _with_class_planes(self, x: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        # Only here does an image become one of half precision: the likelihood wants the values that it has.
        return with_class_planes(x.to(self.dtype), class_labels, self.class_embedding)

    def _check_images(self, x: torch.Tensor) -> None:
        config = self.config
        check_images(x, config.in_channels, config.sample_size, config.block_out_channels, config.flat_latent)


def blended_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: tuple[int, int],
    scale_in: int,
    scale_out: int,
) -> torch.Tensor:
    """A function of overlapping tiles of x, with a linear passage from each to the next, that sums to one everywhere.

    Args:
        function: Of a tile, (B, C, scale_in a, scale_in b), to (B, C', scale_out a, scale_out b).
        x: (B, C, scale_in h, scale_in w).
        tile: The largest (a, b).
        scale_in, scale_out: Of latents 1, of images f.

    Returns:
        (B, C', scale_out h, scale_out w).
    """
    height, width = x.shape[2] // scale_in, x.shape[3] // scale_in
    total: torch.Tensor | None = None
    for top, bottom, rows in _overlapping(height, tile[0], scale_out):
        for left, right, columns in _overlapping(width, tile[1], scale_out):
            pixels = x[:, :, top * scale_in : bottom * scale_in, left * scale_in : right * scale_in]
            y = function(pixels)
            if total is None:
                total = y.new_zeros(*y.shape[:2], height * scale_out, width * scale_out)
            weight = torch.outer(rows, columns).to(y)
            total[:, :, top * scale_out : bottom * scale_out, left * scale_out : right * scale_out] += weight * y
    return total


def _overlapping(length: int, tile: int, scale: int) -> list[tuple[int, int, torch.Tensor]]:
    """Start, end and weights, (scale * (end - start),), of the tiles along an axis, until one reaches its end."""
    overlap = int(tile * TILE_OVERLAP)
    starts = range(0, max(length - overlap, 1), tile - overlap)
    ends = [min(start + tile, length) for start in starts]
    weights = [torch.ones(scale * (end - start)) for start, end in zip(starts, ends, strict=True)]
    rise = torch.arange(scale * overlap) / max(scale * overlap, 1)
    for before, after in pairwise(weights):
        after[: len(rise)] = rise
        before[len(before) - len(rise) :] = 1 - rise
    return list(zip(starts, ends, weights, strict=True))


def _single(x: torch.Tensor, class_labels: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each image or latent with its label."""
    labels = [None] * len(x) if class_labels is None else class_labels.split(1)
    return list(zip(x.split(1), labels, strict=True))
