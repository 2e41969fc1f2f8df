"""A quantized network in integer arithmetic: its steps, and their exact simulation.

The steps are what an integer engine runs, with one definition of everything that engines could do
in another way (all in float32, rounding half to even):

- an input becomes round(x / scale) + zero_point, clamped to its codes;
- a layer sums products of integers and its int32 bias without error. Where a quantizer follows, the
  sum times scale_x·scale_w / scale_y is rounded and clamped once: a ReLU is that clamp. Where none
  follows (logits), the result is the sum times scale_x·scale_w;
- a layer of two weights adds its two sums, each times its scale; the result is divided by scale_y;
- global average pooling rounds the sum of codes times scale_x / (scale_y·H·W).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import NetworkError
from engine.integer_layers import Grid, IntegerLayer, WeightCodes
from engine.network_graph import Call, NetworkGraph

EXACT_IN_FLOAT32 = 2**24  # integers up to this are sums without rounding


@dataclass
class Step:
    """One step: it makes the value `name` from the value `source`.

    `in_grid` and `out_grid` are those of codes; None: the value is in float32.
    """

    name: str
    source: str
    in_grid: Grid | None = None
    out_grid: Grid | None = None


@dataclass
class Quantize(Step):
    """Float to codes."""

    def run(self, x: Tensor) -> Tensor:
        """Map floats to codes, in float32."""
        return _round_to_codes(x, self.out_grid)


@dataclass
class Layer(Step):
    """A convolution or linear layer, with the ReLU after it if `relu`.

    `integers` is None in a float network.
    """

    module: nn.Conv2d | nn.Linear = None
    integers: IntegerLayer | None = None
    relu: bool = False

    def run(self, x: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        first, *others = self.integers.parts
        total = self._product(x, first).to(torch.int32)
        total = (total + self._column(self.integers.bias, total)).float()
        scale = self.integers.product_scale(first)
        if not others and self.out_grid:
            scale = self._column(scale / self.out_grid.scale, total)
            return _to_codes(total * scale, self.out_grid, self.relu)
        y = total * self._column(scale, total)
        for part in others:
            scale = self._column(self.integers.product_scale(part), y)
            y = y + self._product(x, part).to(torch.int32).float() * scale
        y = y.relu() if self.relu else y
        return _round_to_codes(y, self.out_grid) if self.out_grid else y

    def _product(self, x: Tensor, part: WeightCodes) -> Tensor:
        """Return the sum of products of integers, exact."""
        most = part.codes.float().abs().flatten(1).sum(1).max() * self.in_grid.max_abs
        is_exact = most < EXACT_IN_FLOAT32 and x.device.type == "cpu"
        dtype = torch.float32 if is_exact else torch.float64
        x = (x - self.in_grid.zero_point if self.in_grid.zero_point else x).to(dtype)
        w = part.codes.to(x.device, dtype)
        if isinstance(self.module, nn.Linear):
            return F.linear(x, w).round()
        m = self.module
        return F.conv2d(x, w, None, m.stride, m.padding, m.dilation, m.groups).round()

    @staticmethod
    def _column(values: Tensor, like: Tensor) -> Tensor:
        """View a value for each output channel so that it broadcasts over `like`."""
        return values.to(like.device).view(-1, *[1] * (like.dim() - 2))


@dataclass
class GlobalPool(Step):
    """The mean over all pixels."""

    def run(self, x: Tensor) -> Tensor:
        """Map codes (B, C, H, W) to codes or floats (B, C, 1, 1)."""
        n_pixels = x.shape[2] * x.shape[3]
        total = x.sum(dim=(2, 3), keepdim=True) - n_pixels * self.in_grid.zero_point
        scale = torch.tensor(self.in_grid.scale, device=x.device)
        if self.out_grid is None:
            return total * (scale / n_pixels)
        return _to_codes(total * (scale / (self.out_grid.scale * n_pixels)), self.out_grid)


@dataclass
class Reorder(Step):
    """A step that only moves or selects values, codes or floats: `kind` is that of its call."""

    kind: str = ""
    module: nn.Module | None = None

    def run(self, x: Tensor) -> Tensor:
        """Apply the step."""
        return x.flatten(1) if self.kind == "flatten" else self.module(x)


@dataclass
class Relu(Step):
    """A ReLU that is not part of a layer."""

    def run(self, x: Tensor) -> Tensor:
        """Map floats to floats or codes."""
        return _round_to_codes(x.relu(), self.out_grid) if self.out_grid else x.relu()


def _round_to_codes(x: Tensor, grid: Grid) -> Tensor:
    """Round x to codes; divided by a tensor, as accelerators multiply by a number's reciprocal."""
    return _to_codes(x / torch.tensor(grid.scale, device=x.device), grid)


def _to_codes(x: Tensor, grid: Grid, relu: bool = False) -> Tensor:
    """Round x, in units of the grid's scale, to codes; negative ones to 0 if `relu`."""
    low = 0 if relu else -grid.zero_point
    return x.round().clamp_(low, grid.max_code - grid.zero_point).add_(grid.zero_point)


# --- from calls to steps ---------------------------------------------------------------------


class IntegerNetwork(nn.Module):
    """The steps of a network; calling it simulates the engine exactly.

    Attributes:
        steps: in the order in which they run.
        output: name of the value that is the logits.
    """

    def __init__(self, steps: list[Step], output: str) -> None:
        """Keep the steps."""
        super().__init__()
        self.steps, self.output = steps, output

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map normalized images x (B, 3, H, W) to logits; no activations are returned."""
        values, last_reader = {"input": x}, {step.source: step for step in self.steps}
        for step in self.steps:
            source = values[step.source]
            if last_reader[step.source] is step:  # a batch's values of all layers are gigabytes
                del values[step.source]
            values[step.name] = step.run(source)
        return values[self.output], []

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Return all values by name; codes are in float32."""
        values = {"input": x}
        for step in self.steps:
            values[step.name] = step.run(values[step.source])
        return values

    def layers(self) -> list[Layer]:
        """Return the steps that have weights."""
        return [step for step in self.steps if isinstance(step, Layer)]

    def integers(self) -> dict[str, IntegerLayer]:
        """Return the integers of every layer by name."""
        return {layer.name: layer.integers for layer in self.layers()}


def build(
    graph: NetworkGraph, grids: Mapping[str, Grid], integers: Mapping[str, IntegerLayer]
) -> IntegerNetwork:
    """Return the steps of the graph; `grids` are those of the inputs of modules, by name.

    Without grids and integers they are a float network's. Raises NetworkError, with its name, for
    a call that has no step, and for a value that is needed both as codes and in another way.
    """
    builder = _Builder(graph, grids, integers)
    for call in graph.calls:
        if call.kind not in STEPS:
            raise NetworkError(
                f"--export: {_caller(call)} calls {call.kind}, which is not supported: there are "
                f"{', '.join(STEPS)}"
            )
        STEPS[call.kind](builder, call)
    if unused := grids.keys() - builder.used_grids:
        raise NetworkError(f"--export: no step quantizes {', '.join(sorted(unused))}")
    network = IntegerNetwork(builder.steps, builder.names[graph.output])
    _check_steps(network, builder.makers)
    return network


def _check_steps(network: IntegerNetwork, makers: Mapping[str, Step]) -> None:
    """Raise NetworkError where a value is needed in two ways, or a layer's sum stays in float."""
    for step in network.steps:
        maker = makers.get(step.source)
        if step.in_grid != (maker.out_grid if maker else None):
            raise NetworkError(
                f"--export: {step.name}: its input is quantized for another layer in another way"
            )
    for layer in network.layers():
        if layer.integers and not layer.out_grid and layer.name != network.output:
            raise NetworkError(
                f"--export: {layer.name}: what reads its output does not quantize it"
            )


def _caller(call: Call) -> str:
    """Return what to call the module of a call."""
    return call.name or "the network"


class _Builder:
    """The steps so far."""

    def __init__(
        self, graph: NetworkGraph, grids: Mapping[str, Grid], integers: Mapping[str, IntegerLayer]
    ) -> None:
        self.grids, self.integers = grids, integers
        self.n_readers = Counter(i for call in graph.calls for i in call.inputs)
        self.used_grids: set[str] = set()  # by name
        self.steps: list[Step] = []
        self.names = {0: "input"}  # of values
        self.makers: dict[str, Step] = {}  # by name of what they make

    def add(self, step: Step, call: Call | None = None) -> None:
        """Add a step, of a call."""
        self.steps.append(step)
        self.makers[step.name] = step
        if call:
            self.names[call.output] = step.name

    def name_step(self, call: Call) -> str:
        """Return a name for what the call makes: the module's, or one that no other has."""
        is_new = call.module is not None and call.name not in self.makers
        return call.name if is_new else f"{call.name}/{call.kind}{call.output}".lstrip("/")

    def readers_of(self, name: str) -> int:
        """Return how many calls read any of the values that have this name."""
        return max(self.n_readers[value] for value, of in self.names.items() if of == name)

    def source(self, call: Call) -> tuple[str, Grid | None]:
        """Return the call's input and its grid: codes where the module has one."""
        name = self.names[call.inputs[0]]
        grid = self.grids.get(call.name) if call.module is not None else None
        if grid is None:
            return name, None
        self.used_grids.add(call.name)
        return self.as_codes(name, grid), grid

    def as_codes(self, name: str, grid: Grid) -> str:
        """Have the value made as codes and return the codes' name; `build` checks for conflicts."""
        step = self.makers.get(name)
        if step is None:  # the network's input
            name = f"{name}_codes"
            if name not in self.makers:
                self.add(Quantize(name, "input", None, grid))
        elif step.out_grid is None:
            step.out_grid = grid
            if isinstance(step, Reorder):  # the same of codes as of what they stand for
                step.source, step.in_grid = self.as_codes(step.source, grid), grid
        return name


def _add_layer(builder: _Builder, call: Call) -> None:
    """Add a convolution or linear layer."""
    if isinstance(call.module, nn.Conv2d) and (
        call.module.padding_mode != "zeros" or isinstance(call.module.padding, str)
    ):
        raise NetworkError(f"--export: {call.name}: only padding by a number of zeros is supported")
    source, grid = builder.source(call)
    integers = builder.integers.get(call.name)
    name = builder.name_step(call)
    builder.add(Layer(name, source, grid, None, call.module, integers), call)


def _add_relu(builder: _Builder, call: Call) -> None:
    """Make the ReLU part of the layer before it, where nothing else reads what is between them."""
    name, layer = builder.names[call.inputs[0]], builder.makers.get(builder.names[call.inputs[0]])
    is_alone = builder.n_readers[call.inputs[0]] == 1
    while isinstance(layer, Reorder) and is_alone:  # max-pooling and ReLU: in either order the same
        is_alone = builder.readers_of(layer.source) == 1
        layer = builder.makers.get(layer.source)
    if isinstance(layer, Layer) and is_alone:
        layer.relu = True
        builder.names[call.output] = name
    else:
        builder.add(Relu(builder.name_step(call), name), call)


def _add_global_pool(builder: _Builder, call: Call) -> None:
    """Add average pooling to one pixel."""
    size = call.module.output_size if call.module is not None else call.arguments[0]
    if size not in (1, (1, 1)):
        raise NetworkError(f"--export: {_caller(call)}: only pooling to one pixel is supported")
    source, grid = builder.source(call)
    builder.add(GlobalPool(builder.name_step(call), source, grid), call)


def _add_reorder(builder: _Builder, call: Call) -> None:
    """Add a step that commutes with rounding."""
    if call.kind == "flatten" and (call.arguments or (1,)) != (1,):
        raise NetworkError(f"--export: {_caller(call)}: only flatten(1) is supported")
    name = builder.names[call.inputs[0]]
    builder.add(Reorder(builder.name_step(call), name, kind=call.kind, module=call.module), call)


def _add_nothing(builder: _Builder, call: Call) -> None:
    """Give the output the name of the input."""
    builder.names[call.output] = builder.names[call.inputs[0]]


STEPS: dict[str, Callable[[_Builder, Call], None]] = {
    "conv": _add_layer,
    "linear": _add_layer,
    "relu": _add_relu,
    "global_pool": _add_global_pool,
    "max_pool": _add_reorder,
    "flatten": _add_reorder,
    "identity": _add_nothing,
}
