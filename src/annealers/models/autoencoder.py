r"""An autoencoder, plain or denoising: encode and decode, trained to give back the image.

    L(x) = |x' - D(E(x + sigma eps))|^2,    x' = x,    eps ~ N(0, I)

The encoder sees x + sigma eps, but what is to be returned is the clean x; sigma = 0 is the plain autoencoder. With any
sigma > 0 the best of all maps DAE = D E is the conditional mean, which knows the score of the noisy data:

    DAE(y) = E[x | x + sigma eps = y] = y + sigma^2 grad log p_sigma(y)                    Alain & Bengio 2014, Thm. 1

So (DAE(y) - y) / sigma^2 is a score, and denoising again and again climbs to a mode; `annealers.denoising` has the
walk, the rate at which a point attracts, and what a linear autoencoder can be at best. Another target x' than the
image itself makes it undo other corruptions: masked pixels (Vincent et al. 2010, Sec. 3.3), lost colour.

Sources: Vincent, Larochelle, Bengio & Manzagol 2008, "Extracting and Composing Robust Features with Denoising
Autoencoders", ICML; Vincent, Larochelle, Lajoie, Bengio & Manzagol 2010, "Stacked Denoising Autoencoders", JMLR 11;
Alain & Bengio 2014, "What Regularized Auto-Encoders Learn from the Data-Generating Distribution", arXiv:1211.4246;
Bourlard & Kamp 1988, "Auto-Association by Multilayer Perceptrons and Singular Value Decomposition", Biol. Cybern. 59
(the linear case).

    symbol    code         shape              meaning
    x         sample       (B, C, H, W)       image in [-1, 1]
    x'        target       (B, C', H, W)      what is to be returned, x if nothing else is said
    sigma     noise_std    ()                 standard deviation of the noise, in units of x
    eps       noise        (B, C, H, W)       standard normal
    z         latents      (B, C_z, h, w)     E(x + sigma eps); a flat latent has h = w = 1
    L         loss         (B,)               summed over the values of an image
"""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from annealers.models.convolutional import ConvolutionalDecoder, ConvolutionalEncoder, feature_size
from annealers.models.pixel_likelihood import Generators, normal_numbers


@dataclass
class AutoencoderOutput(BaseOutput):
    """What the autoencoder returns.

    Args:
        sample: D(E(x + sigma eps)), (B, C', H, W).
        latents: E(x + sigma eps), (B, C_z, h, w).
        loss: Squared error of `sample`, summed over the values of an image; (B,), in at least float32.
    """

    sample: torch.Tensor
    latents: torch.Tensor
    loss: torch.Tensor


class AutoencoderModel(ModelMixin, ConfigMixin):
    """An autoencoder with a spatial or a flat latent.

    Args:
        in_channels: C.
        out_channels: C', of what is returned; another number than C needs a `target` to train on.
        sample_size: Side of the images, or (H, W). With a spatial latent it is a record, since the layers take images
            of any size that the levels can halve.
        latent_channels: C_z.
        block_out_channels: Channels of each resolution level; each level but the last ends by halving the image. ()
            is the linear autoencoder, one affine map to a flat latent and one back.
        layers_per_block: Residual blocks per level; the decoder has one more.
        norm_num_groups: Groups of the normalisation.
        mid_block_add_attention: Self-attention at the lowest resolution.
        flat_latent: Whether the latent is a vector, kept as (C_z, 1, 1).
        noise_std: sigma, of the noise that `forward` adds; 0 for none.

    Raises:
        ValueError: If the levels do not fit the image, the noise is negative, or a linear autoencoder is asked for a
            spatial latent.

    Example:
        >>> from annealers import AutoencoderModel
        >>> model = AutoencoderModel(in_channels=1, out_channels=1, sample_size=8, latent_channels=16,
        ...                          block_out_channels=(32, 64), flat_latent=True, noise_std=0.5)
        >>> images = torch.rand(3, 1, 8, 8) * 2 - 1
        >>> model(images).loss.shape, model.encode(images).shape, model.denoise(images).shape
        (torch.Size([3]), torch.Size([3, 16, 1, 1]), torch.Size([3, 1, 8, 8]))
    """

    __module__ = "annealers"  # its public name

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        mid_block_add_attention: bool = True,
        flat_latent: bool = False,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std must be finite and not negative, got {noise_std}")
        if min(in_channels, out_channels, latent_channels, layers_per_block) < 1:
            raise ValueError(
                "need in_channels, out_channels, latent_channels and layers_per_block >= 1, got "
                f"{in_channels}, {out_channels}, {latent_channels} and {layers_per_block}"
            )
        self.encoder: nn.Module
        self.decoder: nn.Module
        if len(block_out_channels) == 0:
            if not flat_latent:
                raise ValueError("block_out_channels=() is the linear autoencoder, which needs flat_latent=True")
            pixels = math.prod(self.image_size)
            self.encoder = nn.Sequential(
                nn.Flatten(), nn.Linear(in_channels * pixels, latent_channels), nn.Unflatten(1, self.latent_shape)
            )
            self.decoder = nn.Sequential(
                nn.Flatten(),
                nn.Linear(latent_channels, out_channels * pixels),
                nn.Unflatten(1, (out_channels, *self.image_size)),
            )
        else:
            architecture = {
                "sample_size": sample_size,
                "block_out_channels": block_out_channels,
                "layers_per_block": layers_per_block,
                "norm_num_groups": norm_num_groups,
                "mid_block_add_attention": mid_block_add_attention,
                "flat": flat_latent,
            }
            self.encoder = ConvolutionalEncoder(in_channels, latent_channels, **architecture)
            self.decoder = ConvolutionalDecoder(latent_channels, out_channels, **architecture)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images it is made for."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C_z, h, w) of such an image."""
        channels, levels = self.config.latent_channels, self.config.block_out_channels
        return (channels, 1, 1) if self.config.flat_latent else (channels, *feature_size(self.image_size, levels))

    # ---- the two halves ---------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """z = E(x), without noise: (B, C, H, W) -> (B, C_z, h, w).

        Raises:
            ValueError: If the shape is none of an image of this model.
        """
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample must be (B, {channels}, H, W), got {tuple(sample.shape)}")
        if not self.config.flat_latent:
            feature_size((sample.shape[2], sample.shape[3]), self.config.block_out_channels)
        elif sample.shape[2:] != self.image_size:
            raise ValueError(
                f"a flat latent is of images of one size, {' x '.join(map(str, self.image_size))}, got a sample of "
                f"shape {tuple(sample.shape)}"
            )
        return self.encoder(sample)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """D(z): (B, C_z, h, w) -> (B, C', H, W).

        Raises:
            ValueError: If the shape is none of a latent of this model.
        """
        channels, flat = self.config.latent_channels, self.config.flat_latent
        fits = latents.ndim == 4 and latents.shape[1] == channels and (not flat or latents.shape[2:] == (1, 1))
        if not fits:
            sides = "1, 1" if flat else "h, w"
            raise ValueError(f"latents must be (B, {channels}, {sides}), got {tuple(latents.shape)}")
        return self.decoder(latents)

    # ---- as a denoiser ----------------------------------------------------------------------------------------------

    def denoise(self, sample: torch.Tensor) -> torch.Tensor:
        """DAE(y) = D(E(y)) of images that are noisy already, (B, C, H, W) -> (B, C', H, W); adds no noise."""
        return self.decode(self.encode(sample))

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        generator: Generators | None = None,
        target: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AutoencoderOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds noise, encodes, decodes and compares.

        Args:
            sample: x, (B, C, H, W).
            noise: eps, as `sample`; drawn if None and sigma > 0.
            generator: One for the batch, or a list with one per image, to draw it with.
            target: x', (B, C', H, W); None for the clean `sample`.
            return_dict: Return an `AutoencoderOutput` rather than a tuple.

        Raises:
            ValueError: If the shapes do not fit the model or each other, or noise is given to a plain autoencoder.
        """
        latents = self.encode(self._noised(sample, noise, generator))
        reconstruction = self.decode(latents)
        target = sample if target is None else target
        if reconstruction.shape != target.shape:
            raise ValueError(
                f"the target must have the shape of what is returned, {tuple(reconstruction.shape)}, got "
                f"{tuple(target.shape)}"
            )
        dtype = torch.promote_types(reconstruction.dtype, torch.float32)
        loss = ((reconstruction.to(dtype) - target.to(dtype)) ** 2).flatten(1).sum(dim=1)  # (B,)
        return AutoencoderOutput(reconstruction, latents, loss) if return_dict else (reconstruction, latents, loss)

    def _noised(self, sample: torch.Tensor, noise: torch.Tensor | None, generator: Generators | None) -> torch.Tensor:
        """x + sigma eps."""
        sigma = self.config.noise_std
        if sigma == 0:
            if noise is not None:
                raise ValueError("noise was given to a plain autoencoder, noise_std=0")
            return sample
        if noise is None:
            noise = normal_numbers(sample.shape, generator, sample.device, sample.dtype)
        if noise.shape != sample.shape:
            raise ValueError(f"noise must have the shape {tuple(sample.shape)} of sample, got {tuple(noise.shape)}")
        return sample + sigma * noise
