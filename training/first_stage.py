"""The frozen autoencoder of a latent diffusion model in training: images to the scaled latents that are trained on.

Its weights are not trained, not averaged and not part of a checkpoint; they are saved with the pipeline.
"""

import torch
from diffusers import ModelMixin

from annealers.data import ImageData
from annealers.pipelines import AnnealersPipeline
from annealers.pipelines.latent_space import latents_of_images

COMPONENTS = ("vae", "vqvae")  # by these names pipelines have an autoencoder


class FirstStage:
    """An autoencoder, of a saved pipeline.

    Args:
        name: Folder or Hub id of a pipeline with a `vae` or `vqvae`.
        data: The images that it will see.
        class_conditional: Whether training has labels.

    Attributes:
        vae: The autoencoder.
        takes_labels: Whether it has classes.
        latent_shape: (C_z, h, w), of the latents of these images.

    Raises:
        ValueError: If the pipeline has no autoencoder, or it is not of such images or of these classes.
    """

    def __init__(self, name: str, data: ImageData, class_conditional: bool) -> None:
        pipeline = AnnealersPipeline.from_pretrained(name)
        autoencoders = [key for key in COMPONENTS if pipeline.components.get(key) is not None]
        if not autoencoders:
            found = ", ".join(sorted(pipeline.components))
            raise ValueError(
                f"--vae needs a pipeline with an autoencoder, {' or '.join(COMPONENTS)}; {name} has {found}"
            )
        self.vae: ModelMixin = pipeline.components[autoencoders[0]].eval()
        self.takes_labels = self.vae.config.get("num_class_embeds") is not None

        channels = self.vae.config.in_channels
        if channels != data.channels:
            raise ValueError(
                f"the autoencoder is of images of {channels} channels, those of {data.name} {data.channels}"
            )
        if self.takes_labels:
            self._check_classes(data, class_conditional, pipeline.config.get("id2label"))
        labels = torch.zeros(1, dtype=torch.long)
        image = torch.zeros(1, channels, data.resolution, data.resolution)
        _, C, height, width = self.latents(image, labels, noise=None).shape
        self.latent_shape = (C, height, width)

    def latents(self, images: torch.Tensor, labels: torch.Tensor | None, noise: torch.Tensor | None) -> torch.Tensor:
        """Scaled latents (B, C_z, h, w) of images in [-1, 1], without a gradient and in the dtype of the images.

        Args:
            images: (B, C, H, W).
            labels: Class ids (B,), heeded if the autoencoder has classes.
            noise: Standard normal, (B, C_z, h, w), to draw from its posterior if it has one; None takes the mean.
        """
        vae = self.vae.to(images.device)  # nothing happens from the second time on
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = latents_of_images(vae, images.float(), labels if self.takes_labels else None, noise)
        return latents.to(images.dtype)

    def _check_classes(self, data: ImageData, class_conditional: bool, id2label: dict | None) -> None:
        ours = data.id2label if class_conditional else None
        theirs = self.vae.config.num_class_embeds
        named = None if id2label is None else {int(label): name for label, name in id2label.items()}
        if ours is None or len(ours) != theirs or (named is not None and named != ours):
            raise ValueError(f"the autoencoder has the classes {named or theirs}, training has {ours}")
