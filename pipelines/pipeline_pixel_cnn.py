"""Images drawn pixel after pixel, and completions of images of which some pixels are given.

    x_i ~ p(x_i | x_1 .. x_{i-1}, y),        in raster order, x_i a level 0 .. K - 1,        x -> 2 x / (K - 1) - 1

With a temperature T and the k likeliest values only, each is drawn from p^(1/T) of those, up to the constant; T = 1
and no k is the model itself. Given pixels are kept, and every later pixel knows of them. They do not act on pixels
before them: what is drawn is the model's law of the rest if what is given comes first, such as the upper half.

Source: van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759, Fig. 1.
"""

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from annealers.models.pixel_likelihood import levels_to_values, values_to_levels
from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.class_labels import ClassLabels, common_batch_size, integer_names, label_tensor
from annealers.pipelines.image_inputs import Images, check_output_type, image_tensor


class PixelCNNPipeline(AnnealersPipeline):
    """Draws and completes images with a `PixelCNNModel` of pixels.

    Args:
        pixel_cnn: The model; its K codes are taken as levels from black to white.
        id2label: Name of each class id; None if the classes have none.

    Raises:
        ValueError: If a name is of no class of the model.

    Example:
        >>> import torch
        >>> from annealers import PixelCNNModel, PixelCNNPipeline
        >>> model = PixelCNNModel(2, sample_size=8, channels=16, num_layers=3, num_class_embeds=2)
        >>> pipeline = PixelCNNPipeline(model, id2label={0: "cat", 1: "dog"})
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = pipeline(class_labels=["dog", "cat"]).images
        >>> upper_half = torch.arange(8).unsqueeze(1).expand(8, 8) < 4
        >>> completed = pipeline(class_labels="dog", image=images[0], known=upper_half, batch_size=3).images
        >>> len(completed), completed[0].size
        (3, (8, 8))
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "pixel_cnn"
    _exclude_from_cpu_offload = ["pixel_cnn"]  # part by part, which its masked weights do not allow

    def __init__(self, pixel_cnn: ModelMixin, id2label: dict[int, str] | dict[str, str] | None = None) -> None:
        super().__init__(pixel_cnn=pixel_cnn)
        self._register_class_names(integer_names(id2label, pixel_cnn.config.num_class_embeds))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        image: Images | None = None,
        known: torch.Tensor | np.ndarray | PIL.Image.Image | None = None,
        condition: torch.Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws a batch of images, or completes one.

        Args:
            batch_size: Number of images, B. Taken from `class_labels`, `image`, `known`, `condition` or `generator` if
                they have a length, which one image for all has not; 1 if none does.
            class_labels: One label for all images or one per image, each a class id or a name of `id2label`; for a
                model that has classes.
            image: What to complete, one for all or B: PIL images, an array (B, H, W, C) in [0, 1], or a tensor
                (B, C, H, W) in [-1, 1], of the size of the model's images. Each value counts as the nearest of the K.
            known: Which pixels of it are given, True there, (H, W) or (B, 1, H, W), or
                a PIL image of mode "1", white there.
            condition: (B, Y, H, W), for a model with `condition_channels`.
            temperature: T > 0; below 1 likelier values.
            top_k: Draw among the k likeliest values only; None among all. Of a categorical model.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the same as a
                tensor (B, C, H, W) in [-1, 1].
            return_dict: Return an `ImagePipelineOutput` rather than a tuple.

        Raises:
            ValueError: If the arguments disagree on B, a label is missing or unknown, there is one of `image` and
                `known` without the other, one of them does not fit the model, or the output type does not exist for
                this number of channels.
        """
        channels, size = self.pixel_cnn.config.in_channels, self.pixel_cnn.config.sample_size
        check_output_type(output_type, channels)
        height, width = (size, size) if isinstance(size, int) else size
        prompt = None if image is None else image_tensor(image, channels, (height, width))  # (B or 1, C, H, W)
        if known is not None and not isinstance(known, torch.Tensor):
            known = torch.from_numpy(np.array(known))
        batch_size = common_batch_size(
            class_labels,
            batch_size=batch_size,
            image=_length(prompt),
            known=_length(known) if known is not None and known.ndim == 4 else None,
            condition=None if condition is None else len(condition),
            generator=len(generator) if isinstance(generator, list) else None,
        )
        model, device = self.pixel_cnn, self._execution_device
        K = model.config.num_embeddings
        if prompt is not None:
            prompt = values_to_levels(prompt, K).expand(batch_size, -1, -1, -1)
        codes = model.generate(
            batch_size,
            class_labels=label_tensor(class_labels, self.id2label, model.config.num_class_embeds, batch_size, device),
            condition=None if condition is None else condition.to(device),
            generator=generator,
            temperature=temperature,
            top_k=top_k,
            prompt=prompt,
            known=known,
            progress_bar=self.progress_bar,
        )
        images = self.image_processor.postprocess(levels_to_values(codes, K), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _length(values: torch.Tensor | None) -> int | None:
    """Its batch size; one stands for all and has none."""
    return None if values is None or len(values) == 1 else len(values)
