"""The three bodies of a PixelCNN: from embedded codes to features of each pixel that know only of the pixels before.

**Masked**: residual blocks of masked convolutions. A window of k x k masked to the past does not see the pixels
further right in the rows above than a slope allows, and no depth repairs that: the blind spot.

**Gated**: two stacks without a blind spot. The vertical one sees all of the rows above, the horizontal one the row of
the pixel to its left; with V the vertical features of the rows <= r, one row *down* when they are passed on,

    P = W_v * V,        V' = tanh(P_1) sigma(P_2),                   rows r - k//2 .. r, columns s - k//2 .. s + k//2
    Q = W_h * H + U * down(P),    G = tanh(Q_1) sigma(Q_2),          columns s - k//2 .. s
    H' = H + R G,       features = sum over the layers of S G,

where inside the gates P and Q have the context (labels, condition) added. Without `down` the pixel would see itself
and all to its right, and a network trained so predicts perfectly what it is shown.

**Row LSTM**: a layer is a recurrent network from row to row, all pixels of a row at once,

    (o, f, i, g) = W_ss * h_{r-1} + W_is * x_r,     c_r = sigma(f) c_{r-1} + sigma(i) tanh(g),
    h_r = sigma(o) tanh(c_r),                       x'_r = x_r + R h_r,

W_is masked to the left, W_ss not, since the row above is known: one layer sees a triangle that widens upwards.

Sources: van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759, Sec. 3.1,
Eq. 3 (Row LSTM), Sec. 3.3, 3.4 (residual blocks, masks); van den Oord et
al. 2016, "Conditional Image Generation with PixelCNN Decoders", arXiv:1606.05328, Sec. 2.2 - 2.4, Fig. 2 (gated).
What differs: the channels are not halved inside a block; the gated stack has skip connections to the end, as WaveNet.

    symbol    code                 shape               meaning
    x, H      horizontal           (B, C, H, W)        features with mask
    V         vertical             (B, C, H, W)
    P, Q      above, row           (B, 2C, H, W)       before the gates
    h, c      hidden, cell         (B, C, W)           of a row
    context   context              (B, C, H or 1, W or 1)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import dropout, pad, relu

from annealers.models.masked_convolution import MaskedConv2d


def gate(x: torch.Tensor) -> torch.Tensor:
    """tanh(x_1) sigma(x_2) of the two halves of the channels, (B, 2C, ...) -> (B, C, ...)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class MaskedBlock(nn.Module):
    """x + R relu(W * relu(x) + context).

    Args:
        channels: C.
        reach: k // 2.
        groups: Channel groups.
        dropout: Probability, in training.
        conditional: Whether there is a context.
    """

    def __init__(self, channels: int, reach: int, groups: int, dropout: float, conditional: bool) -> None:
        super().__init__()
        self.convolution = MaskedConv2d(channels, channels, above=reach, side=reach, groups=groups)
        self.context = context_convolution(channels, channels, conditional)
        self.out = MaskedConv2d(channels, channels, groups=groups)
        self.dropout = dropout

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        y = self.convolution(relu(x))
        if self.context is not None:
            y = y + self.context(context)
        return x + self.out(dropout(relu(y), self.dropout, self.training))


class GatedLayer(nn.Module):
    """One layer of both stacks.

    Args:
        in_channels: Channels of what both stacks read.
        channels: C, of what they give and of the skip.
        reach: k // 2.
        groups: Channel groups.
        first: Whether it reads the image itself: mask A, and no residual.
        dropout: Probability, in training.
        conditional: Whether there is a context.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        reach: int,
        groups: int,
        first: bool,
        dropout: float,
        conditional: bool,
    ) -> None:
        super().__init__()
        self.first, self.reach, self.dropout = first, reach, dropout
        self.vertical = nn.Conv2d(in_channels, 2 * channels, kernel_size=(reach + 1, 2 * reach + 1))
        self.horizontal = MaskedConv2d(
            in_channels, 2 * channels, side=reach, mask="A" if first else "B", groups=groups, parts=2
        )
        self.from_vertical = nn.Conv2d(2 * channels, 2 * channels, kernel_size=1, bias=False)
        self.context = context_convolution(channels, 4 * channels, conditional)
        self.out = MaskedConv2d(channels, 2 * channels, groups=groups, parts=2)  # residual and skip

    def forward(
        self, vertical: torch.Tensor, horizontal: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next V and H, and what is added to the features."""
        above = self.vertical(pad(vertical, (self.reach, self.reach, self.reach, 0)))  # (B, 2C, H, W), P
        row = self.horizontal(horizontal) + one_row_down(self.from_vertical(above))  # (B, 2C, H, W), Q
        if self.context is not None:
            of_vertical, of_horizontal = self.context(context).chunk(2, dim=1)
            above, row = above + of_vertical, row + of_horizontal
        gated = dropout(gate(row), self.dropout, self.training)
        residual, skip = self.out(gated).chunk(2, dim=1)
        return gate(above), residual if self.first else horizontal + residual, skip


class RowLSTMLayer(nn.Module):
    """One recurrent layer, from the first row to the last.

    Args:
        channels: C.
        reach: k // 2.
        groups: Channel groups.
        dropout: Probability, in training.
        conditional: Whether there is a context.
    """

    def __init__(self, channels: int, reach: int, groups: int, dropout: float, conditional: bool) -> None:
        super().__init__()
        self.input_to_state = MaskedConv2d(channels, 4 * channels, side=reach, groups=groups, parts=4)
        self.state_to_state = nn.Conv1d(channels, 4 * channels, kernel_size=2 * reach + 1, padding=reach, bias=False)
        self.context = context_convolution(channels, 4 * channels, conditional)
        self.out = MaskedConv2d(channels, channels, groups=groups)
        self.dropout = dropout

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        gates = self.input_to_state(x)  # (B, 4C, H, W)
        if self.context is not None:
            gates = gates + self.context(context)
        hidden = cell = torch.zeros_like(x[:, :, 0])  # (B, C, W)
        rows = []
        for of_row in gates.unbind(dim=2):
            hidden, cell = lstm_step(of_row + self.state_to_state(hidden), cell)
            rows.append(hidden)
        return x + self.out(dropout(torch.stack(rows, dim=2), self.dropout, self.training))


class MaskedTrunk(nn.Module):
    """A masked convolution of the image, then blocks of `MaskedBlock` or `RowLSTMLayer`.

    Args:
        in_channels: Channels of the embedded codes.
        channels: C.
        num_layers: Number of layers, the first convolution among them.
        first_kernel_size, kernel_size: Odd widths of the first window and of the others.
        groups: Channel groups.
        dropout: Probability, in training.
        conditional: Whether there is a context.
        recurrent: Row LSTM layers rather than convolutional blocks.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_layers: int,
        first_kernel_size: int,
        kernel_size: int,
        groups: int,
        dropout: float,
        conditional: bool,
        recurrent: bool,
    ) -> None:
        super().__init__()
        reach = first_kernel_size // 2
        self.first = MaskedConv2d(in_channels, channels, above=reach, side=reach, mask="A", groups=groups)
        layer = RowLSTMLayer if recurrent else MaskedBlock
        self.layers = nn.ModuleList(
            layer(channels, kernel_size // 2, groups, dropout, conditional) for _ in range(num_layers - 1)
        )

    def forward(self, embedded: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, C, H, W)."""
        x = self.first(embedded)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, context)
            else:
                x = layer(x, context)
        return x


class GatedTrunk(nn.Module):
    """The two stacks.

    Args:
        in_channels, channels, num_layers, first_kernel_size, kernel_size, groups, dropout, conditional: As of
            `MaskedTrunk`.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_layers: int,
        first_kernel_size: int,
        kernel_size: int,
        groups: int,
        dropout: float,
        conditional: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GatedLayer(
                in_channels if first else channels,
                channels,
                (first_kernel_size if first else kernel_size) // 2,
                groups,
                first,
                dropout,
                conditional,
            )
            for first in (layer == 0 for layer in range(num_layers))
        )

    def forward(self, embedded: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, C, H, W)."""
        vertical, horizontal, features = self._layer(self.layers[0], embedded, embedded, context)
        for layer in self.layers[1:]:
            vertical, horizontal, skip = self._layer(layer, vertical, horizontal, context)
            features = features + skip
        return features

    def _layer(self, layer: nn.Module, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)


def one_row_down(x: torch.Tensor) -> torch.Tensor:
    """Row r becomes row r + 1, the first is zero, the last is lost, (B, C, H, W)."""
    return pad(x, (0, 0, 1, 0))[:, :, :-1]


def context_convolution(channels: int, out_channels: int, conditional: bool) -> nn.Conv2d | None:
    return nn.Conv2d(channels, out_channels, kernel_size=1, bias=False) if conditional else None


def lstm_step(gates: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h and c of a row, from (B, 4C, ...) and the c of the row above, (B, C, ...)."""
    o, f, i, g = gates.chunk(4, dim=1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell
