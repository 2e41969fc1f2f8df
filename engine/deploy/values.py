"""The values of an exported network, and which of them an engine keeps on one grid."""

from collections import defaultdict
from collections.abc import Mapping

from torch import fx

from engine.deploy.integer_operations import Arithmetic, Move, Pad, Rescale
from engine.deploy.onnx_emitter import UNBOUNDED, Bounds
from engine.deploy.supported import OPERATIONS, Stage, check_supported, operands
from engine.networks.exported import Operation
from engine.quantization.equalization import NO_VALUES


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
        self.stages: dict[fx.Node, list[Stage]] = {}
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
        if stages and stages[0][0] is Rescale and self._join(node, stages[0][1]["bounds"]):
            stages = []
        self.stages[node] = stages
        self.tensor[node] = node
        if all(issubclass(kind, Move) for kind, _ in stages):
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
        if kinds and issubclass(kinds[0], Arithmetic):
            return [node]
        makers = [self._makers(source, passed, has_zero) for source in operands(node)]
        return sum(makers, []) if all(makers) and (has_zero or Pad not in kinds) else []


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
