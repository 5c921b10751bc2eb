r"""A distance of images as a trained network sees them.

    d(x, y) = sum_l mean_p ||f_l(x)_p / |f_l(x)_p| - f_l(y)_p / |f_l(y)_p|||^2

over the levels l of the network and the pixels p of each. It is the perceptual distance of Zhang et al. with equal
weights, in the features of a classifier of noisy images that is told there is no noise: a network of this library,
trained on the very data (`training/train_classifier.py`), where they take one trained on ImageNet.

Source: Zhang, Isola, Efros, Shechtman & Wang 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", arXiv:1801.03924, Eq. 1.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from annealers.models.noisy_classifier import NoisyClassifierModel


class FeatureLoss(nn.Module):
    """The distance in the features of a classifier, which is frozen and stays in evaluation mode.

    Args:
        classifier: The network; its weights no longer require gradients.

    Example:
        >>> from annealers import NoisyClassifierModel
        >>> from annealers.feature_loss import FeatureLoss
        >>> distance = FeatureLoss(NoisyClassifierModel(sample_size=8, in_channels=1))
        >>> x = torch.rand(3, 1, 8, 8) * 2 - 1
        >>> distance(x, x).tolist(), distance(x, -x).shape
        ([0.0, 0.0, 0.0], torch.Size([3]))
    """

    def __init__(self, classifier: NoisyClassifierModel) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureLoss:
        """Stays as it is: dropout would make the distance a random one."""
        del mode
        return super().train(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], (B, C, H, W) and (B, C, H, W) -> (B,); the gradient reaches both."""
        distances = [
            (normalize(f_x.float(), dim=1) - normalize(f_y.float(), dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for f_x, f_y in zip(self.features(x), self.features(y), strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """f_l(x): what each level of the classifier hands down, (B, C_l, H_l, W_l), at timestep 0."""
        network = self.classifier
        steps = torch.zeros(len(x), device=x.device)
        embedding = network.time_embedding(network.time_projection(steps).to(network.dtype))
        maps = [network.conv_in(x)]
        for block in network.down_blocks:
            maps.append(block(maps[-1], embedding)[0])
        return maps[1:]
