r"""What a variational autoencoder knows: images of its prior, and walks through its latent space.

    sample         z ~ N(0, T^2 I), then E[x | z], or x ~ p(x | z)
    reconstruct    z = mu(x), the mean of q(z | x)
    interpolate    z between mu(x_a) and mu(x_b), on the line or on the arc; see `interpolation`
    manifold       z = (Phi^-1(u), Phi^-1(v)) on a grid of u and v, for a latent of two numbers
    traverse       z with one of its numbers varied

Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, App. A (the manifold, Fig. 4: a
grid on the unit square through the inverse distribution function Phi^-1 of the normal law).

    symbol    code           shape           meaning
    x         images         (B, C, H, W)    in [-1, 1]
    z         latents        (B, C_z, h, w)  (B, C_z, 1, 1) if it is flat
    T         temperature    ()
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.class_labels import (
    ClassLabels,
    common_batch_size,
    integer_names,
    is_single,
    label_tensor,
)
from annealers.pipelines.image_inputs import Images, check_output_type, image_tensor
from annealers.pipelines.interpolation import between

DECODED_AT_ONCE = 64  # images of a walk, which may be hundreds

Generators = torch.Generator | list[torch.Generator]


@dataclass
class VAEPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Args:
        images: A list of N PIL images, or an array (N, H, W, C) or tensor (N, C, H, W) in [0, 1], or the decoder's
            tensor in [-1, 1]; row by row of the figure.
        latents: The z that were decoded, (N, C_z, h, w); None of a hierarchical model, which has several each.
        originals: Of reconstructions, what was reconstructed, as `images`.
        columns: Images in a row of the figure.
        column_names, row_names: What the columns and rows are, for those figures where that makes sense.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor | None = None
    originals: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    columns: int = 8
    column_names: tuple[str, ...] = ()
    row_names: tuple[str, ...] = ()

    def figure(self, scale: int = 1, padding: int = 2, labels: bool = False) -> PIL.Image.Image:
        """The images as a picture, row by row; reconstructions stand below what they are of.

        Args:
            scale: Enlargement of each image.
            padding: White pixels between neighbours.
            labels: Write names beside the rows and columns that have any.

        Raises:
            ValueError: If the images are not of output_type="pil".
        """
        # inside, since an export of the pipeline has no annealers
        from annealers.figures import figure_of_pictures

        names = (self.column_names, self.row_names) if labels else ()
        return figure_of_pictures(self.images, self.columns, scale, padding, *names, originals=self.originals)


class VAEPipeline(AnnealersPipeline):
    """Draws and explores images of a variational autoencoder.

    Args:
        vae: A `VAEModel`, or a `HierarchicalVAEModel`, which draws and reconstructs but has no single latent to walk
            through.
        id2label: Name of each class id; None if the classes have none.

    Raises:
        ValueError: If `id2label` names classes that the model does not have.

    Example:
        >>> import torch
        >>> from annealers import VAEModel, VAEPipeline
        >>> vae = VAEModel(
        ...     in_channels=1, sample_size=8, latent_channels=2, block_out_channels=(8, 16), flat_latent=True,
        ...     num_class_embeds=2)
        >>> pipeline = VAEPipeline(vae, id2label={0: "cat", 1: "dog"})
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = pipeline(class_labels=["dog", "cat"], generator=torch.Generator().manual_seed(0)).images
        >>> pipeline.reconstruct(images, class_labels=["dog", "cat"]).images[0].size
        (8, 8)
        >>> pipeline.manifold(5, class_labels="dog").figure(padding=2).size  # of 5 x 5 images
        (48, 48)
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "vae"

    def __init__(self, vae: ModelMixin, id2label: dict[int, str] | dict[str, str] | None = None) -> None:
        super().__init__(vae=vae)
        self._register_class_names(integer_names(id2label, vae.config.num_class_embeds))

    # ---- images of the prior ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        temperature: float = 1.0,
        sample_pixels: bool = False,
        generator: Generators | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VAEPipelineOutput | tuple:
        """Draws a batch of images.

        Args:
            batch_size: Number of images, B. Taken from `class_labels` or `generator` if they have a length; 1 if none
                does.
            class_labels: One label for all images or one per image, each a class id or a name of `id2label`; for a
                model that has classes.
            temperature: T, the factor of the standard deviation of the prior, of each layer if there are several;
                below 1 likelier images, at 0 one image.
            sample_pixels: Draw x ~ p(x | z), with the noise that the model believes images to have, instead of the
                mean E[x | z].
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the decoder's
                (B, C, H, W) in [-1, 1].
            return_dict: Return a `VAEPipelineOutput` rather than a tuple.

        Raises:
            ValueError: If the arguments disagree on B, a label is missing or unknown, the temperature is negative, or
                the output type does not exist for this number of channels.
        """
        check_output_type(output_type, self.vae.config.in_channels)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        lengths = {"batch_size": batch_size, "generator": len(generator) if isinstance(generator, list) else None}
        batch_size = common_batch_size(class_labels, **lengths)
        labels = self._label_tensor(class_labels, batch_size)

        # The generator is on either device; noise is drawn in at least float32 for a half-precision model, too.
        dtype, device = torch.promote_types(self.vae.dtype, torch.float32), self._execution_device
        noise = randn_tensor((batch_size, *self.vae.noise_shape), generator=generator, device=device, dtype=dtype)
        latents = (temperature * noise).to(self.vae.dtype)
        if self._has_one_latent and not sample_pixels:
            return self._output(self.vae.decode(latents, labels).sample, output_type, return_dict, latents=latents)
        if self._has_one_latent:
            parameters = self.vae.decoder_parameters(latents, labels)
        else:
            parameters, _ = self.vae.go_down(latents, class_labels=labels)
        likelihood = self.vae.likelihood
        images = likelihood.draw(parameters, generator) if sample_pixels else likelihood.mean(parameters)
        return self._output(images, output_type, return_dict, latents=latents if self._has_one_latent else None)

    # ---- images of images -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(
        self,
        images: Images,
        class_labels: ClassLabels | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VAEPipelineOutput | tuple:
        """E[x | z] at the mean of the posterior of each image, or of each layer's posterior if there are several.

        Args:
            images: PIL images, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [-1, 1].
            class_labels: Of a model that has classes: one label for all images, or that of each.
            output_type, return_dict: As of a call.

        Raises:
            ValueError: If the images are not those of the model, or a label is missing or unknown.
        """
        check_output_type(output_type, self.vae.config.in_channels)
        x = self._image_tensor(images)
        labels = self._label_tensor(class_labels, common_batch_size(class_labels, images=len(x)))
        if self._has_one_latent:
            latents = self._encoded(x, labels)
            reconstructed = self._decoded(latents, labels)
        else:
            latents = None
            posterior, features = self.vae.go_up(x, labels)
            no_noise = torch.zeros(len(x), *self.vae.noise_shape, device=x.device, dtype=x.dtype)
            parameters, _ = self.vae.go_down(no_noise, posterior, features, labels)
            reconstructed = self.vae.likelihood.mean(parameters)
        originals = self.image_processor.postprocess(x, output_type=output_type)
        return self._output(reconstructed, output_type, return_dict, latents=latents, originals=originals)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: Images,
        image_b: Images,
        steps: int = 9,
        method: str = "linear",
        class_labels: ClassLabels | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VAEPipelineOutput | tuple:
        """Images of the latents between those of two images; the first and the last are their reconstructions.

        Args:
            image_a, image_b: One image each or as many, of which each pair makes a row of `steps` images; as for
                `reconstruct`.
            steps: Images of a row, the ends among them.
            method: "linear", on the line between the latents, or "spherical", on the arc.
            class_labels: Of a model that has classes: one label for all, or that of each pair.
            output_type, return_dict: As of a call.

        Raises:
            ValueError: If there is no single latent, the numbers of images differ, there are fewer than two steps, the
                method is unknown, or latents are opposite, so that no arc is the shortest; or see `reconstruct`.
        """
        self._check_one_latent("interpolate")
        check_output_type(output_type, self.vae.config.in_channels)
        a, b = self._image_tensor(image_a), self._image_tensor(image_b)
        if a.shape != b.shape:
            raise ValueError(f"need as many images of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
        labels = self._label_tensor(class_labels, common_batch_size(class_labels, pairs=len(a)))

        latents, weights = between(self._encoded(a, labels), self._encoded(b, labels), steps, method)
        latents = latents.to(self.vae.dtype).flatten(0, 1)  # (B steps, C_z, h, w)
        labels = None if labels is None else labels.repeat_interleave(steps)
        names = tuple(f"{w:.2g}" for w in weights.tolist())
        return self._walk(latents, labels, output_type, return_dict, columns=steps, column_names=names)

    # ---- images of latents ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def manifold(
        self,
        n: int = 20,
        class_labels: ClassLabels | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VAEPipelineOutput | tuple:
        """Images of the whole prior of two dimensions: n x n of equal probability.

        The first number of the latent grows from left to right and the second upwards, both through the quantiles
        (i + 1/2) / n of the normal law.

        Args:
            n: Images of each row and column.
            class_labels: Of a model that has classes: the label whose manifold it is.
            output_type, return_dict: As of a call.

        Raises:
            ValueError: If the latent is not of two numbers, n is not positive, or a label is missing, unknown or not
                one.
        """
        self._check_one_latent("manifold")
        check_output_type(output_type, self.vae.config.in_channels)
        shape = self.vae.latent_shape
        if math.prod(shape) != 2:
            raise ValueError(
                f"a manifold is drawn of a latent of two numbers, this one has {math.prod(shape)}, {shape}: train one "
                "with latent_channels=2 and flat_latent=True, or traverse() one dimension after the other"
            )
        if n < 1:
            raise ValueError(f"need n >= 1, got {n}")
        labels = self._one_label(class_labels, n * n)
        device = self._execution_device
        quantiles = torch.special.ndtri((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n)
        second, first = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")  # rows from above, columns
        latents = torch.stack([first, second], dim=-1).reshape(n * n, *shape).to(self.vae.dtype)
        names = [f"{q:.2f}" for q in quantiles.tolist()]
        return self._walk(
            latents,
            labels,
            output_type,
            return_dict,
            columns=n,
            column_names=tuple(names),
            row_names=tuple(reversed(names)),
        )

    @torch.no_grad()
    def traverse(
        self,
        dim: int | Sequence[int],
        image: Images | None = None,
        latents: torch.Tensor | None = None,
        span: float = 3.0,
        steps: int = 9,
        class_labels: ClassLabels | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VAEPipelineOutput | tuple:
        """Images of one latent with one of its numbers varied from -span to span; all others stay.

        Args:
            dim: Which number, of a latent map counted through its channels, rows and columns; of several, each makes a
                row of images.
            image: Where to begin: at the mean of the posterior of this image.
            latents: Or at this latent, (C_z, h, w) or (1, C_z, h, w). Without either it is 0, the mean of the prior.
            span: Largest value, in standard deviations of the prior.
            steps: Images of a row.
            class_labels: Of a model that has classes: the label.
            output_type, return_dict: As of a call.

        Raises:
            ValueError: If there is no single latent, a dimension does not exist, image and latents are both given or
                are several, span or steps are not positive, or a label is missing, unknown or not one.
        """
        self._check_one_latent("traverse")
        check_output_type(output_type, self.vae.config.in_channels)
        dims, size = list(dim) if isinstance(dim, Sequence) else [dim], math.prod(self.vae.latent_shape)
        if not dims or not all(0 <= d < size for d in dims):
            raise ValueError(f"dim must be among 0 .. {size - 1}, the numbers of the latent, got {dim}")
        if not 0 < span < math.inf or steps < 1:
            raise ValueError(f"need a finite span > 0 and steps >= 1, got {span} and {steps}")
        start = self._start(image, latents, class_labels)  # (1, C_z, h, w)

        values = torch.linspace(-span, span, steps, device=start.device, dtype=start.dtype)
        z = start.flatten(1).repeat(len(dims) * steps, 1)  # (rows steps, C_z h w)
        rows = torch.arange(len(z), device=start.device)
        varied = torch.tensor(dims, device=start.device).repeat_interleave(steps)
        z[rows, varied] = values.repeat(len(dims))
        return self._walk(
            z.unflatten(1, self.vae.latent_shape),
            self._one_label(class_labels, len(z)),
            output_type,
            return_dict,
            columns=steps,
            column_names=tuple(f"{value:.2g}" for value in values.tolist()),
            row_names=tuple(f"z_{d}" for d in dims),
        )

    def _start(
        self, image: Images | None, latents: torch.Tensor | None, class_labels: ClassLabels | None
    ) -> torch.Tensor:
        """The latent that is varied, (1, C_z, h, w)."""
        shape, device = self.vae.latent_shape, self._execution_device
        if image is not None and latents is not None:
            raise ValueError("give an image or latents to begin at, not both")
        if image is not None:
            x = self._image_tensor(image)
            if len(x) != 1:
                raise ValueError(f"one image is varied at a time, got {len(x)}")
            return self._encoded(x, self._one_label(class_labels, 1))
        if latents is None:
            return torch.zeros(1, *shape, device=device, dtype=self.vae.dtype)
        if tuple(latents.shape) not in (shape, (1, *shape)):
            raise ValueError(f"need one latent of shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, self.vae.dtype).reshape(1, *shape)

    # ---- between images, latents and labels -------------------------------------------------------------------------

    @property
    def _has_one_latent(self) -> bool:
        """Not by its class, of which an exported model and an exported pipeline have a copy each."""
        return hasattr(self.vae, "latent_shape")

    def _check_one_latent(self, method: str) -> None:
        if not self._has_one_latent:
            raise ValueError(
                f"{method} needs a model with a single latent, such as VAEModel; a {type(self.vae).__name__} has one "
                "in each of its layers"
            )

    def _label_tensor(self, class_labels: ClassLabels | None, batch_size: int) -> torch.Tensor | None:
        num_classes = self.vae.config.num_class_embeds
        return label_tensor(class_labels, self.id2label, num_classes, batch_size, self._execution_device)

    def _one_label(self, class_labels: ClassLabels | None, batch_size: int) -> torch.Tensor | None:
        """One label for a whole figure, (batch_size,)."""
        if not is_single(class_labels) and len(class_labels) != 1:  # pyright: ignore[reportArgumentType]
            raise ValueError(f"a figure is of one class, got {len(class_labels)} class labels")  # pyright: ignore
        return self._label_tensor(class_labels, batch_size)

    def _image_tensor(self, images: Images) -> torch.Tensor:
        """Images as the encoder takes them, (B, C, H, W) in [-1, 1]."""
        x = image_tensor(images, self.vae.config.in_channels, bounded=False)
        return x.to(self._execution_device, self.vae.dtype)

    def _encoded(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return self.vae.encode(x, labels).latent_dist.mode()

    def _decoded(self, latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """E[x | z], (B, C, H, W), a few at a time."""
        chunks = latents.split(DECODED_AT_ONCE)
        labels_of = [None] * len(chunks) if labels is None else labels.split(DECODED_AT_ONCE)
        with self.progress_bar(total=len(chunks)) as progress_bar:
            images = []
            for z, y in zip(chunks, labels_of, strict=True):
                images.append(self.vae.decode(z, y).sample)
                progress_bar.update()
        return torch.cat(images)

    def _walk(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        columns: int,
        column_names: tuple[str, ...],
        row_names: tuple[str, ...] = (),
    ) -> VAEPipelineOutput | tuple:
        images, layout = self._decoded(latents, labels), {"column_names": column_names, "row_names": row_names}
        return self._output(images, output_type, return_dict, latents=latents, columns=columns, **layout)

    def _output(
        self, images: torch.Tensor, output_type: str, return_dict: bool, **more: object
    ) -> VAEPipelineOutput | tuple:
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return VAEPipelineOutput(images=images, **more) if return_dict else (images,)
