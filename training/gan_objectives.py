r"""The losses of the two players of a generative adversarial network, of each image, for `annealers.game`.

    discriminator   L_D(D(x, y), D(G(z, y), y)) + lambda (|grad D(x_a, y)| - 1)^2 + gamma / 2 |grad D(x, y)|^2
    generator       L_G(D(G(z, y), y))

with x_a = a x + (1 - a) G(z, y), a uniform on [0, 1) for each image. L_D and L_G are those of `annealers.gan_losses`.
The condition y, a class or an embedded text, is the same for an image and for what is drawn in its place. Of texts the
discriminator can be asked besides whether they fit: it then sees x with the text of another image too (GAN-CLS).

Sources: Goodfellow et al. 2014, arXiv:1406.2661; penalties, Gulrajani et al. 2017, arXiv:1704.00028, and Mescheder,
Geiger & Nowozin 2018, arXiv:1801.04406; GAN-CLS, Reed et al. 2016, arXiv:1605.05396, Alg. 1.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # what those of any dimension, and of all processes, have in common

from annealers import GANDiscriminator, GANGenerator
from annealers.adversarial import frozen
from annealers.gan_losses import (
    GANLoss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    matching_discriminator_loss,
    r1_penalty,
)
from annealers.losses import mean_flat
from annealers.run import Terms

LOGISTIC = ("minimax", "non_saturating")  # whose D(x) = sigmoid(logit) is a probability


def check_no_penalty(gradient_penalty: float, r1: float) -> None:
    """Raises ValueError if a discriminator with batch normalisation is to have a penalty on its gradient."""
    for name, weight in (("gradient_penalty", gradient_penalty), ("r1", r1)):
        if weight > 0:
            raise ValueError(
                f"{name}={weight} is of the gradient for each image by itself, which there is none of with batch "
                "normalisation, where the output for an image depends on the others (arXiv:1704.00028, Sec. 4): "
                "choose group, spectral or none as the discriminator's norm"
            )


class DiscriminatorObjective(nn.Module):
    """What the discriminator minimises.

    Args:
        network: D.
        loss: One of `GAN_LOSSES`.
        gradient_penalty: lambda.
        r1: gamma.

    Raises:
        ValueError: If there is a penalty on a network with batch normalisation.
    """

    def __init__(
        self, network: GANDiscriminator, loss: GANLoss, gradient_penalty: float = 0.0, r1: float = 0.0
    ) -> None:
        super().__init__()
        if any(isinstance(module, _BatchNorm) for module in network.modules()):
            check_no_penalty(gradient_penalty, r1)
        self.network, self.loss, self.gradient_penalty, self.r1 = network, loss, gradient_penalty, r1

    def forward(
        self,
        opponent: GANGenerator,
        images: torch.Tensor,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        mismatched_embeds: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
    ) -> Terms:
        """Terms of shape (B,).

        Args:
            opponent: G.
            images: x in [-1, 1], (B, C, H, W).
            latents: z, (B, latent_dim).
            class_labels: y, (B,), of both players.
            text_embeds: y, (B, D), of both players.
            mismatched_embeds: Texts of other images, (B, D); given, the text has to fit its image.
            alpha: a, (B,); for the gradient penalty.
        """
        with torch.no_grad():
            fakes = frozen(opponent, latents, class_labels, text_embeds).sample.to(images.dtype)

        def logits(x: torch.Tensor, texts: torch.Tensor | None = text_embeds) -> torch.Tensor:
            return self.network(x, class_labels, texts).logits

        real, fake = logits(images).float(), logits(fakes).float()
        if mismatched_embeds is None:
            loss, terms = discriminator_loss(self.loss, real, fake), {}
        else:
            mismatched = logits(images, mismatched_embeds).float()
            loss = matching_discriminator_loss(self.loss, real, mismatched, fake)
            terms = judged("mismatched", mismatched, self.loss)
        terms |= judged("real", real, self.loss) | judged("fake", fake, self.loss)
        if self.gradient_penalty > 0:
            terms["gradient_penalty"] = gradient_penalty(logits, images, fakes, alpha)
            loss = loss + self.gradient_penalty * terms["gradient_penalty"]
        if self.r1 > 0:
            terms["r1"] = r1_penalty(logits, images)
            loss = loss + self.r1 * terms["r1"]
        return {"loss": loss, **terms}


class GeneratorObjective(nn.Module):
    """What the generator minimises.

    Args:
        network: G.
        loss: One of `GAN_LOSSES`.
    """

    def __init__(self, network: GANGenerator, loss: GANLoss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(
        self,
        opponent: GANDiscriminator,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
    ) -> Terms:
        """Terms of shape (B,) of what is drawn from latents (B, latent_dim) for classes (B,) or texts (B, D).

        `opponent` is D.
        """
        fakes = self.network(latents, class_labels, text_embeds).sample
        logits = frozen(opponent, fakes, class_labels, text_embeds).logits.float()
        return {"loss": generator_loss(self.loss, logits)}


def judged(name: str, logits: torch.Tensor, loss: GANLoss) -> Terms:
    """What the curves show of logits, (B, *): their mean and, if they are of probabilities, the mean of these."""
    logits = logits.detach()
    terms = {f"{name}_logit": mean_flat(logits)}
    return terms | ({f"{name}_probability": mean_flat(logits.sigmoid())} if loss in LOGISTIC else {})
