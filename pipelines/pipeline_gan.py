r"""Images of a generative adversarial network, and walks and sums in the space of its latents.

    sample         x = G(z, y or t), z ~ N(0, I)
    truncation     each number of z from the normal law between -psi and psi instead: erf(z / sqrt 2) is then
                   erf(z' / sqrt 2) erf(psi / sqrt 2) for z' ~ N(0, 1)
    interpolate    z on the arc or on the line between two latents, t on the line between two texts
    arithmetic     z = sum of the means of some concepts - sum of those of others, a concept being latents whose images
                   have something in common

The truncated law is that of the numbers which resampling until all are small enough gives; it is computed from the
noise z' of an image that is not truncated, so that one seed is one image, more or less typical with psi.

Sources: Goodfellow et al. 2014, "Generative Adversarial Networks", arXiv:1406.2661; Brock, Donahue & Simonyan 2019,
"Large Scale GAN Training for High Fidelity Natural Image Synthesis", arXiv:1809.11096, Sec. 3.1 (truncation); White
2016, "Sampling Generative Networks", arXiv:1609.04468, Sec. 2.1 (the arc, see `interpolation`); Reed et al. 2016,
"Generative Adversarial Text to Image Synthesis", arXiv:1605.05396, Eq. 5 (between two texts); Radford, Metz & Chintala
2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks",
arXiv:1511.06434, Sec. 6.3.2 (arithmetic).

    symbol    code             shape           meaning
    z         latents          (B, Z)
    y         class_labels     (B,)
    t         prompt_embeds    (B, D)          embeddings of texts
    x         images           (B, C, H, W)    in [-1, 1]
    psi       truncation       ()              largest number of z
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.class_labels import (
    ClassLabels,
    common_batch_size,
    integer_names,
    is_single,
    label_tensor,
)
from annealers.pipelines.image_inputs import check_output_type
from annealers.pipelines.interpolation import between, on_the_line
from annealers.pipelines.text_embeddings import pooled_text

GENERATED_AT_ONCE = 64  # images; there may be hundreds

# Numbers (Z,) or (n, Z), or the seed of one, or several of either.
Latents = torch.Tensor | int | Sequence[torch.Tensor | int]


@dataclass
class GANPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Args:
        images: A list of N PIL images, or an array (N, H, W, C) or tensor (N, C, H, W) in [0, 1], or the generator's
            tensor in [-1, 1]; row by row of the figure.
        latents: The z that they are made of, (N, Z), which makes them again as `latents=`.
        columns: Images in a row of the figure.
        column_names: What the columns are, for those figures where that makes sense.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor
    columns: int = 8
    column_names: tuple[str, ...] = ()

    def figure(self, scale: int = 1, padding: int = 2, labels: bool = False) -> PIL.Image.Image:
        """The images as a picture, row by row.

        Args:
            scale: Enlargement of each image.
            padding: White pixels between neighbours.
            labels: Write names above the columns that have any.

        Raises:
            ValueError: If the images are not of output_type="pil".
        """
        # inside, since an export of the pipeline has no annealers
        from annealers.figures import figure_of_pictures

        names = self.column_names if labels else ()
        return figure_of_pictures(self.images, self.columns, scale, padding, names)


class GANPipeline(AnnealersPipeline):
    """Draws images with the generator of a GAN, and explores its latents.

    Args:
        generator: A `GANGenerator`, with or without classes, with or without texts.
        text_encoder: What makes embeddings of prompts, such as `CLIPTextModel` or `CLIPTextModelWithProjection` of
            transformers or `OpenCLIPTextModel`; see `text_embeddings`.
        tokenizer: Its tokenizer.
        id2label: Name of each class id; None if the classes have none.

    Raises:
        ValueError: If `id2label` names classes that the generator does not have.

    Example:
        >>> import torch
        >>> from annealers import GANGenerator, GANPipeline
        >>> network = GANGenerator(
        ...     sample_size=8, out_channels=1, latent_dim=16, block_out_channels=(8, 8), num_class_embeds=2)
        >>> pipeline = GANPipeline(network, id2label={0: "cat", 1: "dog"})
        >>> drawn = pipeline(class_labels=["dog", "cat"], truncation=0.8, generator=torch.Generator().manual_seed(0))
        >>> len(drawn.images), drawn.images[0].size, drawn.latents.shape
        (2, (8, 8), torch.Size([2, 16]))
        >>> walk = pipeline.interpolate(*drawn.latents, steps=5, class_labels="dog")
        >>> walk.figure(padding=2).size  # five images and what is between them
        (48, 8)
        >>> seeds = {"positive": [[0, 1, 2], [3, 4, 5]], "negative": [[6, 7, 8]]}
        >>> pipeline.arithmetic(**seeds, class_labels="cat").images[0].size
        (8, 8)
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "text_encoder->generator"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        generator: ModelMixin,
        text_encoder: PreTrainedModel | ModelMixin | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__(generator=generator, text_encoder=text_encoder, tokenizer=tokenizer)
        self._register_class_names(integer_names(id2label, generator.config.num_class_embeds))

    # ---- images of noise --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        latents: Latents | None = None,
        truncation: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> GANPipelineOutput | tuple:
        """Draws a batch of images.

        Args:
            batch_size: Number of images, B. Taken from `class_labels`, `prompt`, `prompt_embeds`, `latents` or
                `generator` if they have a length, which one of them for all has not; 1 if none does.
            class_labels: One label for all images or one per image, each a class id or a name of `id2label`; for a
                generator that has classes.
            prompt: One text for all images or one per image; for a generator that has texts.
            prompt_embeds: Or their embeddings, (B, D) or (1, D).
            latents: z, (B, Z), or one for all, (1, Z) or (Z,), or several of them, or seeds: an integer stands for
                what a generator with that seed would draw. None draws it.
            truncation: psi > 0, between whose negative and itself all numbers of z are: the smaller, the more typical
                and the less diverse are the images. None is no limit.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the generator's
                (B, C, H, W) in [-1, 1].
            return_dict: Return a `GANPipelineOutput` rather than a tuple.

        Raises:
            ValueError: If the arguments disagree on B, a label is missing or unknown, a text is missing or the
                generator has none, `latents` are given together with what only matters where they are drawn, a shape
                does not fit, or the output type does not exist for this number of channels.
        """
        check_output_type(output_type, self.generator.config.out_channels)
        if truncation is not None and not 0 < truncation < math.inf:
            raise ValueError(f"truncation must be finite and positive, or None for no limit, got {truncation}")
        if latents is not None and (truncation is not None or generator is not None):
            raise ValueError("latents are taken as they are: truncation and generator are for latents to be drawn")
        z = None if latents is None else self._latent_tensor(latents)
        batch_size = common_batch_size(
            class_labels,
            batch_size=batch_size,
            prompt=None if prompt is None or isinstance(prompt, str) else len(prompt),
            prompt_embeds=_length(prompt_embeds),
            latents=_length(z),
            generator=len(generator) if isinstance(generator, list) else None,
        )
        labels = self._label_tensor(class_labels, batch_size)
        text = self._text_tensor(prompt, prompt_embeds, batch_size)
        if z is None:
            z = self._noise(batch_size, generator)
            z = z if truncation is None else truncated(z, truncation)
        return self._output(z.expand(batch_size, -1), labels, text, output_type, return_dict)

    # ---- images of latents ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def interpolate(
        self,
        first: Latents,
        second: Latents,
        steps: int = 9,
        method: str = "spherical",
        class_labels: ClassLabels | None = None,
        prompt: str | Sequence[str] | None = None,
        second_prompt: str | Sequence[str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> GANPipelineOutput | tuple:
        """Images of the latents between two, which are the first and the last.

        Args:
            first, second: One latent each, or as many of each, of which each pair makes a row of `steps` images;
                numbers or seeds, as for a call. They may be equal, to go from one text to another.
            steps: Images of a row, the ends among them.
            method: "spherical", on the arc between the latents, or "linear", on the line.
            class_labels: Of a generator that has classes: one label for all, or that of each row.
            prompt: Of a generator that has texts: one text for all, or that of each row.
            second_prompt: The text of the last image of a row if it is not `prompt`; the embeddings between are on
                the line.
            output_type, return_dict: As of a call.

        Raises:
            ValueError: If the numbers of latents differ, there are fewer than two steps, the method is unknown,
                latents are opposite, so that no arc is the shortest, or there is no one label for each row; or see a
                call.
        """
        check_output_type(output_type, self.generator.config.out_channels)
        a, b = self._latent_tensor(first), self._latent_tensor(second)
        if a.shape != b.shape:
            raise ValueError(f"need as many first as second latents, got {len(a)} and {len(b)}")
        rows = len(a)
        if not is_single(class_labels) and len(class_labels) != rows:  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"need one class label for each of {rows} rows, got {class_labels}: a class is an index, and there is "
                "nothing between two of them"
            )
        latents, weights = between(a, b, steps, method)  # (rows, steps, Z)
        labels, text = self._label_tensor(class_labels, rows), self._text_tensor(prompt, None, rows)
        labels = None if labels is None else labels.repeat_interleave(steps)
        last_text = text if second_prompt is None else self._text_tensor(second_prompt, None, rows)
        if text is not None and last_text is not None:  # the generator has texts
            text = on_the_line(text.float(), last_text.float(), weights).to(text.dtype).flatten(0, 1)
        names = tuple(f"{w:.2g}" for w in weights.tolist())
        return self._output(latents.flatten(0, 1), labels, text, output_type, return_dict, steps, names)

    @torch.no_grad()
    def arithmetic(
        self,
        positive: Sequence[Latents],
        negative: Sequence[Latents] = (),
        rescale: bool = False,
        class_labels: ClassLabels | None = None,
        prompt: str | Sequence[str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> GANPipelineOutput | tuple:
        """The image of the sum of the means of the positive concepts less that of the negative ones.

        The mean over n draws has variance 1 / n in each number, so three concepts of three draws, as in the source,
        add up to a latent as long as a draw. With more draws it is shorter, and the image more typical.

        Args:
            positive, negative: Lists of concepts. Each is a tensor (n, Z), or a list of latents or seeds, of which the
                mean is taken; one latent, or one seed, is a concept by itself.
            rescale: Bring the sum to the length sqrt(Z) that draws have. By default it stays as it is.
            class_labels: Of a generator that has classes: the label of the image.
            prompt: Of a generator that has texts: the text of the image.
            output_type, return_dict: As of a call.

        Returns:
            One image, and its latent, (1, Z).

        Raises:
            ValueError: If there is no positive concept, concepts are not in a list, or the sum that is to be rescaled
                is zero; or see a call.
        """
        check_output_type(output_type, self.generator.config.out_channels)
        for name, concepts in (("positive", positive), ("negative", negative)):
            if isinstance(concepts, (torch.Tensor, Integral)):
                raise ValueError(f"{name} must be a list of concepts, {name}=[concept], got {type(concepts).__name__}")
        if not positive:
            raise ValueError("need at least one positive concept, got none")
        z = sum(self._latent_tensor(concept).mean(dim=0, keepdim=True) for concept in positive)
        z = z - sum(self._latent_tensor(concept).mean(dim=0, keepdim=True) for concept in negative)  # (1, Z)
        if rescale:
            if z.norm() == 0:
                raise ValueError("the positive and negative concepts cancel: a sum of zero has no direction to keep")
            z = z * math.sqrt(z.shape[1]) / z.norm()
        labels = self._label_tensor(class_labels, common_batch_size(class_labels, image=1))
        text = self._text_tensor(prompt, None, 1)
        return self._output(z, labels, text, output_type, return_dict)

    # ---- between arguments and tensors ------------------------------------------------------------------------------

    @property
    def _noise_dtype(self) -> torch.dtype:
        """At least float32 for a half-precision generator, too."""
        return torch.promote_types(self.generator.dtype, torch.float32)

    def _noise(self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Draws of the prior, (B, Z)."""
        shape = (batch_size, self.generator.config.latent_dim)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._noise_dtype)

    def _latent_tensor(self, latents: Latents) -> torch.Tensor:
        """Latents as they are given, (n, Z)."""
        if isinstance(latents, (torch.Tensor, Integral)):
            latents = [latents]
        rows = [self._rows(one) for one in latents]
        if sum(len(z) for z in rows) == 0:
            raise ValueError("need at least one latent, got none")
        return torch.cat(rows)

    def _rows(self, latents: torch.Tensor | int) -> torch.Tensor:
        if isinstance(latents, Integral):
            return self._noise(1, torch.Generator().manual_seed(int(latents)))
        dim = self.generator.config.latent_dim
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents are tensors or seeds, which are integers, got a {type(latents).__name__}")
        if latents.ndim not in (1, 2) or latents.shape[-1] != dim or not latents.is_floating_point():
            raise ValueError(
                f"latents must be (n, {dim}) or ({dim},) floating-point numbers, got {tuple(latents.shape)} of "
                f"{latents.dtype}"
            )
        if not latents.isfinite().all():
            raise ValueError("latents hold values that are not finite")
        return latents.to(self._execution_device, self._noise_dtype).reshape(-1, dim)

    def _label_tensor(self, class_labels: ClassLabels | None, batch_size: int) -> torch.Tensor | None:
        num_classes = self.generator.config.num_class_embeds
        return label_tensor(class_labels, self.id2label, num_classes, batch_size, self._execution_device)

    def _text_tensor(
        self, prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """Embeddings (B, D) of one text for all or one each; None of a generator without texts if there is none."""
        width, device = self.generator.config.text_embed_dim, self._execution_device
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("give a prompt or prompt_embeds, not both")
        if width is None:
            if prompt is not None or prompt_embeds is not None:
                raise ValueError("the generator has no texts (text_embed_dim=None), but got a prompt")
            return None
        if prompt is not None:
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError("a prompt needs a text_encoder and a tokenizer; without, give prompt_embeds")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if len(prompts) not in (1, batch_size):
                raise ValueError(f"need one prompt, or one for each of {batch_size}, got {len(prompts)}")
            prompt_embeds = pooled_text(self.tokenizer, self.text_encoder, prompts, device)
        if prompt_embeds is None:
            raise ValueError("the generator makes images of texts: say which, prompt=")
        if prompt_embeds.shape[1:] != (width,) or len(prompt_embeds) not in (1, batch_size):
            shape = tuple(prompt_embeds.shape)
            raise ValueError(f"the generator takes embeddings ({batch_size}, {width}) of texts, got {shape}")
        return prompt_embeds.to(device, self.generator.dtype).expand(batch_size, -1)

    def _output(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        text: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        columns: int = 8,
        column_names: tuple[str, ...] = (),
    ) -> GANPipelineOutput | tuple:
        """The images of latents (B, Z), a few at a time."""
        parts = torch.arange(len(latents), device=latents.device).split(GENERATED_AT_ONCE)
        with evaluating(self.generator):
            images = [
                self.generator(
                    latents[part].to(self.generator.dtype),
                    class_labels=None if labels is None else labels[part],
                    encoder_hidden_states=None if text is None else text[part],
                    return_dict=False,
                )[0]
                for part in (self.progress_bar(parts) if len(parts) > 1 else parts)
            ]
        pictures = self.image_processor.postprocess(torch.cat(images), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return pictures, latents
        return GANPipelineOutput(pictures, latents, columns, column_names)  # pyright: ignore[reportArgumentType]


def truncated(noise: torch.Tensor, threshold: float) -> torch.Tensor:
    """Numbers of the normal law between -threshold and threshold, each that of the same quantile as the noise.

    Args:
        noise: Of the whole normal law, of any shape.
        threshold: psi > 0.
    """
    # in double precision, which some accelerators lack
    share = torch.erf(noise.to("cpu", torch.float64) / math.sqrt(2)) * math.erf(threshold / math.sqrt(2))
    return (math.sqrt(2) * torch.erfinv(share)).clamp(-threshold, threshold).to(noise)


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """A batch norm uses its statistics for a while, instead of changing them with every batch that is drawn."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _length(values: torch.Tensor | None) -> int | None:
    """Its batch size; one stands for all and has none."""
    return None if values is None or len(values) == 1 else len(values)
