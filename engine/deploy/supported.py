"""Which of PyTorch's operations have an integer form: OPERATIONS, each with what it becomes.

A reader takes a node of an exported network and returns the integer operations, a class and its
options each, that compute the node's value one after the other; none where the value stays the
same. It raises NetworkError, in one line with the reason, for arguments that have no such form.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from engine.deploy import integer_operations as integer
from engine.networks.convolution import read_geometry, repeated
from engine.networks.graph import BATCH, KINDS, aten
from engine.quantization.equalization import clamp_bounds, kind_of
from engine.quantization.grids import OnGrid
from engine.system.errors import NetworkError

Stage = tuple[type[integer.IntegerOperation], dict[str, Any]]
Reader = Callable[[fx.Node], list[Stage]]
NONE: Mapping = MappingProxyType({})
REASONS = {
    "batch_norm": "is not right behind a layer that it alone reads, into which it could be folded",
    "mul": "would need a product of two quantized values, or of one and a number",
    "matmul": "multiplies two quantized values",
}


def refuse(node: fx.Node, reason: str) -> NetworkError:
    """Return the error of an operation that cannot be exported."""
    return NetworkError(f"--export: {name_of(node)}: {reason}")


def name_of(node: fx.Node) -> str:
    """Return what to call the operation: after its module where that is one operation."""
    path = node.meta["path"]
    if not node.meta["type"].startswith("torch.nn.modules."):
        path = f"{path}.{kind_of(node)}".lstrip(".")
    return node.meta.get("name", path)


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the values that the operation combines; weights are none."""
    if node.target is aten.cat.default:
        return list(node.args[0])
    return list(node.args[:2]) if node.target is aten.add.Tensor else [node.args[0]]


def check_supported(nodes: list[fx.Node]) -> None:
    """Raise NetworkError, naming the first, where operations have no integer form."""
    unsupported = [node for node in nodes if node.target not in OPERATIONS]
    if not unsupported:
        return
    first = unsupported[0]
    kind = kind_of(first)
    others = ", ".join(sorted({kind_of(node) for node in unsupported} - {kind}))
    raise NetworkError(
        f"--export: {first.meta['path'] or 'the network'} calls {kind}, which "
        + REASONS.get(KINDS.get(first.target, kind), "has no integer form")
        + (f" (nor can be exported: {others})" if others else "")
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value without the batch."""
    return tuple(node.meta["shape"][1:])


def _arguments(node: fx.Node, *defaults: object) -> tuple:
    """Return the arguments after the first, with defaults for those that are left out."""
    return (*node.args[1:], *defaults[len(node.args) - 1 :])


def _dimension(node: fx.Node, dim: int) -> int:
    """Return which of the value's dimensions is meant, counted from the first."""
    dim %= len(node.meta["shape"])
    if dim == 0:
        raise refuse(node, "the batch has to stay whole, as the first dimension")
    return dim


def _move(
    op: str, function: Callable[..., Tensor], constants: Mapping = NONE, **attributes: object
) -> list[Stage]:
    """Return a Move, with the constants and attributes that ONNX's operator `op` has."""
    options = {"function": function, "op": op, "constants": constants, "attributes": attributes}
    return [(integer.Move, options)]


def _identity(node: fx.Node) -> list[Stage]:
    dtypes = {a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)}
    if dtypes - {torch.float32}:
        raise refuse(node, "values of another type than float32 are not supported")
    return []


def _dropout(node: fx.Node) -> list[Stage]:
    if node.args[2]:
        raise refuse(node, "dropout that is active in evaluation mode is not supported")
    return []


def _layer(node: fx.Node) -> list[Stage]:
    module = node.graph.owning_module
    weight, bias = (
        module.get_buffer(arg.target) if arg is not None else None
        for arg in (*node.args[1:], None)[:2]
    )
    options = {"product": node.target}
    if KINDS[node.target] == "conv":
        options = _convolution(node.target, weight, *node.args[3:])
    elif len(_shape(node)) != 1:
        raise refuse(node, "linear layers of more than one vector an image are not supported")
    options |= {"layer": node.meta["name"], "weight": weight, "bias": bias}
    return [(integer.Layer, options)]


def _convolution(product: Callable, w: Tensor, *arguments: object) -> dict[str, Any]:
    """Return the options of a convolution: for PyTorch its arguments, for ONNX attributes."""
    kernel = list(w.shape[2:])
    geometry = read_geometry(arguments, kernel)
    attributes = {
        "pads": geometry.before + geometry.after,
        "dilations": geometry.dilation,
        "group": geometry.groups,
        "kernel_shape": kernel,
        "strides": geometry.stride,
    }
    return {"product": product, "geometry": arguments, "attributes": attributes}


def _sum(node: fx.Node) -> list[Stage]:
    a, b = node.args[:2]
    if node.kwargs or not isinstance(b, fx.Node) or "get_attr" in (a.op, b.op):
        raise refuse(node, "only sums of two tensors are supported, not of parameters or numbers")
    if a.meta["shape"] != b.meta["shape"]:
        raise refuse(node, "only sums of tensors of one shape are supported")
    return [(integer.Sum, {})]


def _average(
    node: fx.Node, kernel: list[int], stride: list[int], padding: Sequence[int] = (0,)
) -> list[Stage]:
    """Return average pooling as a layer of ones, or as global pooling."""
    channels, *size = _shape(node.args[0])
    if kernel == stride == [1, 1]:
        return []
    if kernel == size and not any(padding):
        return [(integer.GlobalPool, {})]
    ones = torch.ones(channels, 1, *kernel)
    n = ones[0].numel()
    options = _convolution(aten.conv2d.default, ones, stride, padding, [1], channels)
    options |= {"weight": ones / n, "parts": (OnGrid(ones, torch.tensor(1 / n)),)}
    return [(integer.Layer, options)]


def _avg_pool(node: fx.Node) -> list[Stage]:
    arguments = _arguments(node, [], [], [0], False, True, None)
    kernel, stride, padding = (repeated(v or arguments[0], 2) for v in arguments[:3])
    _, with_padding, divisor = arguments[3:]
    size = [
        (n + 2 * p - k) // s + 1
        for n, p, k, s in zip(_shape(node.args[0])[1:], padding, kernel, stride, strict=True)
    ]
    if divisor or size != list(_shape(node)[1:]) or (any(padding) and not with_padding):
        reason = "average pooling of windows that differ in their number of pixels"
        raise refuse(node, f"{reason} (ceil_mode, count_include_pad, divisor) is not supported")
    return _average(node, kernel, stride, padding)


def _adaptive_pool(node: fx.Node) -> list[Stage]:
    before, after = (_shape(each)[1:] for each in (node.args[0], node))
    if any(b % a for b, a in zip(before, after, strict=True)):
        sizes = " to ".join(" × ".join(map(str, size)) for size in (before, after))
        reason = f"pooling of {sizes} pixels is not supported: these do not divide those"
        raise refuse(node, reason)
    kernel = [b // a for b, a in zip(before, after, strict=True)]
    return _average(node, kernel, kernel)


def _mean(node: fx.Node) -> list[Stage]:
    dims = {d % len(node.args[0].meta["shape"]) for d in node.args[1] or ()}
    if dims != {2, 3} or len(_shape(node.args[0])) != 3:
        raise refuse(node, "only means over all pixels, (2, 3), are supported")
    keeps_dims = _arguments(node, None, False)[1]
    return [(integer.GlobalPool, {})] + ([] if keeps_dims else _to_shape(_shape(node)))


def _max_pool(node: fx.Node) -> list[Stage]:
    before, after = (_shape(each)[1:] for each in (node.args[0], node))
    arguments = _arguments(node, [], [], [0], [1])[:4]
    kernel, stride, padding, dilation = (
        repeated(v or arguments[0], len(before)) for v in arguments
    )
    geometry = zip(before, after, kernel, stride, padding, dilation, strict=True)
    ends = [  # what ONNX has to pad for the last window, which ceil_mode adds, to be whole
        max(p, (out - 1) * s + d * (k - 1) + 1 - size - p) for size, out, k, s, p, d in geometry
    ]
    attributes = {"strides": stride, "pads": padding + ends, "dilations": dilation}
    return _move("MaxPool", _applied(node), kernel_shape=kernel, **attributes)


def _applied(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """Return the node's own function, with its arguments after the first."""
    return lambda x: node.target(x, *node.args[1:], **node.kwargs)


def _reshape(node: fx.Node) -> list[Stage]:
    shape = _shape(node)
    if node.meta["shape"][:1] != (BATCH,):
        raise refuse(node, "the batch has to stay whole, as the first dimension")
    return [] if shape == _shape(node.args[0]) else _to_shape(shape)


def _to_shape(shape: tuple[int, ...]) -> list[Stage]:
    # in ONNX, 0 stands for the batch
    return _move("Reshape", lambda x: x.reshape(len(x), *shape), {"shape": [0, *shape]})


def _transpose(node: fx.Node) -> list[Stage]:
    # of sizes 0, 1, …: they end up in the order that ONNX is told
    order = _applied(node)(torch.empty(*range(len(node.meta["shape"])))).shape
    if order[0] != 0:
        raise refuse(node, "the batch has to stay whole, as the first dimension")
    return _move("Transpose", _applied(node), perm=list(order))


def _slice(node: fx.Node) -> list[Stage]:
    dim, start, end, stride = _arguments(node, 0, None, None, 1)
    if node.meta["shape"] == node.args[0].meta["shape"]:
        return []
    end = torch.iinfo(torch.int64).max if end is None else end
    ranges = {"starts": [start or 0], "ends": [end], "axes": [_dimension(node, dim)]}
    return _move("Slice", _applied(node), {**ranges, "steps": [stride]})


def _part(node: fx.Node) -> list[Stage]:
    """Return one of the parts into which a value is split; splitting itself changes nothing."""
    split, i = node.args
    whole = torch.empty(split.args[0].meta["shape"], device="meta")
    dim = _dimension(node, split.args[2] if len(split.args) > 2 else 0)
    sizes = [part.shape[dim] for part in split.target(whole, *split.args[1:])]
    start, end = sum(sizes[:i]), sum(sizes[: i + 1])
    ranges = {"starts": [start], "ends": [end], "axes": [dim], "steps": [1]}
    return _move("Slice", lambda x: x.narrow(dim, start, end - start), ranges)


def _pad(node: fx.Node) -> list[Stage]:
    widths, *rest = node.args[1:]
    values = {*rest, *node.kwargs.values()} - {"constant", None, 0}  # "reflect", or a number
    if values or min(widths) < 0:
        raise refuse(node, "only padding by zeros is supported")
    # PyTorch begins with the last dimension; ONNX has the widths before all, then those after them
    others = [0] * (len(node.meta["shape"]) - len(widths) // 2)
    sides = [*others, *widths[-2::-2], *others, *widths[::-2]]
    [(_, options)] = _move("Pad", _applied(node), {"widths": sides})
    return [(integer.Pad, options)]


def _concat(node: fx.Node) -> list[Stage]:
    if any(each.op == "get_attr" for each in node.args[0]):
        raise refuse(node, "only values of the network side by side can be concatenated")
    dim = _dimension(node, _arguments(node, 0)[0])
    return _move("Concat", lambda *values: torch.cat(values, dim), axis=dim)


def _clamp(node: fx.Node) -> list[Stage]:
    low, high = clamp_bounds(node)
    bounds = (-inf if low is None else float(low), inf if high is None else float(high))
    return [(integer.Rescale, {"bounds": bounds})]


# A line for each reader: the names in `torch.ops.aten` of what it reads.
READERS: dict[Reader, str] = {
    _layer: "conv1d.default conv1d.padding conv2d.default conv2d.padding linear.default",
    _sum: "add.Tensor",
    _concat: "cat.default",
    _clamp: "relu.default relu6.default hardtanh.default clamp.default clamp_min.default",
    _avg_pool: "avg_pool2d.default",
    _adaptive_pool: "adaptive_avg_pool2d.default",
    _mean: "mean.dim",
    _max_pool: "max_pool1d.default max_pool2d.default",
    _pad: "pad.default constant_pad_nd.default",
    _slice: "slice.Tensor",
    _transpose: "permute.default transpose.int",
    _reshape: "view.default reshape.default flatten.using_ints unflatten.int squeeze.dims "
    "squeeze.dim unsqueeze.default",
    _dropout: "dropout.default feature_dropout.default alpha_dropout.default",
    _identity: "clone.default contiguous.default detach.default alias.default to.dtype to.device "
    "to.dtype_layout _to_copy.default chunk.default split.Tensor split_with_sizes.default "
    "tensor_split.sections",
}
OPERATIONS: dict[Callable, Reader] = {
    operator.attrgetter(name)(aten): reader
    for reader, names in READERS.items()
    for name in names.split()
}
OPERATIONS[operator.getitem] = _part
