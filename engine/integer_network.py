"""A quantized network in integer arithmetic: its steps, and their exact simulation.

The steps are what an integer engine runs, with one definition of everything that engines could do
in another way (all in float32, rounding half to even):

- an input becomes round(x / scale) + zero_point, clamped to its codes;
- a layer sums products of integers and its int32 bias without error. Where a quantizer follows, the
  sum times scale_x·scale_w / scale_y is rounded and clamped once: a ReLU is that clamp. Where none
  follows (logits), the result is the sum times scale_x·scale_w;
- a layer of two weights adds its two sums, each times its scale; the result is divided by scale_y;
- a ReLU6 is a ReLU and the clamp to the code of 6;
- global average pooling rounds the sum of codes times scale_x / (scale_y·H·W);
- a residual sum of codes a and b is r_a·a + (r_b·b + c), rounded and clamped once, with r_a =
  scale_a / scale_y, r_b alike and c = zero_y − (r_a·zero_a + r_b·zero_b). A product is not rounded
  before it is added: these are fused multiply-adds;
- what moves or selects values does it with codes; padding is the code of 0.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import NetworkError
from engine.integer_layers import Grid, IntegerLayer, WeightCodes
from engine.network_graph import Call, NetworkGraph

EXACT_IN_FLOAT32 = 2**24  # integers up to this are sums without rounding
UNBOUNDED, RELU, RELU6 = (-inf, inf), (0.0, inf), (0.0, 6.0)  # least and largest value


@dataclass
class Step:
    """One step: it makes the value `name` from the value `source`.

    `in_grid` and `out_grid` are those of codes; None: the value is in float32.
    """

    name: str
    source: str
    in_grid: Grid | None = None
    out_grid: Grid | None = None

    def inputs(self) -> list[tuple[str, Grid | None]]:
        """Return the names and grids of what `run` takes, in order."""
        return [(self.source, self.in_grid)]


@dataclass
class Quantize(Step):
    """Float to codes."""

    def run(self, x: Tensor) -> Tensor:
        """Map floats to codes, in float32."""
        return _round_to_codes(x, self.out_grid)


@dataclass
class Arithmetic(Step):
    """A step that computes and then rounds once.

    `bounds` are those of the ReLU or ReLU6 that is part of it.
    """

    bounds: tuple[float, float] = UNBOUNDED


@dataclass
class Layer(Arithmetic):
    """A convolution or linear layer; `integers` is None in a float network."""

    module: nn.Conv2d | nn.Linear = None
    integers: IntegerLayer | None = None

    def run(self, x: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        first, *others = self.integers.parts
        total = self._product(x, first).to(torch.int32)
        total = (total + self._column(self.integers.bias, total)).float()
        scale = self.integers.product_scale(first)
        if not others and self.out_grid:
            scale = self._column(scale / self.out_grid.scale, total)
            return _to_codes(total * scale, self.out_grid, self.bounds)
        y = total * self._column(scale, total)
        for part in others:
            scale = self._column(self.integers.product_scale(part), y)
            y = y + self._product(x, part).to(torch.int32).float() * scale
        return _finish(y, self.out_grid, self.bounds)

    def trial_codes(self, generator: torch.Generator) -> list[Tensor]:
        """Return inputs, uint8, whose sums are large: all of the largest code, and half of them."""
        m = self.module
        shape = (m.in_features,) if isinstance(m, nn.Linear) else (m.in_channels, 6, 6)
        codes = torch.randint(0, 2, (4, *shape), generator=generator)
        codes[0] = 1
        return [(codes * self.in_grid.max_code).to(torch.uint8)]

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
class Sum(Arithmetic):
    """The sum of the values `source` and `other`, of one shape: of codes, or both of floats."""

    other: str = ""
    other_grid: Grid | None = None

    def inputs(self) -> list[tuple[str, Grid | None]]:
        """Return the names and grids of both operands."""
        return [(self.source, self.in_grid), (self.other, self.other_grid)]

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        """Map codes, in float32, to codes or floats."""
        if self.out_grid is None:
            y = self.in_grid.dequantize(a) + self.other_grid.dequantize(b)
            return y.clamp(*self.bounds)
        (r_a, zero_a), (r_b, zero_b) = (
            (torch.tensor(grid.scale) / self.out_grid.scale, grid.zero_point)
            for _, grid in self.inputs()
        )
        c = self.out_grid.zero_point - (r_a * zero_a + r_b * zero_b)
        y = _multiply_add(a, r_a, _multiply_add(b, r_b, c))
        low, high = self.out_grid.code_range(self.bounds)
        return y.round().clamp_(low, high)

    def trial_codes(self, generator: torch.Generator) -> list[Tensor]:
        """Return inputs, uint8, at random."""
        return [
            torch.randint(0, grid.max_code + 1, (4, 16, 6, 6), generator=generator).to(torch.uint8)
            for _, grid in self.inputs()
        ]


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
class Rectify(Step):
    """A ReLU or ReLU6 that is not part of another step."""

    bounds: tuple[float, float] = UNBOUNDED

    def run(self, x: Tensor) -> Tensor:
        """Map floats to floats or codes."""
        return _finish(x, self.out_grid, self.bounds)


@dataclass
class Reorder(Step):
    """A step that only moves or selects values, codes or floats, or adds zeros."""


@dataclass
class MaxPool(Reorder):
    """Max-pooling."""

    module: nn.MaxPool2d = None

    def run(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        return self.module(x)


@dataclass
class Flatten(Reorder):
    """One dimension in place of channels and pixels."""

    def run(self, x: Tensor) -> Tensor:
        """Map (B, …) to (B, n)."""
        return x.flatten(1)


@dataclass
class Slice(Reorder):
    """Every n-th element of each dimension; `index` is that of Python."""

    index: tuple[slice, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Return the elements."""
        return x[self.index]


@dataclass
class Pad(Reorder):
    """Zeros around the values; `widths` are those of `F.pad`."""

    widths: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """Return the values with zeros around them."""
        return F.pad(x, self.widths, value=self.out_grid.zero_point if self.out_grid else 0)


def _multiply_add(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """Return x·factor + summand, rounded to float32 once: in float64 a product is exact."""
    return x.double().mul_(factor).add_(summand).float()


def _finish(y: Tensor, grid: Grid | None, bounds: tuple[float, float]) -> Tensor:
    """Return floats within the bounds; as codes where there is a grid."""
    return _round_to_codes(y, grid, bounds) if grid else y.clamp(*bounds)


def _round_to_codes(x: Tensor, grid: Grid, bounds: tuple[float, float] = UNBOUNDED) -> Tensor:
    """Round x to codes; divided by a tensor, as accelerators multiply by a number's reciprocal."""
    return _to_codes(x / torch.tensor(grid.scale, device=x.device), grid, bounds)


def _to_codes(x: Tensor, grid: Grid, bounds: tuple[float, float] = UNBOUNDED) -> Tensor:
    """Round x, in units of the grid's scale, to codes of values within the bounds."""
    low, high = grid.code_range(bounds)
    zero_point = grid.zero_point
    return x.round().clamp_(low - zero_point, high - zero_point).add_(zero_point)


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
        values = {"input": x}
        last_reader = {name: step for step in self.steps for name, _ in step.inputs()}
        for step in self.steps:
            values[step.name] = step.run(*(values[name] for name, _ in step.inputs()))
            for name, _ in step.inputs():
                if last_reader[name] is step:  # a batch's values of all layers are gigabytes
                    values.pop(name, None)
        return values[self.output], []

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Return all values by name; codes are in float32."""
        values = {"input": x}
        for step in self.steps:
            values[step.name] = step.run(*(values[name] for name, _ in step.inputs()))
        return values

    def layers(self) -> list[Layer]:
        """Return the steps that have weights."""
        return [step for step in self.steps if isinstance(step, Layer)]

    def arithmetic(self) -> list[Arithmetic]:
        """Return the steps that compute and round."""
        return [step for step in self.steps if isinstance(step, Arithmetic)]

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
    """Raise NetworkError where a value is needed in two ways, or a result stays in float."""
    for step in network.steps:
        for name, grid in step.inputs():
            maker = makers.get(name)
            if grid != (maker.out_grid if maker else None):
                raise NetworkError(
                    f"--export: {step.name}: its input is quantized for another layer in another "
                    "way"
                )
    for step in network.arithmetic():
        if step.in_grid and not step.out_grid and step.name != network.output:
            raise NetworkError(f"--export: {step.name}: what reads its output does not quantize it")


def shared_ranges(
    graph: NetworkGraph, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Return the ranges, by name, with one for all inputs that are, or are part of, one tensor.

    It holds all of theirs: an engine keeps a tensor on one grid, whoever reads it.
    """
    origin: dict[int, int] = {}  # of what reorders a value: that value
    readers: dict[int, list[str]] = defaultdict(list)
    for call in graph.calls:
        for value, name in zip(call.inputs, call.input_names, strict=False):
            if name in ranges:
                readers[origin.get(value, value)].append(name)
        if call.kind in REORDERS:
            origin[call.output] = origin.get(call.inputs[0], call.inputs[0])
    shared = dict(ranges)
    for names in readers.values():
        low, high = zip(*(ranges[name] for name in names), strict=True)
        shared |= dict.fromkeys(names, (min(low), max(high)))
    return shared


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

    def sources(self, call: Call) -> list[tuple[str, Grid | None]]:
        """Return the call's inputs and their grids: codes where there is a grid for them."""
        sources = []
        for value, input_name in zip(call.inputs, call.input_names, strict=False):
            name, grid = self.names[value], self.grids.get(input_name)
            if grid:
                self.used_grids.add(input_name)
                name = self.as_codes(name, grid)
            sources.append((name, grid))
        return sources

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
    if isinstance(call.module, nn.Conv2d) and call.module.padding_mode != "zeros":
        raise NetworkError(f"--export: {call.name}: only padding by zeros is supported")
    [(source, grid)] = builder.sources(call)
    integers = builder.integers.get(call.name)
    name = builder.name_step(call)
    builder.add(Layer(name, source, grid, module=call.module, integers=integers), call)


def _add_sum(builder: _Builder, call: Call) -> None:
    """Add a residual sum."""
    sources = builder.sources(call)
    if len(sources) != 2 or call.arguments:  # such as alpha
        raise NetworkError(f"--export: {_caller(call)}: only sums of two tensors are supported")
    (a, a_grid), (b, b_grid) = sources
    if builder.grids and None in (a_grid, b_grid):
        raise NetworkError(
            f"--export: {_caller(call)}: the sum would stay in float: --quantize_sums is needed"
        )
    name = builder.name_step(call)
    builder.add(Sum(name, a, a_grid, other=b, other_grid=b_grid), call)


def _add_relu(builder: _Builder, call: Call) -> None:
    """Make the ReLU part of the step before it, where nothing else reads what is between them."""
    low, high = RECTIFIERS[call.kind]
    name = builder.names[call.inputs[0]]
    step, is_alone = builder.makers.get(name), builder.n_readers[call.inputs[0]] == 1
    while isinstance(step, Reorder) and is_alone:  # max-pooling and ReLU: in either order the same
        is_alone = builder.readers_of(step.source) == 1
        step = builder.makers.get(step.source)
    if isinstance(step, Arithmetic) and is_alone:
        step.bounds = max(low, step.bounds[0]), min(high, step.bounds[1])
        builder.names[call.output] = name
    else:
        builder.add(Rectify(builder.name_step(call), name, bounds=(low, high)), call)


def _add_global_pool(builder: _Builder, call: Call) -> None:
    """Add average pooling to one pixel; to as many pixels as there are, it changes nothing."""
    size = call.module.output_size if call.module is not None else call.arguments[0]
    size = size if isinstance(size, tuple) else (size, size)
    [(source, grid)] = builder.sources(call)
    if size == call.in_shape[1:]:
        builder.names[call.output] = source
    elif size == (1, 1):
        builder.add(GlobalPool(builder.name_step(call), source, grid), call)
    else:
        raise NetworkError(f"--export: {_caller(call)}: only pooling to one pixel is supported")


def _add_max_pool(builder: _Builder, call: Call) -> None:
    """Add max-pooling."""
    name = builder.names[call.inputs[0]]
    builder.add(MaxPool(builder.name_step(call), name, module=call.module), call)


def _add_flatten(builder: _Builder, call: Call) -> None:
    """Add flattening of all dimensions but the batch."""
    if (call.arguments or (1,)) != (1,):
        raise NetworkError(f"--export: {_caller(call)}: only flatten(1) is supported")
    builder.add(Flatten(builder.name_step(call), builder.names[call.inputs[0]]), call)


def _add_slice(builder: _Builder, call: Call) -> None:
    """Add every n-th element."""
    [index] = call.arguments
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) and i.start is None and i.stop is None for i in index):
        raise NetworkError(
            f"--export: {_caller(call)}: only slices such as x[:, :, ::2] are supported"
        )
    builder.add(Slice(builder.name_step(call), builder.names[call.inputs[0]], index=index), call)


def _add_pad(builder: _Builder, call: Call) -> None:
    """Add zeros."""
    widths, mode, value = (*call.arguments, "constant", None)[:3]
    if mode != "constant" or value or min(widths) < 0:
        raise NetworkError(f"--export: {_caller(call)}: only padding by zeros is supported")
    name = builder.names[call.inputs[0]]
    builder.add(Pad(builder.name_step(call), name, widths=tuple(widths)), call)


def _add_nothing(builder: _Builder, call: Call) -> None:
    """Give the output the name of the input."""
    builder.names[call.output] = builder.names[call.inputs[0]]


STEPS: dict[str, Callable[[_Builder, Call], None]] = {
    "conv": _add_layer,
    "linear": _add_layer,
    "relu": _add_relu,
    "relu6": _add_relu,
    "add": _add_sum,
    "global_pool": _add_global_pool,
    "max_pool": _add_max_pool,
    "flatten": _add_flatten,
    "slice": _add_slice,
    "pad": _add_pad,
    "identity": _add_nothing,
}
RECTIFIERS = {"relu": RELU, "relu6": RELU6}  # bounds of calls of that kind
REORDERS = {"max_pool", "flatten", "slice", "pad", "identity"}  # kinds that keep values
