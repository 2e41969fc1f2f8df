"""ONNX files of networks: uint8 images in, logits out; quantized ones with Q/DQ pairs.

Engines fuse `DequantizeLinear → Conv → QuantizeLinear` to a convolution of integers, and two
`DequantizeLinear → Add → QuantizeLinear` to a sum of integers. A grid of fewer than 8 bits is
`QuantizeLinear → Clip` on uint8, which does not stand in the way of that. A layer of two weights
(PWLQ) has two sums in int32, `ConvInteger` or `MatMulInteger`. Sums and roundings are those of
engine/deploy/integer_operations.py.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.deploy.integer_layers import MAX_CODE, Grid, WeightCodes
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.integer_operations import (
    RELU,
    UNBOUNDED,
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
from engine.system.errors import FileError
from engine.system.io import atomic_write

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:  # an extra; see engine/system/extras.py
    onnx = None

OPSET, IR_VERSION = 13, 7  # the first opset with scales per channel, and its format
FORMAT_KEY, FORMAT = "regulquant_format", "1"  # in a model's metadata


def to_onnx(
    net: IntegerNetwork,
    image_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    metadata: Mapping[str, str],
    first_part_only: bool = False,
) -> bytes:
    """Return the model, as a file's content.

    It maps "images", uint8 (batch, *image_shape), to "logits", (batch, classes). Images are
    normalized by mean and std, of pixels scaled to 0..1, as in engine/images/loader.py. The output
    of every quantized step is a value with the step's name. `first_part_only` leaves out the other
    weights of layers that have several: to measure what those cost.
    """
    emitter = _Emitter(n_parts=1 if first_part_only else None)
    emitter.normalize(mean, std)
    for step in net.steps:
        EMITTERS[type(step)](emitter, step)
    emitter.node("Identity", [emitter.as_float(net.output)], "logits")
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *image_shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "classes"])
    model = emitter.model([images], logits)
    helper.set_model_props(model, {FORMAT_KEY: FORMAT, **metadata})
    return model.SerializeToString()


def step_to_onnx(step: Arithmetic, codes: Sequence[Tensor]) -> bytes:
    """Return a model of one quantized step alone: inputs such as `codes` → its output."""
    emitter, sources = _Emitter(), []
    for (name, grid), example in zip(step.inputs(), codes, strict=True):
        emitter.grids[name] = grid
        shape = ["batch", *example.shape[1:]]
        sources.append(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))
    EMITTERS[type(step)](emitter, step)
    kind = TensorProto.UINT8 if step.out_grid else TensorProto.FLOAT
    sizes = ["batch", *(f"out{i}" for i in range(codes[0].dim() - 1))]
    target = helper.make_tensor_value_info(step.name, kind, sizes)
    return emitter.model(sources, target).SerializeToString()


def save_model(content: bytes, path: Path) -> None:
    """Write a model. Raises OSError."""
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def load_model(path: Path) -> "onnx.ModelProto":
    """Read a model that was exported here; FileError, in one line, for any other file."""
    try:
        model = onnx.load_from_string(path.read_bytes())
        onnx.checker.check_model(model)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    except Exception as error:  # protobuf and the checker raise kinds of their own
        raise FileError(f"{path} is damaged or not an ONNX model") from error
    made_as = {p.key: p.value for p in model.metadata_props}.get(FORMAT_KEY)
    if made_as != FORMAT:
        raise FileError(f"{path} is an ONNX model, but not one that this version's --export makes")
    return model


# --- one step --------------------------------------------------------------------------------


class _Emitter:
    """Nodes and constants so far."""

    def __init__(self, n_parts: int | None = None) -> None:
        self.n_parts = n_parts  # of layers that have several
        self.nodes: list = []
        self.initializers: list = []
        self.grids: dict[str, Grid] = {}  # of values that are codes
        self.known: set[str] = set()

    def model(
        self, sources: "Sequence[onnx.ValueInfoProto]", target: "onnx.ValueInfoProto"
    ) -> "onnx.ModelProto":
        """Return the model of all nodes so far."""
        graph = helper.make_graph(self.nodes, "network", sources, [target], self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="RegulQuant",
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        self.known.add(output)
        return output

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """Add a constant, once, and return its name."""
        if name not in self.known:
            value = value.numpy() if isinstance(value, Tensor) else value
            self.initializers.append(numpy_helper.from_array(value, name))
            self.known.add(name)
        return name

    def normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Add the steps from uint8 images to the network's input."""
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
        scale = self.constant("normalize.scale", (1 / (255 * std)).float())
        shift = self.constant("normalize.shift", (-mean / std).float())
        pixels = self.node("Cast", ["images"], "pixels", to=TensorProto.FLOAT)
        scaled = self.node("Mul", [pixels, scale], "scaled")
        self.node("Add", [scaled, shift], "input")

    def grid_constants(self, name: str, grid: Grid) -> list[str]:
        """Return the names of scale and zero point of a value."""
        scale, zero_point = np.float32(grid.scale), np.uint8(grid.zero_point)
        return [
            self.constant(f"{name}.scale", np.asarray(scale)),
            self.constant(f"{name}.zero_point", np.asarray(zero_point)),
        ]

    def quantize(
        self, x: str, name: str, grid: Grid, bounds: tuple[float, float] = UNBOUNDED
    ) -> str:
        """Add float → codes called `name`, of values within the bounds."""
        low, high = grid.code_range(bounds)
        clipped = (low, high) != (0, 255)
        target = f"{name}.rounded" if clipped else name
        self.node("QuantizeLinear", [x, *self.grid_constants(name, grid)], target)
        self.grids[name] = grid
        if clipped:
            limits = [self.constant(f"code.{n}", np.asarray(np.uint8(n))) for n in (low, high)]
            self.node("Clip", [target, *limits], name)
        return name

    def as_float(self, name: str) -> str:
        """Return the name of the value in float32, dequantized where it is codes."""
        grid = self.grids.get(name)
        if grid is None:
            return name
        if f"{name}.float" in self.known:
            return f"{name}.float"
        constants = self.grid_constants(name, grid)
        return self.node("DequantizeLinear", [name, *constants], f"{name}.float")

    def dequantize_constant(self, name: str, codes: Tensor, scale: Tensor) -> str:
        """Return the name of a constant codes·scale; one scale, or one for each codes[i]."""
        scale = scale if len(scale) > 1 else scale.squeeze()
        inputs = [
            self.constant(f"{name}.codes", codes),
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", torch.zeros_like(scale, dtype=codes.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)


def _emit_quantize(emitter: _Emitter, step: Quantize) -> None:
    emitter.quantize(emitter.as_float(step.source), step.name, step.out_grid)


def _emit_layer(emitter: _Emitter, step: Layer) -> None:
    """Add a layer of one weight as Q/DQ pairs, or in float where it has no integers."""
    if step.integers and len(step.integers.parts) > 1:
        _emit_integer_sums(emitter, step)
        return
    name, module, integers = step.name, step.module, step.integers
    if integers:
        [part] = integers.parts
        w = emitter.dequantize_constant(f"{name}.weight", part.codes, part.scale)
        b = emitter.dequantize_constant(f"{name}.bias", integers.bias, integers.product_scale(part))
    else:
        bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
        w = emitter.constant(f"{name}.weight", module.weight.detach().cpu().contiguous())
        b = emitter.constant(f"{name}.bias", bias.detach().cpu())
    inputs = [emitter.as_float(step.source), w, b]
    if isinstance(module, nn.Linear):
        y = emitter.node("Gemm", inputs, _float_name(step), transB=1)
    else:
        y = emitter.node("Conv", inputs, _float_name(step), **_geometry(module))
    _finish(emitter, step, y)


def _emit_integer_sums(emitter: _Emitter, step: Layer) -> None:
    """Add a layer of several weights: a sum in int32 for each, which are added in float32."""
    total = None
    for i, part in enumerate(step.integers.parts[: emitter.n_parts]):
        name, shape = f"{step.name}.part{i}", [-1] + [1] * (part.codes.dim() - 2)
        y = _emit_integer_sum(emitter, step, name, part)
        if i == 0:
            bias = emitter.constant(f"{step.name}.bias", step.integers.bias.view(shape))
            y = emitter.node("Add", [y, bias], f"{name}.sum_bias")
        y = emitter.node("Cast", [y], f"{name}.float", to=TensorProto.FLOAT)
        scale = step.integers.product_scale(part).view(shape)
        y = emitter.node("Mul", [y, emitter.constant(f"{name}.scale", scale)], f"{name}.scaled")
        total = emitter.node("Add", [total, y], f"{name}.total") if total else y
    _finish(emitter, step, total)


def _emit_integer_sum(emitter: _Emitter, step: Layer, name: str, part: WeightCodes) -> str:
    """Add the sum of products of one part and return its name.

    Codes of a convolution are uint8 with the zero point 128: ONNX Runtime's kernel for those is
    four times as fast as that for int8.
    """
    zero_point = emitter.grid_constants(step.source, step.in_grid)[1]
    if isinstance(step.module, nn.Linear):
        codes = emitter.constant(f"{name}.codes", part.codes.T.contiguous())
        return emitter.node("MatMulInteger", [step.source, codes, zero_point], f"{name}.sum")
    codes = emitter.constant(f"{name}.codes", (part.codes.int() + MAX_CODE).to(torch.uint8))
    middle = emitter.constant("code.middle", np.asarray(np.uint8(MAX_CODE)))
    inputs = [step.source, codes, zero_point, middle]
    return emitter.node("ConvInteger", inputs, f"{name}.sum", **_geometry(step.module))


def _finish(emitter: _Emitter, step: Arithmetic | Rectify, y: str) -> None:
    """Add what comes after a step's result y: rounding within its bounds, or these alone."""
    if step.out_grid:
        emitter.quantize(y, step.name, step.out_grid, step.bounds)
    elif step.bounds == RELU:
        emitter.node("Relu", [y], step.name)
    elif step.bounds != UNBOUNDED:
        limits = [
            emitter.constant(f"bound.{bound}", np.asarray(np.float32(bound)))
            for bound in step.bounds
        ]
        emitter.node("Clip", [y, *limits], step.name)
    elif y != step.name:
        emitter.node("Identity", [y], step.name)


def _float_name(step: Step) -> str:
    """Return the name of a step's result before rounding, or before its ReLU."""
    is_last = not step.out_grid and getattr(step, "bounds", UNBOUNDED) == UNBOUNDED
    return step.name if is_last else f"{step.name}.result"


def _geometry(module: nn.Conv2d) -> dict[str, object]:
    """Return the attributes of a convolution."""
    return {
        "strides": list(module.stride),
        "pads": _pads(module),
        "dilations": list(module.dilation),
        "group": module.groups,
        "kernel_shape": list(module.kernel_size),
    }


def _pads(module: nn.Conv2d) -> list[int]:
    """Return the padding before both dimensions, then that after them."""
    if not isinstance(module.padding, str):
        return [*module.padding, *module.padding]
    is_same = module.padding == "same"
    sizes = zip(module.dilation, module.kernel_size, strict=True)
    totals = [is_same * dilation * (kernel - 1) for dilation, kernel in sizes]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def _emit_global_pool(emitter: _Emitter, step: GlobalPool) -> None:
    source = emitter.as_float(step.source)
    y = emitter.node("GlobalAveragePool", [source], _float_name(step))
    if step.out_grid:
        emitter.quantize(y, step.name, step.out_grid)


def _emit_sum(emitter: _Emitter, step: Sum) -> None:
    operands = [emitter.as_float(name) for name, _ in step.inputs()]
    _finish(emitter, step, emitter.node("Add", operands, _float_name(step)))


def _emit_rectify(emitter: _Emitter, step: Rectify) -> None:
    _finish(emitter, step, emitter.as_float(step.source))


def _emit_reorder(
    emitter: _Emitter, step: Reorder, op: str, *constants: str, **attributes: object
) -> None:
    """Add an operator that gives codes where it takes codes, and floats where it takes floats."""
    emitter.node(op, [step.source, *constants], step.name, **attributes)
    if step.out_grid:
        emitter.grids[step.name] = step.out_grid


def _emit_max_pool(emitter: _Emitter, step: MaxPool) -> None:
    _emit_reorder(emitter, step, "MaxPool", **_pool_geometry(step.module))


def _emit_flatten(emitter: _Emitter, step: Flatten) -> None:
    _emit_reorder(emitter, step, "Flatten", axis=1)


def _emit_slice(emitter: _Emitter, step: Slice) -> None:
    n = len(step.index)
    constants = {
        "starts": [0] * n,
        "ends": [np.iinfo(np.int64).max] * n,
        "axes": range(n),
        "steps": [i.step or 1 for i in step.index],
    }
    names = [
        emitter.constant(f"{step.name}.{key}", np.array(values, dtype=np.int64))
        for key, values in constants.items()
    ]
    _emit_reorder(emitter, step, "Slice", *names)


def _emit_pad(emitter: _Emitter, step: Pad) -> None:
    """Add padding: ONNX has the widths before all dimensions first, PyTorch the last dimension."""
    widths = np.zeros((4, 2), dtype=np.int64)
    pairs = np.array(step.widths).reshape(-1, 2)[::-1]
    widths[4 - len(pairs) :] = pairs
    zero = np.uint8(step.out_grid.zero_point) if step.out_grid else np.float32(0)
    names = [
        emitter.constant(f"{step.name}.widths", widths.T.flatten()),
        emitter.constant(f"{step.name}.zero", np.asarray(zero)),
    ]
    _emit_reorder(emitter, step, "Pad", *names)


def _pool_geometry(module: nn.MaxPool2d) -> dict[str, object]:
    """Return the attributes of max pooling."""
    pairs = (module.kernel_size, module.stride, module.padding, module.dilation)
    kernel, stride, padding, dilation = (list(v) if isinstance(v, tuple) else [v, v] for v in pairs)
    options = {"strides": stride, "pads": padding * 2, "dilations": dilation}
    return {"kernel_shape": kernel, "ceil_mode": int(module.ceil_mode), **options}


EMITTERS: dict[type[Step], Callable[[_Emitter, Step], None]] = {
    Quantize: _emit_quantize,
    Layer: _emit_layer,
    Sum: _emit_sum,
    GlobalPool: _emit_global_pool,
    Rectify: _emit_rectify,
    MaxPool: _emit_max_pool,
    Flatten: _emit_flatten,
    Slice: _emit_slice,
    Pad: _emit_pad,
}
