"""ONNX Runtime: sessions on the CPU, what became of a model's nodes, and whether sums are exact."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.integer_operations import Arithmetic
from engine.deploy.onnx_emitter import (
    DEFAULT_FORM,
    TWICE,
    Emitter,
    FileForm,
    TensorProto,
    helper,
    onnx,
)
from engine.system.extras import require
from engine.system.io import file_boundary

# What sums products, or numbers, in integers; and the same in float32.
INTEGER_KERNELS = set(
    "QLinearConv QGemm QLinearMatMul QLinearGlobalAveragePool QLinearAdd ConvInteger MatMulInteger "
    "MatMulIntegerToFloat".split()
)
FLOAT_KERNELS = set(
    "Conv FusedConv Gemm FusedGemm MatMul FusedMatMul GlobalAveragePool AveragePool".split()
)
ERRORS_ONLY = 3  # of ONNX Runtime's log
Run = Callable[..., Tensor]


def open_session(model: bytes, name: str, optimized: Path | None = None) -> Run:
    """Return a function that runs the model: its inputs (batch, …) → its one output.

    It uses as many threads as PyTorch. `optimized`: where to write what the engine makes of it.
    Raises FileError, with the model's name, where the engine does not take it.
    """
    ort = require("onnxruntime", "--verify")
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    if optimized:
        options.optimized_model_filepath = str(optimized)
    with file_boundary(f"{name}:", f"ONNX Runtime {ort.__version__} refuses it"):
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [source.name for source in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def optimized_nodes(model: bytes, name: str) -> dict[str, str]:
    """Return the operator of every node that the engine runs, by the node's name."""
    onnx = require("onnx", "--verify")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        open_session(model, name, path)
        nodes = onnx.load(path).graph.node
    return {node.name or f"{node.op_type}_{i}": node.op_type for i, node in enumerate(nodes)}


def operation_to_onnx(
    operation: Arithmetic, codes: Sequence[Tensor], form: FileForm = DEFAULT_FORM
) -> bytes:
    """Return a model of one quantized operation alone: inputs such as `codes` → its output."""
    emitter = Emitter(form)
    emitter.grids |= zip(operation.sources, operation.in_grids, strict=True)
    sources = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", *example.shape[1:]])
        for name, example in zip(operation.sources, codes, strict=True)
    ]
    operation.emit(emitter)
    kind = TensorProto.UINT8 if operation.out_grid else TensorProto.FLOAT
    sizes = ["batch", *(f"out{i}" for i in range(codes[0].dim() - 1))]
    target = helper.make_tensor_value_info(operation.name, kind, sizes)
    return emitter.model(sources, target).SerializeToString()


def inexact_operations(net: IntegerNetwork, model: bytes) -> list[str]:
    """Return the layers, sums and poolings of a model that this processor does not compute exactly.

    Each is tried alone, on codes that show it, with 8-bit weights whole or in halves as the model
    has them.
    """
    nodes = onnx.load_model_from_string(model).graph.node
    has_halves = any(name.endswith(TWICE) for node in nodes for name in node.output)
    form = FileForm(may_saturate=not has_halves)
    generator = torch.Generator().manual_seed(0)
    names = []
    for each in net.operations:
        if not isinstance(each, Arithmetic) or None in each.in_grids:
            continue
        codes = each.trial_codes(generator)
        run = open_session(operation_to_onnx(each, codes, form), each.name)
        if not torch.equal(run(*codes).float(), each.run(*(c.float() for c in codes))):
            names.append(each.name)
    return names
