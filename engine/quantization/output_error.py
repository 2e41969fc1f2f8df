"""A layer's output error as a quadratic function of its weight, measured on images.

`LayerRuns` runs the unquantized network and the quantized one once, a layer at a time, as far as
the memory of KEPT_BYTES reaches; `output_error` sums the function's coefficients up.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from engine.networks.convolution import read_geometry
from engine.networks.graph import Operation, PartialRun, layers
from engine.system import distributed

Batches = Callable[[], Iterable[Tensor]]  # images (B, 3, H, W), the same ones at every call

KEPT_BYTES = 2**30  # of values between two layers, of all images in both networks


@dataclass(frozen=True)
class OutputError:
    """A layer's mean squared output error, as a quadratic function of its weight's change D.

    With e = (W x + b) − (W x̂ + b̂) what the earlier layers and the bias leave and a the gain of each
    output channel, it is E(D) = mean ‖a·(e − D x̂)‖² = c − 2⟨D, C⟩ + ⟨a²D, D G⟩. Weights and their
    changes are (groups, output channels / groups, K), K those of a channel; tensors are in float64.

    Attributes:
        gram: G = mean x̂x̂ᵀ, (groups, K, K).
        cross: C = mean a²·e x̂ᵀ, (groups, output channels / groups, K).
        constant: c = mean ‖a·e‖².
        gain: a, (groups, output channels / groups, 1).
    """

    gram: Tensor
    cross: Tensor
    constant: Tensor
    gain: Tensor

    def __call__(self, change: Tensor) -> float:
        """Return E(D)."""
        d = change.double()  # c − 2⟨D, C⟩ + ⟨a²D, D G⟩ cancels: not in float32
        quadratic = (d * self.gain.square()) @ self.gram - 2 * self.cross
        return (self.constant + (d * quadratic).sum()).item()

    def gradient(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return the function D ↦ ∂E/∂D = 2(a²·D G − C), computed in `dtype`."""
        gram, cross = (self.gram * 2).to(dtype), (self.cross * 2).to(dtype)
        scale = self.gain.square().to(dtype)
        return lambda d: ((d * scale) @ gram).sub_(cross)


class LayerRuns:
    """Runs the unquantized network and the quantized one side by side, a layer at a time.

    What later nodes read is kept of each batch, so that the networks go on from the layer before. A
    batch that would be more than KEPT_BYTES starts again from its images.
    """

    def __init__(self, full: fx.GraphModule, graph_q: fx.GraphModule, batches: Batches) -> None:
        self.full, self.graph_q, self.batches = full, graph_q, batches
        self.kept: list[tuple[PartialRun, PartialRun] | None] = []  # of each batch

    def outputs_and_inputs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the named layer's output in `full` and its input in `graph_q`, batch by batch.

        Layers come in the order in which they run, and all batches are read of each.
        """
        output = layers(self.full)[name].node
        input_q = layers(self.graph_q)[name].node.args[0]
        needs_images = not self.kept or None in self.kept
        batches = self.batches() if needs_images else [None] * len(self.kept)
        now_kept, n_bytes = [], 0
        for images, runs in zip(batches, self.kept or repeat(None), strict=False):
            runs = runs or (PartialRun(self.full, images), PartialRun(self.graph_q, images))
            yield runs[0].value(output), runs[1].value(input_q)
            n_more = sum(run.n_bytes() for run in runs)
            fits = n_bytes + n_more <= KEPT_BYTES
            now_kept.append(runs if fits else None)
            n_bytes += n_more if fits else 0
        self.kept = now_kept


def output_error(runs: LayerRuns, name: str, gain: Tensor) -> OutputError:
    """Return the error of the named layer of `runs.graph_q`, whose weight is still that of `full`.

    `gain` (output channels) multiplies the output's channels.
    """
    layer = layers(runs.graph_q)[name]
    w, bias = (t and runs.graph_q.get_buffer(t) for t in (layer.weight, layer.bias))
    gain = gain.double().view(layer.groups, -1, 1)
    (groups, c_out, _), k = gain.shape, w[0].numel()
    gram, cross = (gain.new_zeros(groups, n, k) for n in (k, c_out))
    constant, n_positions = gain.new_zeros(()), gain.new_zeros(())
    for y, x_q in runs.outputs_and_inputs(name):
        e = y - layer.node.target(x_q, w, bias, *layer.node.args[3:])
        e = by_group(e, layer).flatten(2) * gain.to(e.dtype)  # a·e
        windows = Windows.of_layer(layer, w, x_q)
        gram += windows.gram()
        cross += windows.cross(e * gain.to(e.dtype))
        # ‖a·e‖² is not needed for the gradient, and is summed in float64: E(D) is a difference
        constant += e.double().square().sum()
        n_positions += e.shape[-1]
    # each process has read its own images; positions make means of the sums
    sums = [distributed.all_reduce_sum(t) for t in (gram, cross, constant, n_positions)]
    return OutputError(*(t / sums[-1] for t in sums[:-1]), gain)


def by_group(t: Tensor, layer: Operation) -> Tensor:
    """Return a layer's input or output as (groups, channels / groups, B, height, width).

    Positions of a linear layer are images of one pixel.
    """
    t = t.reshape(-1, t.shape[-1], 1, 1) if layer.kind == "linear" else t
    return t.unflatten(1, (layer.groups, -1)).movedim(0, 2)


@dataclass(frozen=True)
class Windows:
    """What each weight of a layer's kernel, a tap, sees of the layer's input x̂.

    Attributes:
        x: x̂ with its padding, (groups, channels / groups, B, height, width).
        rows: which rows of x each row of taps sees.
        columns: which columns of x each column of taps sees.
    """

    x: Tensor
    rows: Sequence[slice]
    columns: Sequence[slice]

    @classmethod
    def of_layer(cls, layer: Operation, w: Tensor, x: Tensor) -> "Windows":
        """Return those of a 2-d convolution or linear layer with weight w and input x."""
        kernel = (*w.shape[2:], 1, 1)[:2]
        geometry = read_geometry(layer.node.args[3:], kernel)
        (top, left), (bottom, right) = geometry.before, geometry.after
        x = F.pad(by_group(x, layer), [left, right, top, bottom]).contiguous()
        sizes = x.shape[3:], kernel, geometry.stride, geometry.dilation
        seen = []
        for size, k, step, apart in zip(*sizes, strict=True):
            length = size - apart * (k - 1)  # from a tap's first pixel on
            seen.append([slice(apart * i, apart * i + length, step) for i in range(k)])
        return cls(x, *seen)

    def pixels(self, rows: slice, columns: slice) -> Tensor:
        """Return those of x, (groups, channels / groups, pixels)."""
        return self.x[..., rows, columns].flatten(2)

    def cross(self, e: Tensor) -> Tensor:
        """Return Σ e x̂ᵀ over all positions, (groups, output channels / groups, K)."""
        sums = [e @ self.pixels(*tap).mT for tap in product(self.rows, self.columns)]
        return torch.stack(sums, -1).flatten(2)

    def gram(self) -> Tensor:
        """Return Σ x̂x̂ᵀ over all positions, (groups, K, K)."""
        if are_neighbours(self.rows) and are_neighbours(self.columns):
            return self._gram_of_neighbours()
        taps = [self.pixels(*tap) for tap in product(self.rows, self.columns)]
        (groups, channels, _), n = taps[0].shape, len(taps)
        gram = self.x.new_empty(groups, channels, n, channels, n)
        for i, j in combinations_with_replacement(range(n), 2):
            seen_by_both = taps[i] @ taps[j].mT
            gram[:, :, i, :, j] = seen_by_both
            gram[:, :, j, :, i] = seen_by_both.mT
        return gram.flatten(3).flatten(1, 2)

    def _gram_of_neighbours(self) -> Tensor:
        """Return the same of a convolution whose stride and dilation are 1, in a third of the time.

        Two taps that are δ apart see the products x[q] x[q + δ]ᵀ, as any other two do, but for some
        at the borders. So these are summed once for each δ, in parts: the pixels that all taps see,
        and single rows and columns around them.
        """
        (groups, channels), (height, width) = self.x.shape[:2], (len(self.rows), len(self.columns))
        gram = self.x.new_empty(groups, channels, height, width, channels, height, width)
        rows, columns = parts(self.rows), parts(self.columns)
        pixels = [[self.pixels(row, column) for column in columns] for row in rows]
        for dy, dx in product(range(height), range(1 - width, width)):
            if dy == 0 and dx < 0:
                continue  # the same products as for −δ
            # of the columns of taps, those that have another one δ away
            taps = range(max(0, -dx), width - max(0, dx))
            sums = [
                [
                    pixels[i][j] @ self.pixels(shifted(rows[i], dy), shifted(columns[j], dx)).mT
                    for j in range(taps.start, taps.stop + width - 1)
                ]
                for i in range(2 * height - 1 - dy)
            ]
            sums = torch.stack([torch.stack(row) for row in sums])
            for i, j in product(range(height - dy), taps):
                first = j - taps.start
                seen = sums[i : i + height, first : first + width].sum((0, 1))
                gram[:, :, i, j, :, i + dy, j + dx] = seen
                gram[:, :, i + dy, j + dx, :, i, j] = seen.mT
        return gram.flatten(4).flatten(1, 3)


def are_neighbours(taps: Sequence[slice]) -> bool:
    """Tell whether n taps see all rows but the first and the last ones, and n rows or more each."""
    n_rows = taps[0].stop
    return n_rows >= len(taps) and [*taps] == [slice(i, i + n_rows, 1) for i in range(len(taps))]


def parts(taps: Sequence[slice]) -> list[slice]:
    """Return the parts of rows that n taps see: n − 1 single ones, what all see, and n − 1 again.

    The i-th tap sees n of them, from the i-th on.
    """
    n, stop = len(taps) - 1, taps[0].stop
    before, after = ([slice(i, i + 1) for i in range(j, j + n)] for j in (0, stop))
    return [*before, slice(n, stop), *after]


def shifted(part: slice, by: int) -> slice:
    """Return the slice that begins and ends so much later."""
    return slice(part.start + by, part.stop + by)
