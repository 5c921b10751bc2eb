"""Sampling from a PixelCNN without doing any work twice: what earlier rows and pixels gave is kept.

A naive sampler calls the network on the whole image for every pixel. Of a masked network nearly all of that was known
before: once a row is complete, what it says to the rows below is computed, for the whole row at once, and inside a row
every layer keeps its input columns, so that a pixel costs one product of a vector and a matrix per convolution,

    start_row()       the rows above are complete: adds up, per layer, what they give to each pixel of the next
    write(s, e)       tells the embedded codes of pixel s, (B, E); again when more channels of it are known
    read(s)           features of pixel s, (B, channels), which know all that was written before

for s = 0 .. W - 1 in every row. The numbers are those of the whole network up to rounding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import conv2d, linear, relu

from annealers.models.masked_convolution import MaskedConv2d
from annealers.models.pixel_cnn_trunks import (
    GatedLayer,
    GatedTrunk,
    MaskedBlock,
    MaskedTrunk,
    RowLSTMLayer,
    gate,
    lstm_step,
)


class Window:
    """One masked convolution in the row that is being drawn.

    Args:
        convolution: Its weights in that row are used here; those above come in through `base`.
        columns: (B, side + W, in_channels), zeros.
    """

    def __init__(self, convolution: MaskedConv2d, columns: torch.Tensor) -> None:
        self.side, self.columns = convolution.side, columns
        weight = convolution.weight[:, :, -1, : self.side + 1]  # (O, I, side + 1)
        self.matrix = weight.permute(2, 1, 0).flatten(0, 1)  # ((side + 1) I, O)
        self.base = columns.new_zeros(())

    @property
    def row(self) -> torch.Tensor:
        """The input, (B, in_channels, W)."""
        return self.columns[:, self.side :].mT

    def start_row(self, base: torch.Tensor) -> None:
        """Takes what does not depend on this row, (B, O, W)."""
        self.base = base.permute(2, 0, 1).contiguous()  # (W, B, O)

    def write(self, column: int, x: torch.Tensor) -> None:
        self.columns[:, column + self.side] = x

    def read(self, column: int) -> torch.Tensor:
        """The convolution at a pixel, (B, O)."""
        seen = self.columns[:, column : column + self.side + 1].flatten(1)  # (B, (side + 1) I)
        return torch.addmm(self.base[column], seen, self.matrix)


class RowsAbove:
    """The last rows of what a convolution reads, with zeros around them.

    Args:
        rows: (B, I, number of rows, side + W + side), zeros.
        side: Columns of zeros on each side.
    """

    def __init__(self, rows: torch.Tensor, side: int) -> None:
        self.rows, self.side = rows, side

    def append(self, row: torch.Tensor) -> None:
        """One more row at the bottom, (B, I, W)."""
        self.rows = torch.cat([self.rows[:, :, 1:], torch.zeros_like(self.rows[:, :, :1])], dim=2)
        self.rows[:, :, -1, self.side : self.side + row.shape[2]] = row


class CachedMaskedConv2d:
    """A masked convolution that reaches rows above.

    Args:
        convolution: With `above` > 0.
        context: Added to it, (B, O, H, W), or None.
        embedded: A tensor (B, 1, 1, W) of the batch size, width, type and device.
    """

    def __init__(self, convolution: MaskedConv2d, context: torch.Tensor | None, embedded: torch.Tensor) -> None:
        batch, width, channels = len(embedded), embedded.shape[3], convolution.conv.in_channels
        side = convolution.side
        self.above = RowsAbove(embedded.new_zeros(batch, channels, convolution.above, width + 2 * side), side)
        self.window = Window(convolution, embedded.new_zeros(batch, side + width, channels))
        self.weight_above, self.bias = convolution.weight[:, :, :-1], convolution.conv.bias
        self.context, self.next_row = context, 0

    def start_row(self) -> None:
        if self.next_row > 0:
            self.above.append(self.window.row)
        base = conv2d(self.above.rows, self.weight_above, self.bias).squeeze(2)  # (B, O, W)
        self.window.start_row(with_context(base, self.context, self.next_row))
        self.next_row += 1


class CachedMaskedBlock:
    """`MaskedBlock`, pixel by pixel; arguments as of `CachedMaskedConv2d`."""

    def __init__(self, block: MaskedBlock, context: torch.Tensor | None, embedded: torch.Tensor) -> None:
        self.block = block
        self.convolution = CachedMaskedConv2d(block.convolution, of_layer(block, context, embedded), embedded)

    def start_row(self) -> None:
        self.convolution.start_row()

    def at(self, column: int, x: torch.Tensor) -> torch.Tensor:
        self.convolution.window.write(column, relu(x))
        return x + pointwise(self.block.out, relu(self.convolution.window.read(column)))


class CachedRowLSTMLayer:
    """`RowLSTMLayer`, pixel by pixel; arguments as of `CachedMaskedConv2d`."""

    def __init__(self, layer: RowLSTMLayer, context: torch.Tensor | None, embedded: torch.Tensor) -> None:
        batch, width, channels = len(embedded), embedded.shape[3], layer.state_to_state.in_channels
        convolution = layer.input_to_state
        self.layer, self.next_row = layer, 0
        self.context = of_layer(layer, context, embedded)
        self.window = Window(convolution, embedded.new_zeros(batch, convolution.side + width, channels))
        self.hidden, self.cell = embedded.new_zeros(2, batch, channels, width)  # of the row that is being drawn
        self.cell_above = self.cell

    def start_row(self) -> None:
        from_above = self.layer.state_to_state(self.hidden)  # (B, 4C, W)
        base = from_above + self.layer.input_to_state.conv.bias[:, None]
        self.window.start_row(with_context(base, self.context, self.next_row))
        self.cell_above = self.cell.clone()
        self.next_row += 1

    def at(self, column: int, x: torch.Tensor) -> torch.Tensor:
        self.window.write(column, x)
        hidden, cell = lstm_step(self.window.read(column), self.cell_above[:, :, column])
        self.hidden[:, :, column], self.cell[:, :, column] = hidden, cell
        return x + pointwise(self.layer.out, hidden)


class MaskedCache:
    """A `MaskedTrunk`, row by row and pixel by pixel.

    Args:
        trunk: The network.
        context: As of its `forward`, or None.
        embedded: A tensor (B, 1, H, W) of the batch size, image size, type and device.
    """

    def __init__(self, trunk: MaskedTrunk, context: torch.Tensor | None, embedded: torch.Tensor) -> None:
        self.first = CachedMaskedConv2d(trunk.first, None, embedded)
        self.layers = [
            CachedRowLSTMLayer(layer, context, embedded)
            if isinstance(layer, RowLSTMLayer)
            else CachedMaskedBlock(layer, context, embedded)
            for layer in trunk.layers
        ]

    def start_row(self) -> None:
        for layer in (self.first, *self.layers):
            layer.start_row()

    def write(self, column: int, embedded: torch.Tensor) -> None:
        self.first.window.write(column, embedded)

    def read(self, column: int) -> torch.Tensor:
        x = self.first.window.read(column)
        for layer in self.layers:
            x = layer.at(column, x)
        return x


class CachedGatedLayer:
    """`GatedLayer`: the vertical stack a row at a time, the horizontal one pixel by pixel.

    Args as of `CachedMaskedConv2d`.
    """

    def __init__(self, layer: GatedLayer, context: torch.Tensor | None, embedded: torch.Tensor) -> None:
        batch, width, channels = len(embedded), embedded.shape[3], layer.vertical.in_channels
        rows = embedded.new_zeros(batch, channels, layer.reach + 1, width + 2 * layer.reach)
        self.layer, self.above = layer, RowsAbove(rows, layer.reach)
        self.window = Window(layer.horizontal, embedded.new_zeros(batch, layer.reach + width, channels))
        context = of_layer(layer, context, embedded)
        self.of_vertical, self.of_horizontal = (None, None) if context is None else context.chunk(2, dim=1)

    def first_row(self) -> None:
        bias = self.layer.horizontal.conv.bias[:, None]
        self.start(bias.expand(len(self.window.columns), -1, self.above.rows.shape[3] - 2 * self.above.side), 0)

    def next_row(self, vertical: torch.Tensor, row: int) -> torch.Tensor:
        """Takes V of the row above, (B, I, W), and returns its V'."""
        self.above.append(vertical)
        above = self.layer.vertical(self.above.rows)  # (B, 2C, 1, W), P
        self.start((self.layer.from_vertical(above) + self.layer.horizontal.conv.bias[:, None, None]).squeeze(2), row)
        return gate(with_context(above.squeeze(2), self.of_vertical, row - 1))

    def start(self, base: torch.Tensor, row: int) -> None:
        self.window.start_row(with_context(base, self.of_horizontal, row))

    def at(self, column: int, x: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """H' and what is added to the features; x is None for the first layer, which reads what has been written."""
        if x is not None:
            self.window.write(column, x)
        residual, skip = pointwise(self.layer.out, gate(self.window.read(column))).chunk(2, dim=1)
        return residual if x is None else x + residual, skip


class GatedCache:
    """A `GatedTrunk`, row by row and pixel by pixel; arguments as of `MaskedCache`."""

    def __init__(self, trunk: GatedTrunk, context: torch.Tensor | None, embedded: torch.Tensor) -> None:
        self.layers = [CachedGatedLayer(layer, context, embedded) for layer in trunk.layers]
        self.next_row = 0

    def start_row(self) -> None:
        if self.next_row == 0:
            for layer in self.layers:
                layer.first_row()
        else:
            vertical = self.layers[0].window.row
            for layer in self.layers:
                vertical = layer.next_row(vertical, self.next_row)
        self.next_row += 1

    def write(self, column: int, embedded: torch.Tensor) -> None:
        self.layers[0].window.write(column, embedded)

    def read(self, column: int) -> torch.Tensor:
        x, features = self.layers[0].at(column, None)
        for layer in self.layers[1:]:
            x, skip = layer.at(column, x)
            features = features + skip
        return features


def pointwise(convolution: MaskedConv2d, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution of one pixel, (B, I) -> (B, O)."""
    return linear(x, convolution.weight[:, :, 0, 0], convolution.conv.bias)


def of_layer(layer: nn.Module, context: torch.Tensor | None, embedded: torch.Tensor) -> torch.Tensor | None:
    """What a layer makes of the context, spread over the image, (B, O, H, W)."""
    return None if context is None else layer.context(context).expand(-1, -1, *embedded.shape[2:])


def with_context(base: torch.Tensor, context: torch.Tensor | None, row: int) -> torch.Tensor:
    return base if context is None else base + context[:, :, row]
