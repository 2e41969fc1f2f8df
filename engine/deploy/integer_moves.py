"""Operations that only move or select values, or add zeros: codes of one grid, or floats."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.deploy.integer_operations import IntegerOperation
from engine.deploy.onnx_emitter import Emitter


@dataclass
class Move(IntegerOperation):
    """An operation whose result is on the grid of its sources."""

    def emit_node(self, onnx: Emitter, op: str, *constants: str, **attributes: object) -> None:
        """Add an operator that gives codes where it takes codes, and floats where it takes them."""
        onnx.node(op, [*self.sources, *constants], self.name, **attributes)
        if self.out_grid:
            onnx.grids[self.name] = self.out_grid


@dataclass
class MaxPool(Move):
    """Max-pooling: `pool` is PyTorch's function of (x, kernel, stride, padding, dilation, ceil).

    `pads` are the widths before all dimensions, then those after them, with what `ceil` adds.
    """

    pool: Callable[..., Tensor] = F.max_pool2d
    geometry: tuple = ()
    pads: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        return self.pool(x, *self.geometry)

    def emit(self, onnx: Emitter) -> None:
        """Add a MaxPool."""
        kernel, stride, _, dilation = self.geometry[:4]
        options = {"strides": stride, "pads": self.pads, "dilations": dilation}
        self.emit_node(onnx, "MaxPool", kernel_shape=kernel, **options)


@dataclass
class Reshape(Move):
    """Other dimensions, `shape`, after the batch."""

    shape: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Map (B, …) to (B, *shape)."""
        return x.reshape(len(x), *self.shape)

    def emit(self, onnx: Emitter) -> None:
        """Add a Flatten or Reshape; 0 stands for the batch."""
        if len(self.shape) == 1:
            self.emit_node(onnx, "Flatten", axis=1)
        else:
            shape = np.array([0, *self.shape], dtype=np.int64)
            self.emit_node(onnx, "Reshape", onnx.constant(f"{self.name}.shape", shape))


@dataclass
class Transpose(Move):
    """The dimensions in another order."""

    order: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Return the values with their dimensions in that order."""
        return x.permute(self.order)

    def emit(self, onnx: Emitter) -> None:
        """Add a Transpose."""
        self.emit_node(onnx, "Transpose", perm=list(self.order))


@dataclass
class Slice(Move):
    """Every `stride`-th element of one dimension, from `start` and before `stop`."""

    dim: int = 1
    start: int = 0
    stop: int = 0
    stride: int = 1

    def run(self, x: Tensor) -> Tensor:
        """Return the elements."""
        return x[(slice(None),) * self.dim + (slice(self.start, self.stop, self.stride),)]

    def emit(self, onnx: Emitter) -> None:
        """Add a Slice."""
        values = {"starts": self.start, "ends": self.stop, "axes": self.dim, "steps": self.stride}
        names = [
            onnx.constant(f"{self.name}.{key}", np.array([value], dtype=np.int64))
            for key, value in values.items()
        ]
        self.emit_node(onnx, "Slice", *names)


@dataclass
class Pad(Move):
    """Zeros around values of `rank` dimensions; `widths` are those of `F.pad`."""

    rank: int = 4
    widths: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Return the values with zeros around them."""
        return F.pad(x, self.widths, value=self.out_grid.zero_point if self.out_grid else 0)

    def emit(self, onnx: Emitter) -> None:
        """Add a Pad: its widths are those before all dimensions, then those after them."""
        widths = np.zeros((self.rank, 2), dtype=np.int64)
        pairs = np.array(self.widths).reshape(-1, 2)[::-1]  # PyTorch begins with the last dimension
        widths[self.rank - len(pairs) :] = pairs
        zero = np.uint8(self.out_grid.zero_point) if self.out_grid else np.float32(0)
        names = [
            onnx.constant(f"{self.name}.widths", widths.T.flatten()),
            onnx.constant(f"{self.name}.zero", zero),
        ]
        self.emit_node(onnx, "Pad", *names)


@dataclass
class Concat(Move):
    """Values side by side in one dimension."""

    dim: int = 1

    def run(self, *values: Tensor) -> Tensor:
        """Return the values side by side."""
        return torch.cat(values, self.dim)

    def emit(self, onnx: Emitter) -> None:
        """Add a Concat."""
        self.emit_node(onnx, "Concat", axis=self.dim)
