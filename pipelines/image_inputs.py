"""Images as the pipelines take them, and the check of the form in which they are to be given back."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

# One image, or several of one size: pictures, arrays (B, H, W, C) in [0, 1], tensors (B, C, H, W) in [-1, 1].
Images = PIL.Image.Image | np.ndarray | torch.Tensor | Sequence[PIL.Image.Image | np.ndarray | torch.Tensor]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PIL_CHANNELS = (1, 3)


def check_output_type(output_type: str, channels: int, whose: str = "model") -> None:
    """Raises ValueError unless there is such an output type, and for images of so many channels.

    Args:
        output_type: As given.
        channels: C.
        whose: What has these channels, for the message of the error.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
    if output_type == "pil" and channels not in PIL_CHANNELS:
        raise ValueError(f"a PIL image has 1 or 3 channels, this {whose} has {channels}: use output_type='pt'")


def image_tensor(
    images: Images, channels: int, size: tuple[int, int] | None = None, bounded: bool = True
) -> torch.Tensor:
    """Images as a model takes them, (B, C, H, W) in [-1, 1], in the type and on the device they have as a tensor.

    Args:
        images: One PIL image, an array (B, H, W, C) or (H, W, C) in [0, 1], a tensor (B, C, H, W) or (C, H, W) in
            [-1, 1], or a sequence of any of them. Pictures become grey or coloured as the model's are.
        channels: C.
        size: (H, W) that they must have; None for any, but one for all.
        bounded: Whether tensors must lie in [-1, 1]; if not, they must be finite.

    Raises:
        ValueError: If there are no images, or a shape or a value does not fit.
    """
    tensors = image_tensors(images, channels, bounded)
    sizes = {tuple(tensor.shape[2:]) for tensor in tensors}
    if size is not None and sizes != {size}:
        got = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ValueError(f"the model's images are {size[0]} x {size[1]} pixels (height x width), got {got}")
    if len(sizes) > 1:
        raise ValueError(f"images of a batch must be of one size, got (height, width) {sorted(sizes)}")
    return torch.cat(tensors)


def image_tensors(images: Images, channels: int, bounded: bool = True) -> list[torch.Tensor]:
    """As `image_tensor`, of any sizes: a tensor (B, C, H, W) for each member of a sequence, else one tensor."""
    if isinstance(images, (PIL.Image.Image, np.ndarray, torch.Tensor)):
        images = [images]
    tensors = [_tensor_of(one, channels, bounded) for one in images]
    if sum(len(tensor) for tensor in tensors) == 0:
        raise ValueError("need at least one image, got none")
    return tensors


def _tensor_of(image: PIL.Image.Image | np.ndarray | torch.Tensor, channels: int, bounded: bool) -> torch.Tensor:
    if isinstance(image, PIL.Image.Image):
        to_tensor = VaeImageProcessor(
            do_resize=False, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1
        )
        tensor = to_tensor.preprocess(image)
    elif isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or not np.issubdtype(image.dtype, np.floating):
            raise ValueError(
                "an array must be (B, H, W, C) of floating-point numbers in [0, 1], got "
                f"{image.shape} of {image.dtype}"
            )
        if not ((image >= 0) & (image <= 1)).all():  # NaN too
            raise ValueError(f"an array must lie in [0, 1], got {image.min():.4g} .. {image.max():.4g}")
        tensor = 2 * torch.from_numpy(image).movedim(-1, -3) - 1
    elif isinstance(image, torch.Tensor):
        if not image.is_floating_point():
            raise ValueError(f"a tensor must be of floating-point numbers in [-1, 1], got {image.dtype}")
        tensor = image
    else:
        raise ValueError(f"an image is a PIL image, an array or a tensor, got a {type(image).__name__}")
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise ValueError(
            f"the model's images have {channels} channels: need (B, {channels}, H, W), got {tuple(tensor.shape)}"
        )
    if not tensor.isfinite().all():
        raise ValueError("an image holds values that are not finite")
    if bounded and tensor.numel() > 0 and tensor.abs().max() > 1:
        raise ValueError(f"a tensor must lie in [-1, 1], got {tensor.min():.4g} .. {tensor.max():.4g}")
    return tensor
