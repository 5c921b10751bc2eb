"""Images of a VQ-VAE whose codes a prior draws, in two stages.

    s ~ p(s | y)                    the prior, an autoregressive model of the (h, w) codes s_i = 0 .. K - 1
    z_q = (e_{s_i})_i               the vectors of the codebook
    x = E[x | z_q]                  the decoder's mean

The codes are drawn one after the other. With a temperature T and the k likeliest codes only, each is drawn from
p(s_i | s_<i, y)^(1/T) of those k, up to the constant; T = 1 and no k is the model itself.

Without a prior the pipeline holds the first stage, which reconstructs images.

Source: van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937, Sec. 3.
"""

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.class_labels import (
    ClassLabels,
    common_batch_size,
    integer_names,
    label_tensor,
    with_integer_ids,
)
from annealers.pipelines.image_inputs import Images, check_output_type, image_tensor


class VQVAEPriorPipeline(AnnealersPipeline):
    """Draws images by drawing the codes of a VQ-VAE, and reconstructs images.

    Args:
        vqvae: The first stage, a `VQVAEModel`.
        prior: The law of its codes, a `CodeTransformerModel` or a `PixelCNNModel` of images of one channel with the
            size of the codes and `num_embeddings` = K. None for the first stage alone.
        id2label: Name of each class id of the prior; None if the classes have none.

    Raises:
        ValueError: If the prior is of another number or size of codes, is no law of codes at all, or has no such
            classes as `id2label` names.

    Example:
        >>> from annealers import CodeTransformerModel, VQVAEModel, VQVAEPriorPipeline
        >>> vqvae = VQVAEModel(in_channels=1, sample_size=8, num_vq_embeddings=16, block_out_channels=(8, 16))
        >>> prior = CodeTransformerModel(num_embeddings=16, sample_size=4, hidden_size=16, num_class_embeds=2)
        >>> pipeline = VQVAEPriorPipeline(vqvae, prior, id2label={0: "cat", 1: "dog"})
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = pipeline(class_labels=["dog", "cat"], temperature=0.9, top_k=8).images
        >>> len(images), images[0].size
        (2, (8, 8))
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "prior->vqvae"
    _optional_components = ["prior"]

    def __init__(
        self,
        vqvae: ModelMixin,
        prior: ModelMixin | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__(vqvae=vqvae, prior=prior)
        if prior is not None:
            id2label = integer_names(id2label, prior.config.num_class_embeds)
        elif id2label is not None:
            id2label = with_integer_ids(id2label)
        self._register_class_names(id2label)

    def __setattr__(self, name: str, value: object) -> None:
        """A prior is checked, whenever it is set."""
        if name == "prior" and value is not None:
            check_prior(self.vqvae, value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws a batch of images.

        Args:
            batch_size: Number of images, B. Taken from `class_labels` or `generator` if they have a length; 1 if none
                does.
            class_labels: One label for all images or one per image, each a class id or a name of `id2label`; for a
                prior that has classes.
            temperature: T > 0; below 1 likelier codes.
            top_k: Draw among the k likeliest codes only; None among all.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the decoder's
                (B, C, H, W) in [-1, 1].
            return_dict: Return an `ImagePipelineOutput` rather than a tuple.

        Raises:
            ValueError: If there is no prior, the arguments disagree on B, a label is missing or unknown, or the output
                type does not exist for this number of channels.
        """
        check_output_type(output_type, self.vqvae.config.in_channels)
        prior = self._prior()
        lengths = {"batch_size": batch_size, "generator": len(generator) if isinstance(generator, list) else None}
        batch_size = common_batch_size(class_labels, **lengths)
        num_classes = prior.config.num_class_embeds
        labels = label_tensor(class_labels, self.id2label, num_classes, batch_size, self._execution_device)
        codes = prior.generate(
            batch_size,
            class_labels=labels,
            generator=generator,
            temperature=temperature,
            top_k=top_k,
            progress_bar=self.progress_bar,
        )  # (B, 1, h, w)
        return self._output(self.vqvae.decode_indices(codes[:, 0]).sample, output_type, return_dict)

    @torch.no_grad()
    def reconstruct(
        self, images: Images, output_type: str = "pil", return_dict: bool = True
    ) -> ImagePipelineOutput | tuple:
        """What the decoder makes of the codes of images: the best that the prior's samples can look like.

        Args:
            images: PIL images, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [-1, 1].
            output_type, return_dict: As of a call.

        Raises:
            ValueError: If the images are not those of the VQ-VAE.
        """
        channels = self.vqvae.config.in_channels
        check_output_type(output_type, channels)
        x = image_tensor(images, channels, bounded=False).to(self._execution_device, self.vqvae.dtype)
        codes = self.vqvae.encode(x).indices  # (B, h, w)
        return self._output(self.vqvae.decode_indices(codes).sample, output_type, return_dict)

    def _prior(self) -> ModelMixin:
        if self.prior is None:
            name = self.config.get("_name_or_path") or "FOLDER"
            raise ValueError(
                "this pipeline has no prior to draw codes from, so that all it can do is reconstruct(images); train "
                f"one with `python training/train_prior.py --vqvae {name}`, or pass prior="
            )
        return self.prior

    def _output(self, sample: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def check_prior(vqvae: ModelMixin, prior: ModelMixin) -> None:
    """Raises ValueError unless the prior is a law of the codes of this VQ-VAE."""
    size = prior.config.sample_size
    ours = {"num_embeddings": vqvae.config.num_vq_embeddings, "size": tuple(vqvae.latent_size), "in_channels": 1}
    theirs = {
        "num_embeddings": prior.config.num_embeddings,
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "in_channels": prior.config.in_channels,
    }
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(f"the codes of the VQ-VAE have {name} {value}, those of the prior {theirs[name]}")
    features = prior.config.get("feature_channels", prior.config.get("condition_channels"))
    if prior.config.get("causal", True) and features is not None:
        raise ValueError(f"the prior is conditioned on {features} channels of features, of which a VQ-VAE makes none")
    if not prior.config.get("causal", True):
        raise ValueError("the prior is a bidirectional transformer (causal=False), which is no law to draw codes from")
    if prior.config.get("output", "categorical") != "categorical":
        raise ValueError(f"codes have no order, so a prior with output={prior.config.output!r} is no law of them")
