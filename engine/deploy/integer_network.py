"""A quantized network in integers: from the calls of a network to steps, which simulate an engine.

What the steps compute is defined in engine/deploy/integer_operations.py.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from engine.deploy.integer_layers import Grid, IntegerLayer
from engine.deploy.integer_operations import (
    RELU,
    RELU6,
    Arithmetic,
    Flatten,
    GlobalPool,
    Layer,
    MaxPool,
    Pad,
    Quantize,
    Rectify,
    Reorder,
    Slice,
    Step,
    Sum,
)
from engine.networks.graph import Call, NetworkGraph
from engine.system.errors import NetworkError


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
            _run(step, values)
            for name, _ in step.inputs():
                if last_reader[name] is step:  # a batch's values of all layers are gigabytes
                    values.pop(name, None)
        return values[self.output], []

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Return all values by name; codes are in float32."""
        values = {"input": x}
        for step in self.steps:
            _run(step, values)
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


def _run(step: Step, values: dict[str, Tensor]) -> None:
    """Add the step's result to the values so far, by name."""
    values[step.name] = step.run(*(values[name] for name, _ in step.inputs()))


def _check_steps(network: IntegerNetwork, makers: Mapping[str, Step]) -> None:
    """Raise NetworkError where a value is needed in two ways, or a result stays in float."""
    for step in network.steps:
        for name, grid in step.inputs():
            maker = makers.get(name)
            if grid != (maker.out_grid if maker else None):
                raise NetworkError(
                    f"--export: {step.name}: its input is quantized for another layer in another "
                    "way, as with --keep_first_last"
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
    if a == b:
        raise NetworkError(
            f"--export: {_caller(call)}: a sum of a tensor and itself is not supported"
        )
    name = builder.name_step(call)
    builder.add(Sum(name, a, a_grid, other=b, other_grid=b_grid), call)


def _add_relu(builder: _Builder, call: Call) -> None:
    """Make the ReLU part of the step before it, where nothing else reads what is between them."""
    low, high = RECTIFIERS[call.kind]
    name = builder.names[call.inputs[0]]
    step, is_alone = builder.makers.get(name), builder.readers_of(name) == 1
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
