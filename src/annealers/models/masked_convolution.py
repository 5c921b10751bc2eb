"""Convolutions that see only what comes before, in raster order and, inside a pixel, from channel group to group.

The window of a pixel (r, s) is the rows r - a .. r - 1 above it, from s - b to s + b, and in its own row the pixels
s - b .. s. Rows below and pixels to the right are left out of the kernel; the few weights of it that still lie ahead
are masked to zero. At the pixel itself a channel of group g sees

    mask A    groups < g       for the input, where a group is a colour: nothing of itself
    mask B    groups <= g      for hidden channels, which know no more than their own group may

With one group mask A hides the pixel itself and mask B hides nothing of it.

Source: van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759, Sec. 3.4
and Fig. 2; the crop is their masked kernel without the part that is always zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import conv2d, pad


class MaskedConv2d(nn.Module):
    """A convolution over the past of each pixel, of the same height and width.

    Args:
        in_channels: Channels of the input, in `groups` equal blocks.
        out_channels: Channels of the output, in `parts` blocks, each in `groups` equal blocks.
        above: a, the rows above that the window reaches.
        side: b, the columns to each side, to the left alone if a is 0.
        mask: "A" or "B".
        groups: Number of channel groups that know of each other in order.
        parts: Number of things that the output is made of, such as the two halves of a gate.
        bias: Whether there is one.

    Raises:
        ValueError: If the groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        above: int = 0,
        side: int = 0,
        mask: Literal["A", "B"] = "B",
        groups: int = 1,
        parts: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.above, self.side = above, side
        self.right = side if above > 0 else 0  # columns of the kernel to the right of the pixel
        self.conv = nn.Conv2d(in_channels, out_channels, (above + 1, side + 1 + self.right), bias=bias)
        theirs, ours = group_of_channels(in_channels, groups), group_of_channels(out_channels, groups, parts)[:, None]
        visible = torch.ones(self.conv.weight.shape, dtype=torch.bool)
        visible[:, :, -1, side] = theirs < ours if mask == "A" else theirs <= ours
        visible[:, :, -1, side + 1 :] = False
        self.hides = not visible.all()
        self.register_buffer("visible", visible, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The kernel with its mask, (out_channels, in_channels, a + 1, columns)."""
        return self.conv.weight * self.visible if self.hides else self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return conv2d(pad(x, (self.side, self.right, self.above, 0)), self.weight, self.conv.bias)


def group_of_channels(channels: int, groups: int, parts: int = 1) -> torch.Tensor:
    """The group that each channel belongs to, (channels,).

    Raises:
        ValueError: If they do not divide evenly.
    """
    if channels % (groups * parts) != 0:
        raise ValueError(f"{channels} channels do not divide into {parts} x {groups} equal groups")
    return torch.arange(groups).repeat_interleave(channels // parts // groups).repeat(parts)
