r"""Between images and the latents that a latent diffusion model draws: those of an autoencoder, scaled.

    x_0 = f (z - b),    x = decoder(x_0 / f + b)

The scale f and the shift b are in the config of the autoencoder: f = `scaling_factor` and b = `shift_factor` or, for
each channel c, f = `scaling_factor` / s_c and b = m_c with `latents_std` and `latents_mean`; this is how the pipelines
of Diffusers read them. What is not there is 1 for a scale and 0 for a shift.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, App. G:
f = 1 / std(z), so that the data of the diffusion model have unit variance.

    symbol    code       shape           meaning
    x         images     (B, C, H, W)    in [-1, 1]
    z                    (B, C_z, h, w)  latents of the autoencoder
    x_0       latents    (B, C_z, h, w)  data of the diffusion model
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from diffusers import ModelMixin


def images_of_latents(
    vae: ModelMixin, latents: torch.Tensor, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Decodes the data of a diffusion model, in the dtype of the autoencoder.

    Args:
        vae: An autoencoder of annealers or Diffusers; one with `force_upcast` in its config and float16 weights works
            in float32. One with a codebook quantises first.
        latents: x_0, (B, C_z, h, w).
        class_labels: Class ids (B,), of an autoencoder that has classes.
    """
    scale, shift = scale_and_shift(vae, latents)
    labels = {} if class_labels is None else {"class_labels": class_labels}
    with upcast_if_forced(vae):
        z = (latents / scale + shift).to(vae.dtype)
        return vae.decode(z, return_dict=False, **labels)[0]


def latents_of_images(
    vae: ModelMixin,
    images: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encodes images as data of a diffusion model, in at least float32.

    Args:
        vae: As above.
        images: x in [-1, 1], (B, C, H, W).
        class_labels: As above.
        noise: Standard normal, (B, C_z, h, w), to draw from the posterior of an autoencoder that has one; None takes
            its mean.
    """
    labels = {} if class_labels is None else {"class_labels": class_labels}
    with upcast_if_forced(vae):
        encoded = vae.encode(images.to(vae.dtype), **labels)
    if "latent_dist" in encoded:
        posterior = encoded.latent_dist
        z = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
    else:
        z = encoded.latents
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    scale, shift = scale_and_shift(vae, z)
    return scale * (z - shift)


def latent_channels(vae: ModelMixin) -> int:
    """C_z; a codebook has vectors of a size of their own."""
    return vae.config.get("vq_embed_dim") or vae.config.latent_channels


def scale_and_shift(vae: ModelMixin, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f and b, broadcastable to latents, in the dtype and on the device of `like`."""
    factor, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        return factor / like.new_tensor(std).view(-1, 1, 1), like.new_tensor(mean).view(-1, 1, 1)
    return like.new_tensor(factor), like.new_tensor(shift)


@contextmanager
def upcast_if_forced(vae: ModelMixin) -> Iterator[None]:
    """Weights of float16 in float32 for a while, of an autoencoder that would overflow."""
    tensors = chain(vae.parameters(), vae.buffers())
    halves = [tensor for tensor in tensors if tensor.dtype == torch.float16] if vae.config.get("force_upcast") else []
    for tensor in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor in halves:
            tensor.data = tensor.data.half()
