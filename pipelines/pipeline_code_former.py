r"""Restoration of bad images, blurred, small, noisy, compressed or all of it, by the codes of good ones.

    x_hat = D(codes of x_l) + what of x_l itself is let in, as much as w says

It is told nothing of the degradation; what was trained on which degradations, see `training/train_codeformer.py`. The
weight w in [0, 1] trades quality for fidelity: 0 makes the image that the codes stand for, 1 stays closest to x_l.

Where the degradation is known and linear, `RestorationPipeline` needs no training for it.

Source: Zhou, Chan, Li, Loy 2022, "Towards Robust Blind Face Restoration with Codebook Lookup Transformer",
arXiv:2206.11253; the formulas are in `annealers.models.code_former`.
"""

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch.nn.functional import interpolate

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.image_inputs import Images, check_output_type, image_tensors


class CodeFormerPipeline(AnnealersPipeline):
    """Restores images.

    Args:
        code_former: A `CodeFormerModel`.

    Example:
        >>> import torch
        >>> import annealers
        >>> vqvae = annealers.VQVAEModel(in_channels=1, sample_size=8, block_out_channels=(8, 16))
        >>> model = annealers.CodeFormerModel(vqvae_config=vqvae.config, hidden_size=16, num_layers=1, num_heads=2)
        >>> pipeline = annealers.CodeFormerPipeline(model)
        >>> images = pipeline(torch.zeros(2, 1, 8, 8), fidelity_weight=0.7).images
        >>> len(images), images[0].size
        (2, (8, 8))
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "code_former"

    def __init__(self, code_former: ModelMixin) -> None:
        super().__init__(code_former=code_former)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        fidelity_weight: float = 0.5,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Restores images, each by itself.

        Args:
            image: x_l: one or several PIL images, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in
                [-1, 1]. Images of another size than the model's are resized; grey or colour follows the model.
            fidelity_weight: w in [0, 1].
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the decoder's
                (B, C, H, W) in [-1, 1].
            return_dict: Return an `ImagePipelineOutput` rather than a tuple.

        Raises:
            ValueError: If there is no image, it has another number of channels or another shape than the model's
                images, values outside of their range, w is outside [0, 1], or the output type does not exist for this
                number of channels.
        """
        channels = self.code_former.in_channels
        check_output_type(output_type, channels)
        if fidelity_weight is None:
            raise ValueError("fidelity_weight must lie in [0, 1], got None: a pipeline decodes what it restores")
        sample = torch.cat([self._fitted(images) for images in image_tensors(image, channels)])  # of any sizes
        sample = sample.to(self._execution_device, self.code_former.dtype)
        restored = self.code_former(sample, fidelity_weight=fidelity_weight).sample
        images = self.image_processor.postprocess(restored, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _fitted(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] resized to the model's size, by a cubic filter."""
        size = self.code_former.image_size
        (height, width), (H, W) = images.shape[2:], size
        if height * W != width * H:
            raise ValueError(
                f"the model restores images of {H} x {W} pixels (height x width), and {height} x {width} have another "
                "shape: crop them first"
            )
        if (height, width) == size:
            return images
        return interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
