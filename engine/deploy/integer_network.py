"""A quantized network in integers: from an exported graph to operations, which simulate an engine.

What the operations compute is defined in engine/deploy/integer_operations.py.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import count

from torch import Tensor, fx, nn

from engine.deploy import integer_operations as integer
from engine.deploy.integer_layers import IntegerLayer, make_integer_layer
from engine.deploy.onnx_emitter import UNBOUNDED, Bounds
from engine.deploy.supported import NONE, OPERATIONS, check_supported, name_of, operands, refuse
from engine.networks.graph import Operation
from engine.quantization.equalization import NO_VALUES
from engine.quantization.grids import Grid, OnGrid
from engine.system.errors import NetworkError

RESERVED = ("images", "pixels", "scaled", "input", "input_codes", "logits")  # of ONNX models


class IntegerNetwork(nn.Module):
    """The operations of a network; calling it simulates the engine exactly.

    Attributes:
        operations: in the order in which they run.
        output: name of the value that is the logits.
        values_of: by name, those nodes of the graph whose values exist here, with the name and the
            grid that they have.
    """

    def __init__(
        self,
        operations: list[integer.IntegerOperation],
        output: str,
        values_of: Mapping[str, tuple[str, Grid | None]] = NONE,
    ) -> None:
        super().__init__()
        self.operations, self.output, self.values_of = operations, output, values_of

    @classmethod
    def from_graph(
        cls,
        graph: fx.GraphModule,
        grids: Mapping[str, Grid] = NONE,
        parts: Mapping[str, tuple[OnGrid, ...] | None] = NONE,
    ) -> "IntegerNetwork":
        """Return the network of a folded graph, with biases on the int32 grid.

        `grids` are those of the inputs of operations, by name, and `parts` those whose sum is a
        layer's weight, by the layer's name. Without both, the network is in float, for ONNX only.
        Raises NetworkError, in one line that names it, for an operation that has no integer form,
        and for a value that is needed on two grids; ValueError, naming the layer, where a quantized
        weight has no integers of 8 bits.
        """
        return _Builder(graph, grids, parts).network()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map normalized images x (B, 3, H, W) to logits; no activations are returned."""
        return self.values(x, keep_all=False)[self.output], []

    def values(self, x: Tensor, keep_all: bool = True) -> dict[str, Tensor]:
        """Return all values by name, or those that nothing reads; codes are in float32."""
        values = {"input": x}
        last_reader = {name: each for each in self.operations for name in each.sources}
        for each in self.operations:
            values[each.name] = each.run(*(values[name] for name in each.sources))
            for name in () if keep_all else each.sources:
                if last_reader[name] is each:  # a batch's values of all layers are gigabytes
                    values.pop(name, None)
        return values

    def integers(self) -> dict[str, IntegerLayer]:
        """Return the integers of every layer by name."""
        layers = [each for each in self.operations if isinstance(each, integer.Layer)]
        return {each.layer: each.integers for each in layers if each.layer}


class Values:
    """The values of a graph, and which of them an engine keeps on one grid.

    Attributes:
        nodes: whose values are tensors computed from images, in the order in which they run.
        stages: the integer operations of each node; a ReLU that is part of others has none.
        tensor: by node, the one that stands for all whose values are on its grid.
        bounds: of the ReLUs that are part of an operation, by its node.
        unrectified: the nodes whose own value does not exist, as a ReLU is applied before.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        """Read the graph; NetworkError where an operation has no integer form."""
        self.output: fx.Node = next(iter(reversed(graph.graph.nodes))).args[0]
        [self.images] = graph.graph.find_nodes(op="placeholder")
        self.nodes = [
            node
            for node in graph.graph.nodes
            if node.op == "call_function" and node.target not in NO_VALUES
        ]
        check_supported(self.nodes)
        self.stages: dict[fx.Node, list] = {}
        self.tensor = {self.images: self.images}
        self.bounds: dict[fx.Node, Bounds] = {}
        self.unrectified: set[fx.Node] = set()
        for node in self.nodes:
            self._add(node)

    def inputs(self) -> list[tuple[Operation, str, fx.Node]]:
        """Return each operation with the name of an input, and the tensor that this is."""
        named = [Operation(node) for node in self.nodes if "name" in node.meta]
        return [
            (each, name, self.tensor[each.source(name)]) for each in named for name in each.inputs
        ]

    def _add(self, node: fx.Node) -> None:
        stages = OPERATIONS[node.target](node)
        if stages and stages[0][0] is integer.Rescale and self._join(node, stages[0][1]["bounds"]):
            stages = []
        self.stages[node] = stages
        self.tensor[node] = node
        if all(issubclass(kind, integer.Move) for kind, _ in stages):
            joined = {self.tensor[source] for source in operands(node)} | {node}
            first, *_ = (each for each in self.tensor if each in joined)
            self.tensor |= {k: first for k, each in self.tensor.items() if each in joined}

    def _join(self, node: fx.Node, bounds: Bounds) -> bool:
        """Make a ReLU part of the operations whose values it alone reads, or tell that it is not.

        Values may be moved between: max-pooling and ReLU are the same in either order.
        """
        passed: set[fx.Node] = set()
        makers = self._makers(node.args[0], passed, bounds[0] <= 0 <= bounds[1])
        joined = {}
        for maker in makers:
            own = self.stages[maker][0][1].get("bounds", UNBOUNDED)
            low, high = self.bounds.get(maker, own)
            joined[maker] = max(low, bounds[0]), min(high, bounds[1])
        if not makers or any(low > high for low, high in joined.values()):
            return False
        self.bounds |= joined
        self.unrectified |= passed
        return True

    def _makers(self, node: fx.Node, passed: set[fx.Node], has_zero: bool) -> list[fx.Node]:
        """Return what computes the value; none where others read it, too.

        `passed` gains these and what moves their values; `has_zero`: the ReLU keeps zeros.
        """
        readers = [user for user in node.users if user.target not in NO_VALUES]
        if len(readers) != 1 or node not in self.stages:
            return []
        passed.add(node)
        kinds = [kind for kind, _ in self.stages[node]]
        if kinds and issubclass(kinds[0], integer.Arithmetic):
            return [node]
        makers = [self._makers(source, passed, has_zero) for source in operands(node)]
        return sum(makers, []) if all(makers) and (has_zero or integer.Pad not in kinds) else []


class _Builder(Values):
    """From the values of a graph to operations."""

    def __init__(self, graph: fx.GraphModule, grids: Mapping[str, Grid], parts: Mapping) -> None:
        super().__init__(graph)
        self.parts, self.is_float = parts, not grids
        self.operations: list[integer.IntegerOperation] = []
        self.names = {self.images: "input"}
        self.taken = set(RESERVED)
        grid_of = self._grids_of_tensors(grids)
        self.grids = {node: grid_of.get(tensor) for node, tensor in self.tensor.items()}

    def _grids_of_tensors(self, grids: Mapping[str, Grid]) -> dict[fx.Node, Grid]:
        """Return the grid of each tensor that is quantized, by the node that stands for it."""
        inputs = self.inputs()
        if unused := grids.keys() - {name for _, name, _ in inputs}:
            raise NetworkError(f"--export: no operation quantizes {', '.join(sorted(unused))}")
        grid_of = {tensor: grids[name] for _, name, tensor in reversed(inputs) if name in grids}
        for each, name, tensor in inputs:
            if each.kind == "add" and grids and name not in grids:
                raise refuse(each.node, "the sum would stay in float: --quantize_sums is needed")
            is_moved = each.kind == "cat" and name not in grids
            if tensor in grid_of and not is_moved and grid_of[tensor] != grids.get(name):
                raise NetworkError(
                    f"--export: {name}: its input is quantized for another layer in another way, "
                    "as with --keep_first_last"
                )
        output = self.tensor[self.output]
        if readers := [name for _, name, tensor in inputs if tensor is output and name in grids]:
            raise refuse(
                self.output, f"the logits are the input of {readers[0]}, and are quantized for it"
            )
        return grid_of

    def network(self) -> IntegerNetwork:
        """Return the network."""
        if grid := self.grids[self.images]:
            self.operations.append(integer.Rescale("input_codes", ("input",), (None,), grid))
            self.names[self.images] = "input_codes"
        for node in self.nodes:
            self._add_operations(node)
        values_of = {
            node.name: (name, self.grids[node])
            for node, name in self.names.items()
            if node not in self.unrectified and node.meta["shape"]  # a list has none
        }
        return IntegerNetwork(self.operations, self.names[self.output], values_of)

    def _add_operations(self, node: fx.Node) -> None:
        sources = operands(node)
        names = tuple(self.names[source] for source in sources)
        in_grids = tuple(self.grids[source] for source in sources)
        for i, (kind, options) in enumerate(self.stages[node]):
            if i == 0:
                self._check(node, kind, names, in_grids)
                options = self._options(node, options, in_grids)
                own = self._name(node)
            else:
                own = f"{own}.{kind.__name__.lower()}"
            self.operations.append(kind(own, names, in_grids, self.grids[node], **options))
            names, in_grids = (own,), (self.grids[node],)
        self.names[node] = names[0]

    def _name(self, node: fx.Node) -> str:
        """Return a name for the node's value that no other has."""
        numbered = (f"{name_of(node)}{'' if n == 1 else f'_{n}'}" for n in count(1))
        name = next(name for name in numbered if name not in self.taken)
        self.taken.add(name)
        return name

    def _check(self, node: fx.Node, kind: type, names: tuple, in_grids: tuple) -> None:
        """Raise NetworkError where a value would stay in float."""
        if self.is_float or not issubclass(kind, integer.Arithmetic) or kind is integer.Rescale:
            return
        if None in in_grids:
            raise refuse(node, "nothing quantizes its input")
        if kind is integer.Sum and names[0] == names[1]:
            raise refuse(node, "a sum of a tensor and itself is not supported")
        if not self.grids[node] and self.tensor[node] is not self.tensor[self.output]:
            raise refuse(node, "what reads its output does not quantize it")

    def _options(self, node: fx.Node, options: dict, in_grids: tuple) -> dict:
        """Return the options of an operation, with its ReLU and a layer's integers."""
        options = dict(options)
        if node in self.bounds:
            options["bounds"] = self.bounds[node]
        name = options.get("layer")
        parts = options.pop("parts", self.parts.get(name, ()))
        if parts is None:
            raise ValueError(f"{name}: its quantizer returns floats only: they cannot be exported")
        if parts and not self.is_float:
            [in_grid] = in_grids
            options["integers"] = make_integer_layer(parts, options.get("bias"), in_grid, name)
        return options


def shared_ranges(
    graph: fx.GraphModule, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Return the ranges, by name, with one for all inputs that are, or are part of, one tensor.

    It holds all of theirs: an engine keeps a tensor on one grid, whoever reads it.
    """
    values = Values(graph)
    readers: dict[fx.Node, list[str]] = defaultdict(list)
    for _, name, tensor in values.inputs():
        if name in ranges:
            readers[tensor].append(name)
    shared = dict(ranges)
    for names in readers.values():
        low, high = zip(*(ranges[name] for name in names), strict=True)
        shared |= dict.fromkeys(names, (min(low), max(high)))
    return shared
