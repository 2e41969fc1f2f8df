"""A network as one graph of PyTorch operations: what torch.export sees of its `forward`.

`export_network` runs `torch.export` once, in evaluation mode and with a dynamic batch, and returns
an `fx.GraphModule` that maps images (B, 3, H, W) to logits (B, classes). It has

- no operation in place: strangers' code that writes into its input writes into a copy;
- weights and buffers under the names of the network's `state_dict`. What is computed from them
  alone, such as the weight of `weight_norm`, is a constant of its own;
- a weight and a bias of its own for each operation that has one, also where the network runs a
  layer twice: `<name of the operation>.weight` and `.bias`;
- attention as two matrix products and a softmax.

What its nodes hold in their `meta` is told in `engine/networks/graph.py`.
"""

import copy
import io
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from engine.networks.fast_layers import plain_copy
from engine.networks.graph import (
    BATCH,
    KINDS,
    LAYERS,
    adds_infinity,
    aten,
    copy_graph,
    layers,
    operations,
    read_tensor,
    returning_values,
    set_constant,
)
from engine.networks.layers import image_dtype
from engine.networks.outputs import MAX_ROUNDING, is_near, network_boundary, split_output
from engine.networks.spelling import (
    constants,
    follow_batch,
    inline_regions,
    normalize_operations,
    split_attention,
)
from engine.system.errors import NetworkError

TOLERANCE_OF_EARLIER = 1e-5  # the same for the graph of another network: a number in it may differ
# Operations that PyTorch writes as matrix products, which are seen.
COMPOSED = {
    aten.einsum.default, aten.tensordot.default, aten.inner.default, aten.chain_matmul.default,
    aten.linalg_matmul.default, aten.linalg_multi_dot.default,
}  # fmt: skip
CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
POOLED_DIMS = {4: ({2, 3}, {1, 2}), 3: ({1},)}  # of a mean over pixels or tokens, by dimensions
FLATTENED = (aten.flatten.using_ints, aten.reshape.default)
# Operations with products inside that no quantizer reaches.
UNSEEN_PRODUCTS = {
    "baddbmm", "addbmm", "addmm", "addmv", "mv", "dot", "bilinear", "lstm", "gru", "rnn_tanh",
    "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "conv_tbc", "cdist",
    "deform_conv2d", "scaled_dot_product_attention", "_native_multi_head_attention",
}  # fmt: skip
# Modules that are one operation each, which is called after them.
OPERATION_MODULES = (
    "torch.nn.modules.conv.",
    "torch.nn.modules.linear.",
    "torch.nn.modules.pooling.",
    "engine.",
)


def export_network(
    net: nn.Module, image_shape: Sequence[int], earlier: list[ExportedProgram] | None = None
) -> fx.GraphModule:
    """Return the network's graph for images of `image_shape` (3, H, W), with copies of its weights.

    `earlier` are what `torch.export` made of other networks of the same code, for images of that
    shape: one that computes this network's logits with this network's tensors saves the time to
    run it again. Otherwise it gains this network's. Raises NetworkError, in one line with PyTorch's
    reason, where it cannot be exported, where the graph computes something else than the network,
    and where it has products that cannot be quantized.
    """
    name = type(net).__name__
    net = plain_copy(net)
    net.eval()  # a network's own `train` need not return it
    images = torch.randn(3, *image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(net.parameters(), images).device, image_dtype(net))
    problem = " cannot be exported by torch.export, which quantizing needs (training does not)"
    with network_boundary(net, problem), torch.no_grad():
        expected = _Logits(net)(images.clone())
        for program in earlier or ():
            if _has_tensors_of(program, net):
                graph = _graph(program, net, images, expected)
                if is_near(graph(images), expected, TOLERANCE_OF_EARLIER):
                    return graph
        program = traced(net, images.new_zeros(BATCH, *image_shape))
        graph = _graph(program, net, images, expected)
        with FlopCounterMode(display=False) as counter, _no_listing():
            logits = graph(images)
    seen = sum(each.multiply_adds(len(images)) for each in operations(graph))
    _check_products(seen, counter.get_total_flops() // 2, name)
    if not is_near(logits, expected):
        raise NetworkError(f"{name}: its graph of torch.export computes other logits than itself")
    if earlier is not None:
        earlier.append(program)
    return graph


def _check_products(seen: int, counted: int, name: str) -> None:
    """Raise NetworkError where operations have fewer multiply-adds than PyTorch has counted."""
    if counted > seen * (1 + MAX_ROUNDING):
        share = f"{1 - seen / counted:.1%}"
        raise NetworkError(f"{name}: {share} of its products are in operations that are not seen")


def _has_tensors_of(program: ExportedProgram, net: nn.Module) -> bool:
    """Tell whether each tensor of another network's program is a parameter or buffer of this one.

    A tensor that a module keeps as a plain attribute, or makes as it runs, is neither.
    """
    own = {name: tensor.shape for name, tensor in _named_tensors(_Logits(net)).items()}
    traced_ones = program.state_dict | program.constants
    inputs = program.graph_signature.input_specs
    targets = [spec.target for spec in inputs if spec.kind in CONSTANT_KINDS]
    return all(own.get(target) == traced_ones[target].shape for target in targets)


class _Logits(nn.Module):
    """The network without what it returns beside its logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return split_output(self.net, self.net(x), [])[0]


def _graph(
    program: ExportedProgram, net: nn.Module, images: Tensor, expected: Tensor
) -> fx.GraphModule:
    """Return the graph with this network's tensors; what it computes is for the caller to check.

    Sizes that are multiples of BATCH count images only where it would be wrong otherwise: a network
    may have such sizes of its own.
    """
    graph = _exported(program, net)
    with suppress(Exception), _no_listing():  # the caller runs the graph again
        if is_near(graph(images), expected):
            return graph
    return _exported(program, net, follows_batch=True)


def _exported(
    program: ExportedProgram, net: nn.Module, follows_batch: bool = False
) -> fx.GraphModule:
    """Return the graph as the module describes it, with this network's tensors."""
    graph = _with_own_tensors(program, _Logits(net))
    inline_regions(graph)
    for node in graph.graph.nodes:
        node.meta = _described(node)
    if follows_batch:
        follow_batch(graph)
    for transform in (normalize_operations, split_attention, _fold_constants):
        graph.graph.eliminate_dead_code()
        transform(graph)
    graph.graph.eliminate_dead_code()
    _name_operations(graph)
    _own_tensors(graph)
    return copy_graph(graph)


def traced(net: nn.Module, images: Tensor) -> ExportedProgram:
    """Return what `torch.export` makes of the network, without operations in place."""
    shapes = ({0: Dim.AUTO},)
    # With gradients: without them attention runs as one kernel that hides its matrix products.
    with torch.enable_grad(), _no_listing():
        program = export(_Logits(net), (images,), dynamic_shapes=shapes, strict=False)
    has_composed = not COMPOSED.isdisjoint(node.target for node in program.graph.nodes)
    if has_composed or not _without_inplace(program.graph):
        table = default_decompositions() if has_composed else {}
        # all of COMPOSED, as one may be written as another
        program = program.run_decompositions({k: v for k, v in table.items() if k in COMPOSED})
    return program


@contextmanager
def _no_listing() -> Iterator[None]:
    """Context manager that drops what PyTorch writes beside an error: a part of the graph."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _without_inplace(graph: fx.Graph) -> bool:
    """Replace operations in place by those that return a new value; False where views forbid it.

    A view shares memory with what is written to: then all of its readers would have to change.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        if not schema.is_mutable or schema.name == "aten::batch_norm":
            continue
        written = node.args[0]
        functional = getattr(aten, schema.name.removeprefix("aten::").rstrip("_"), None)
        overload = getattr(functional, node.target._overloadname, None)
        if overload is None or _is_view(written) or any(map(_is_view, written.users)):
            return False
        node.target = overload
        for user in [*written.users]:
            if order[user] > order[node]:
                user.replace_input_with(written, node)
    return True


def _is_view(node: fx.Node) -> bool:
    """Tell whether the value shares memory with what the operation takes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    results = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in results)


def _with_own_tensors(program: ExportedProgram, net: nn.Module) -> fx.GraphModule:
    """Return a module with the program's graph that reads the network's tensors by their names."""
    tensors = program.constants | _named_tensors(net)
    graph = fx.Graph()
    attributes: dict[str, Tensor | fx.GraphModule] = {}
    values: dict[fx.Node, fx.Node] = {}
    copies: dict[int, Tensor] = {}
    signature = program.graph_signature
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind in CONSTANT_KINDS:
            name = spec.target.removeprefix("net.")
            first = name.partition(".")[0]
            if hasattr(fx.GraphModule, first):
                raise NetworkError(
                    f"what is called {first!r} needs another name: graphs have that one"
                )
            tensor = tensors[spec.target]
            attributes[name] = copies.setdefault(id(tensor), tensor.detach().clone())
            values[node] = graph.get_attr(name)
            values[node].meta = {"val": tensor, "is_parameter": spec.kind == InputKind.PARAMETER}
    results = graph.graph_copy(program.graph, values)
    [logits] = [
        value
        for value, spec in zip(results, signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    graph.output(logits)
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in attributes:  # the graph of a region, such as one of autocast
            attributes[node.target] = getattr(program.graph_module, node.target)
    return fx.GraphModule(attributes, graph)


def _named_tensors(net: nn.Module) -> dict[str, Tensor]:
    buffers = dict(net.named_buffers(remove_duplicate=False))
    return buffers | dict(net.named_parameters(remove_duplicate=False))


def _described(node: fx.Node) -> dict:
    """Return the `meta` of a node, see the module; shapes with the batch that was exported."""
    stack = [*(node.meta.get("nn_module_stack") or {"": ("", "")}).values()][-1]
    value = node.meta.get("val")
    described = {"path": stack[0].removeprefix("net").lstrip("."), "type": stack[1], "shape": ()}
    described |= {"is_bool": False, "is_complex": False}
    if isinstance(value, Tensor):
        described["shape"] = tuple(n if isinstance(n, int) else n.node.hint for n in value.shape)
        described["is_bool"] = value.dtype == torch.bool
        described["is_complex"] = value.is_complex()
    return described | {"learned": [node.target] if node.meta.get("is_parameter") else []}


@torch.no_grad()
def _fold_constants(module: fx.GraphModule) -> None:
    """Compute once what depends on weights and buffers alone, and read the results as constants."""
    constant = constants(module)
    computed = [
        node
        for node in module.graph.nodes
        if node in constant and node.op != "get_attr" and node.users.keys() - constant
    ]
    values = returning_values(module, computed)(None)  # of no images
    for node, value in zip(computed, values, strict=True):
        if not isinstance(value, Tensor):
            continue
        path = node.meta["path"]
        name = f"{path}.{node.name}_value".lstrip(".")  # `to` alone is a method of modules
        with module.graph.inserting_before(node):
            read = read_tensor(module, name, value.detach().clone())
        read.meta |= {"path": path, "computed": True, "learned": _learned(node)}
        for user in node.users.keys() - constant:
            user.replace_input_with(node, read)


def _learned(node: fx.Node) -> list[str]:
    """Return the names of the parameters that a constant is computed from."""
    sources = [name for source in node.all_input_nodes for name in _learned(source)]
    return list(dict.fromkeys(node.meta.get("learned", []) + sources))


def _name_operations(module: fx.GraphModule) -> None:
    """Put the name of each operation into its `meta`.

    Raises NetworkError, naming it, for a product that would stay in float unseen.
    """
    constant = constants(module)
    tensors = {read.target for read in module.graph.find_nodes(op="get_attr")}
    taken = set(tensors)
    for node in module.graph.nodes:
        kind = getattr(node.target, "_opname", "")
        is_layer = KINDS.get(node.target) in LAYERS
        if kind in UNSEEN_PRODUCTS or (is_layer and node.args[1] not in constant):
            where = node.meta["path"] or "the network"
            of_what = " with a weight that depends on the images" if is_layer else ""
            raise NetworkError(f"{where} calls {kind}{of_what}, whose products cannot be quantized")
        if _is_operation(node, constant) and not adds_infinity(module, node):
            own = {each.target for each in node.all_input_nodes if each.op == "get_attr"}
            name = _free_name(_operation_name(node), taken, tensors - own)
            taken.add(name)
            node.meta["name"] = name


def _free_name(name: str, taken: set[str], tensors: set[str]) -> str:
    """Return the name, with a number where an operation has it, or a tensor that a layer would."""
    for number in itertools.count(1):
        free = name if number == 1 else f"{name}_{number}"
        if free not in taken and not {f"{free}.weight", f"{free}.bias"} & tensors:
            return free


def _is_operation(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Tell whether the node is a product, pooling or sum of more than numbers and channels."""
    if node.target not in KINDS or node in constant or node.meta["is_complex"]:
        return False
    if node.target is aten.mean.dim:
        return _is_over_pixels(node)
    if KINDS[node.target] in ("add", "sub", "mul"):
        return all(_is_summand(operand, constant) for operand in node.args[:2])
    return True


def _is_summand(operand: fx.Node | float, constant: set[fx.Node]) -> bool:
    """Tell whether what is added is more than a number, a vector or, as γ, one for each channel."""
    if not isinstance(operand, fx.Node):
        return False
    shape = operand.meta["shape"]
    if operand in constant:  # such as a position embedding, (tokens, channels)
        return sum(n > 1 for n in shape) > 1
    return len(shape) > 2


def _is_over_pixels(mean: fx.Node) -> bool:
    """Tell whether a mean is over all pixels or tokens: one of channels is no pooling."""
    x, dims, *_ = mean.args
    shape = x.meta["shape"]
    dims = {d % len(shape) for d in dims or ()}
    if x.target in FLATTENED and dims == {2}:  # of (B, C, H·W)
        before = x.args[0].meta["shape"]
        return len(before) == 4 and before[:2] == shape[:2]
    return dims in POOLED_DIMS.get(len(shape), ())


def _operation_name(node: fx.Node) -> str:
    """Return what to call an operation, see `Operation`; a layer in a function after its weight."""
    path = node.meta["path"]
    kind = KINDS[node.target]
    if node.meta["type"].startswith(OPERATION_MODULES):
        return path
    if kind in LAYERS:
        weight = node.args[1]
        is_stored = "computed" not in weight.meta and weight.target.endswith("weight")
        parameter = weight.target.removesuffix("weight") if is_stored else path
        if own := parameter.rstrip("._"):
            return own
    return f"{path}.{kind}".lstrip(".")


def _own_tensors(module: fx.GraphModule) -> None:
    """Give each layer a weight and a bias of its own, called after it.

    Its `meta` keeps under `stored` which tensors of the network's `state_dict` they are.
    """
    for layer in layers(module).values():
        stored = layer.node.meta["stored"] = {}
        for position, (kind, target) in enumerate(layer.tensors.items(), 1):
            if "computed" not in layer.node.args[position].meta:
                stored[kind] = target
            if target != f"{layer.name}.{kind}":
                set_constant(module, layer, kind, module.get_buffer(target).clone())


@torch.no_grad()
def write_back(net: nn.Module, graph: fx.GraphModule) -> tuple[nn.Module, str | None]:
    """Return a copy of the network with the tensors of its graph, or the graph and why not.

    The graph where the network computes a weight in its `forward`, reads one elsewhere as well, or
    has one parameter for layers whose tensors now differ: no copy computes what the graph does.
    """
    copied = copy.deepcopy(net)
    written = _others(graph, copied)
    for layer in layers(graph).values():
        path = layer.node.meta["path"]
        for kind, name in layer.tensors.items():
            tensor = graph.get_buffer(name)
            stored = layer.node.meta["stored"].get(kind)
            own = f"{path}.{kind}".lstrip(".")
            sources = f"{path}.parametrizations.{kind}.".lstrip(".")
            is_read_elsewhere = any(each.startswith(sources) for each in written)
            if stored is None and (
                is_read_elsewhere or not _remove_parametrization(copied, path, kind)
            ):
                if kind == "bias" and copied.get_submodule(path).bias is None:
                    return graph, f"{path} has no bias of its own, and was given one"
                return graph, f"the network has no {name} of its own, or reads its parts elsewhere"
            stored = stored or own
            if not torch.equal(written.setdefault(stored, tensor), tensor):
                return graph, f"{stored} has other values elsewhere in the network"
            operator.attrgetter(stored)(copied).copy_(tensor)
    for name, statistic in copied.named_buffers():  # such as those of batch norms
        if not torch.equal(written.get(name, statistic), statistic):
            statistic.copy_(written[name])
    return copied, None


def _others(graph: fx.GraphModule, net: nn.Module) -> dict[str, Tensor]:
    """Return the network's tensors that are read by something that is no layer, by name.

    With the values that it reads, or that what it reads is computed from.
    """
    own = _named_tensors(net)
    read = {}
    of_layers = {n for layer in layers(graph).values() for n in layer.node.args[1:3]}
    for node in graph.graph.find_nodes(op="get_attr"):
        if node in of_layers:
            continue
        for name in {node.target, *node.meta.get("learned", ())} & own.keys():
            read[name] = graph.get_buffer(node.target) if name == node.target else own[name]
    return read


def _remove_parametrization(net: nn.Module, path: str, kind: str) -> bool:
    """Make a parametrized tensor of a module a parameter of its own; tell whether it was one."""
    module = net.get_submodule(path)
    is_parametrized = parametrize.is_parametrized(module, kind)
    if is_parametrized:
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        # a class of the copy's own: removing changes the class, which the original has as well
        module.__class__ = type(type(module).__name__, type(module).__bases__, own)
        parametrize.remove_parametrizations(module, kind)
    return is_parametrized
