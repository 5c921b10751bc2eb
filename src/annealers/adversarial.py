r"""How much of an adversarial loss an autoencoder gets, and who learns from what; the losses are in `gan_losses`.

    autoencoder      L_rec + w lambda L_generator,     lambda = |grad_W L_rec| / (|grad_W L_generator| + 1e-4)

W being the weight of the decoder's last layer, and lambda in [0, 1e4] without gradient: so both losses move W alike.

Both players learn in one forward and backward pass, each from its own loss alone: the generator's loss sees the
discriminator with detached weights (`frozen`), the discriminator's sees detached images.

`AdaptiveWeight` measures lambda on a whole optimizer step, over micro-batches and processes, and applies it in the
next one. So a run does not depend on how its steps are split; published code takes lambda of each process's own batch.

Source: Esser, Rombach & Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis", arXiv:2012.09841, Eq. 7
(its delta is 1e-6 and in their code 1e-4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from annealers.models.vector_quantizer import everywhere_sum

LARGEST_WEIGHT = 1e4
SMALLEST_NORM = 1e-4


def frozen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module with detached parameters and copies of its buffers.

    A gradient goes through it, to its arguments, and not to it; and its statistics of batches stay as they are.
    """
    detached = {name: parameter.detach() for name, parameter in module.named_parameters()}
    copied = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, detached | copied, args, kwargs)


def last_layer_gradient(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """d loss / d weight of a scalar loss, whose graph is kept for the backward pass to come."""
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]


def adaptive_weight(reconstruction_gradient: torch.Tensor, adversarial_gradient: torch.Tensor) -> torch.Tensor:
    """lambda = |g_rec| / (|g_adv| + 1e-4), at most 1e4, without gradient; gradients of one shape -> ()."""
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + SMALLEST_NORM)
    return ratio.detach().clamp(0, LARGEST_WEIGHT)


class AdaptiveWeight(nn.Module):
    """lambda of the last optimizer step; 0 until there was one.

    Call `observe` in each forward pass that trains and `update` after each optimizer step. The value is a buffer, and
    so part of a checkpoint.
    """

    value: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))
        self._gradients: torch.Tensor | None = None  # summed over micro-batches, (2, *weight.shape)

    def observe(self, reconstruction: torch.Tensor, adversarial: torch.Tensor, weight: torch.Tensor) -> None:
        """Takes down the gradients of two scalar losses with respect to the weight of the last layer."""
        gradients = torch.stack([last_layer_gradient(loss, weight).float() for loss in (reconstruction, adversarial)])
        self._gradients = gradients if self._gradients is None else self._gradients + gradients

    @torch.no_grad()
    def update(self, micro_batches: int = 1) -> None:
        """Sets the value by what was observed in a step; all processes must call it.

        Args:
            micro_batches: Of the step, on all processes: the losses are means, of which the step is the mean.

        Raises:
            RuntimeError: If nothing was observed.
        """
        if self._gradients is None:
            raise RuntimeError("no gradient was observed since the last update; call `observe` in each forward pass")
        gradients, self._gradients = self._gradients, None
        everywhere_sum(gradients)
        self.value.copy_(adaptive_weight(*(gradients / micro_batches)))
