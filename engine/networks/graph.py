"""The graph of a network: its operations, weights and inputs by name, and changed copies of it.

It is an `fx.GraphModule` whose tensors are buffers; `engine/networks/export.py` makes it. A node's
`meta` holds the `path` of the module in whose forward it runs, the module's `type`, the `shape` of
its value for a batch of `BATCH` images, and

- `name`: that of the operation, where it is one of `operations`;
- `is_bool`, `is_complex`: whether its value is of truth values, or of complex numbers;
- `learned`: the names of the parameters that a constant is, or is computed from;
- `computed`: True where a constant is none of the network's tensors but computed from some;
- `stored`: of a layer, which tensors of the `state_dict` its "weight" and "bias" are.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Images that the network is exported with; any number can be run afterwards. A prime that no other
# size is likely to be a multiple of: a size that is counts images.
BATCH = 211

PRODUCTS = {
    aten.conv1d.default: "conv",
    aten.conv1d.padding: "conv",
    aten.conv2d.default: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.default: "conv",
    aten.conv_transpose1d.default: "conv_transpose",
    aten.conv_transpose2d.input: "conv_transpose",
    aten.conv_transpose3d.input: "conv_transpose",
    aten.linear.default: "linear",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.mm.default: "matmul",
}
LAYERS = ("conv", "conv_transpose", "linear")  # products whose second operand is a weight
POOLINGS = {
    aten.avg_pool1d.default: "pool",
    aten.avg_pool2d.default: "pool",
    aten.avg_pool3d.default: "pool",
    aten.adaptive_avg_pool1d.default: "pool",
    aten.adaptive_avg_pool2d.default: "pool",
    aten.adaptive_avg_pool3d.default: "pool",
    aten.mean.dim: "pool",
}
SUMS = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.cat.default: "cat",
    aten.stack.default: "cat",
}
KINDS = {**PRODUCTS, **POOLINGS, **SUMS}

Transform = Callable[[Tensor], Tensor]


class Operation:
    """A product, pooling or sum of the graph: what quantization is about.

    Attributes:
        node: the operation in the graph.
        name: the module's; or that of the module in whose forward it runs, a dot, its kind and,
            from the second on, its number.
        kind: a value of KINDS.
        inputs: the names of what is quantized beside weights, in order. A single input is called as
            the operation is, several have [0], [1], … after that.
    """

    def __init__(self, node: fx.Node) -> None:
        """Read it off a node that has a name."""
        self.node, self.name, self.kind = node, node.meta["name"], KINDS[node.target]
        self.is_product = node.target in PRODUCTS
        self.is_sum = node.target in SUMS  # differences, products and concatenations as well
        self.is_layer = self.kind in LAYERS
        n_inputs = 2 if self.kind in ("matmul", "add", "sub", "mul") else 1
        n_inputs = len(node.args[0]) if self.kind == "cat" else n_inputs
        names = [f"{self.name}[{i}]" for i in range(n_inputs)]
        self.inputs = names if n_inputs > 1 else [self.name]

    @property
    def tensors(self) -> dict[str, str]:
        """The names of those tensors that a layer has, by "weight" and "bias"."""
        reads = self.node.args[1:3] if self.is_layer else ()
        return {
            kind: read.target
            for kind, read in zip(("weight", "bias"), reads, strict=False)
            if isinstance(read, fx.Node) and read.op == "get_attr"
        }

    @property
    def weight(self) -> str | None:
        """The name of the weight's tensor; None where there is none."""
        return self.tensors.get("weight")

    @property
    def bias(self) -> str | None:
        """The name of the bias' tensor; None where there is none."""
        return self.tensors.get("bias")

    @property
    def groups(self) -> int:
        """Of how many groups a convolution is, 1 for others."""
        return self.node.args[6] if self.is_layer and len(self.node.args) > 6 else 1

    def source(self, name: str) -> fx.Node:
        """Return the node of that input."""
        operands = self.node.args[0] if self.kind == "cat" else self.node.args
        return operands[self.inputs.index(name)]

    def set_source(self, name: str, value: fx.Node) -> None:
        """Replace the node of that input."""
        first, *others = self.node.args
        operands = [*first] if self.kind == "cat" else [first, *others]
        operands[self.inputs.index(name)] = value
        self.node.args = (operands, *others) if self.kind == "cat" else tuple(operands)

    def multiply_adds(self, n_images: int = 1) -> int:
        """Return how many products of two numbers it computes for so many images."""
        if not self.is_product:
            return 0
        first, second = (operand.meta["shape"] for operand in self.node.args[:2])
        values = math.prod(first if self.kind == "conv_transpose" else self.node.meta["shape"])
        if values % BATCH == 0:  # otherwise it does not depend on the images
            values = values // BATCH * n_images
        return values * (first[-1] if self.kind == "matmul" else math.prod(second[1:]))


def operations(graph: fx.GraphModule) -> list[Operation]:
    """Return the products, poolings and sums of an exported network, in the order they run."""
    return [Operation(node) for node in graph.graph.nodes if "name" in node.meta]


def adds_infinity(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a sum adds an infinite constant, as a mask of attention is: no grid has that."""
    constants = [graph.get_buffer(s.target) for s in node.all_input_nodes if s.op == "get_attr"]
    is_sum = KINDS.get(node.target) in ("add", "sub")
    return is_sum and not all(t.is_meta or t.isfinite().all() for t in constants)


def layers(graph: fx.GraphModule) -> dict[str, Operation]:
    """Return the operations that have a weight, by name, in the order in which they run."""
    return {each.name: each for each in operations(graph) if each.is_layer}


def weights(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the weight of each layer by the layer's name, with the output channels first."""
    return {
        name: by_channel(graph.get_buffer(layer.weight), layer)
        for name, layer in layers(graph).items()
    }


def by_channel(w: Tensor, layer: Operation) -> Tensor:
    """Return a layer's weight, or what has its shape, with the output channels first.

    That of a transposed convolution of g groups is (inputs, outputs / g, …): of what this has
    returned, this is the inverse as well.
    """
    if layer.kind != "conv_transpose":
        return w
    return w.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the graph with those tensors that it reads; none is changed in place."""
    [output] = graph.graph.find_nodes(op="output")
    return returning_values(graph, output.args[0])


def returning_values(
    graph: fx.GraphModule, results: fx.node.Argument, given: fx.Node | None = None
) -> fx.GraphModule:
    """Return a copy that returns the value of a node, or of a list of them, and runs no more.

    It takes images or, of a node `given` that all results depend on by itself, the node's value.
    """
    copied = fx.Graph()
    copies = {given: copied.placeholder(given.name)} if given else {}
    copied.graph_copy(graph.graph, copies)
    copied.output(fx.node.map_arg(results, copies.__getitem__))
    # what the network takes stays where nothing reads it; with `given`, images go
    taken, *_ = copied.find_nodes(op="placeholder")
    copied.eliminate_dead_code(lambda node: node is taken or node.op == "output")
    return fx.GraphModule(graph, copied)


class PartialRun:
    """A graph that runs on images as far as a node, and later on from there to another one."""

    def __init__(self, graph: fx.GraphModule, images: Tensor) -> None:
        """Begin with the images; tensors of the graph are read only when a node needs them."""
        self.nodes = iter(graph.graph.nodes)  # those that have not run
        self.interpreter = fx.Interpreter(graph)
        [placeholder] = graph.graph.find_nodes(op="placeholder")
        self.values = self.interpreter.env = {placeholder: images}

    def value(self, node: fx.Node) -> Tensor:
        """Return the node's value, and forget what no node after it reads."""
        while node not in self.values:
            following = next(self.nodes)
            if following.op != "call_function":
                continue
            for source in following.all_input_nodes:
                if source.op == "get_attr":
                    self.values[source] = self.interpreter.run_node(source)
            self.values[following] = self.interpreter.run_node(following)
            for read in self.interpreter.user_to_last_uses.get(following, ()):
                del self.values[read]
        return self.values[node]

    def n_bytes(self) -> int:
        """Return how many bytes its tensors take; sizes, which attention keeps, take none."""
        return sum(t.nbytes for t in tree_leaves([*self.values.values()]) if isinstance(t, Tensor))


def with_inputs(graph: fx.GraphModule, transforms: Mapping[str, Transform]) -> fx.GraphModule:
    """Return a copy in which each named input of an operation goes through its function first."""
    copied = copy_graph(graph)
    for operation in operations(copied):
        for name in filter(transforms.__contains__, operation.inputs):
            value = operation.source(name)
            with copied.graph.inserting_before(operation.node):
                changed = copied.graph.call_function(transforms[name], (value,))
            changed.meta = {k: v for k, v in value.meta.items() if k != "name"}
            operation.set_source(name, changed)
    copied.recompile()
    return copied


def read_tensor(module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Set a buffer of the module under a name with dots, and return a new node that reads it."""
    set_tensor(module, name, tensor)
    node = module.graph.get_attr(name)
    node.meta = {"path": "", "type": "", "shape": tuple(tensor.shape)}
    node.meta |= {"is_bool": tensor.dtype == torch.bool, "is_complex": tensor.is_complex()}
    return node


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a buffer of the module, or of its submodules, under a name with dots."""
    fx.graph_module._assign_attr(tensor, module, name)


def set_constant(graph: fx.GraphModule, layer: Operation, kind: str, tensor: Tensor) -> None:
    """Give a layer another "weight" or "bias", under the layer's own name for it."""
    position = {"weight": 1, "bias": 2}[kind]
    arguments = [*layer.node.args]
    with graph.graph.inserting_before(layer.node):
        read = read_tensor(graph, f"{layer.name}.{kind}", tensor)
    arguments[position : position + 1] = [read]
    layer.node.args = tuple(arguments)
