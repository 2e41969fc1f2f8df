"""A quantized network in integers: from an exported graph to operations, which simulate an engine.

What the operations compute is defined in engine/deploy/integer_operations.py.
"""

from collections.abc import Mapping
from itertools import count

from torch import Tensor, fx, nn

from engine.deploy.integer_layers import IntegerLayer, make_integer_layer
from engine.deploy.integer_operations import Arithmetic, IntegerOperation, Layer, Rescale, Sum
from engine.deploy.supported import NONE, name_of, operands, refuse
from engine.deploy.values import Values
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
        operations: list[IntegerOperation],
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
        return _Builder(Values(graph), grids, parts).network()

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

    def layers(self) -> list[Layer]:
        """Return the operations that have weights of the network's."""
        return [each for each in self.operations if isinstance(each, Layer) and each.layer]

    def arithmetic(self) -> list[Arithmetic]:
        """Return the operations that compute with codes, and round."""
        computing = (each for each in self.operations if isinstance(each, Arithmetic))
        return [each for each in computing if None not in each.in_grids]

    def integers(self) -> dict[str, IntegerLayer]:
        """Return the integers of every layer by name."""
        return {each.layer: each.integers for each in self.layers()}


class _Builder:
    """From values to operations."""

    def __init__(self, values: Values, grids: Mapping[str, Grid], parts: Mapping) -> None:
        self.values, self.parts, self.is_float = values, parts, not grids
        self.operations: list[IntegerOperation] = []
        self.names = {values.images: "input"}
        self.taken = set(RESERVED)
        self.grids = self._grids_of_tensors(grids)

    def _grids_of_tensors(self, grids: Mapping[str, Grid]) -> dict[fx.Node, Grid]:
        """Return the grid of each tensor that is quantized, by the node that stands for it."""
        found: dict[fx.Node, Grid] = {}
        inputs = self.values.inputs()
        if unused := grids.keys() - {name for _, name, _ in inputs}:
            raise NetworkError(f"--export: no operation quantizes {', '.join(sorted(unused))}")
        for each, name, tensor in inputs:
            if each.kind == "add" and grids and name not in grids:
                raise refuse(each.node, "the sum would stay in float: --quantize_sums is needed")
            if name in grids and found.setdefault(tensor, grids[name]) != grids[name]:
                raise _conflict(name)
        for each, name, tensor in inputs:
            if name not in grids and tensor in found and each.kind != "cat":
                raise _conflict(name)
        if self.values.tensor[self.values.output] in found:
            raise refuse(self.values.output, "the logits are quantized for another operation")
        return found

    def _grid(self, node: fx.Node) -> Grid | None:
        return self.grids.get(self.values.tensor[node])

    def network(self) -> IntegerNetwork:
        """Return the network."""
        images = self.values.images
        if grid := self._grid(images):
            self.operations.append(Rescale("input_codes", ("input",), (None,), grid))
            self.names[images] = "input_codes"
        for node in self.values.nodes:
            self._add(node)
        values_of = {
            node.name: (name, self._grid(node))
            for node, name in self.names.items()
            if node not in self.values.unrectified and node.meta["shape"]  # a list has none
        }
        return IntegerNetwork(self.operations, self.names[self.values.output], values_of)

    def _add(self, node: fx.Node) -> None:
        """Add the operations of a node."""
        sources = operands(node)
        grid = self._grid(node)
        names = tuple(self.names[source] for source in sources)
        in_grids = tuple(self._grid(source) for source in sources)
        for i, (kind, options) in enumerate(self.values.stages[node]):
            if i == 0:
                self._check(node, kind, names, in_grids)
                options = self._options(node, options, in_grids)
                own = self._name(node)
            else:
                own = f"{own}.{kind.__name__.lower()}"
            self.operations.append(kind(own, names, in_grids, grid, **options))
            names, in_grids = (own,), (grid,)
        self.names[node] = names[0]

    def _name(self, node: fx.Node) -> str:
        """Return a name for the node's value that no other has."""
        numbered = (f"{name_of(node)}{'' if n == 1 else f'_{n}'}" for n in count(1))
        name = next(name for name in numbered if name not in self.taken)
        self.taken.add(name)
        return name

    def _check(self, node: fx.Node, kind: type, names: tuple, in_grids: tuple) -> None:
        """Raise NetworkError where a value would stay in float."""
        if self.is_float or not issubclass(kind, Arithmetic) or kind is Rescale:
            return
        if None in in_grids:
            raise refuse(node, "nothing quantizes its input")
        if kind is Sum and names[0] == names[1]:
            raise refuse(node, "a sum of a tensor and itself is not supported")
        is_result = self.values.tensor[node] is self.values.tensor[self.values.output]
        if not self._grid(node) and not is_result:
            raise refuse(node, "what reads its output does not quantize it")

    def _options(self, node: fx.Node, options: dict, in_grids: tuple) -> dict:
        """Return the options of an operation, with its ReLU and a layer's integers."""
        options = dict(options)
        if node in self.values.bounds:
            options["bounds"] = self.values.bounds[node]
        name = options.get("layer")
        parts = options.pop("parts", self.parts.get(name, ()))
        if parts is None:
            raise ValueError(f"{name}: its quantizer returns floats only: they cannot be exported")
        if parts and not self.is_float:
            [in_grid] = in_grids
            options["integers"] = make_integer_layer(parts, options.get("bias"), in_grid, name)
        return options


def _conflict(name: str) -> NetworkError:
    """Return the error of a value that is needed on two grids, or also in float."""
    return NetworkError(
        f"--export: {name}: its input is quantized for another layer in another way, as with "
        "--keep_first_last"
    )
