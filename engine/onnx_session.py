"""ONNX Runtime: sessions on the CPU, what became of a model's nodes, and whether sums are exact."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import FileError
from engine.extras import require
from engine.integer_network import IntegerNetwork, Layer
from engine.onnx_export import layer_to_onnx

# What sums products, or numbers, in integers; and the same in float32.
INTEGER_KERNELS = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "QLinearGlobalAveragePool",
    "QLinearAdd",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
}
FLOAT_KERNELS = {
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "GlobalAveragePool",
    "AveragePool",
}
ERRORS_ONLY = 3  # of ONNX Runtime's log
Run = Callable[[Tensor], Tensor]


def open_session(model: bytes, name: str, optimized: Path | None = None) -> Run:
    """Return a function that runs the model: its one input (batch, …) → its one output.

    It uses as many threads as PyTorch. `optimized`: where to write what the engine makes of it.
    Raises FileError, with the model's name, where the engine does not take it.
    """
    ort = require("onnxruntime", "--verify")
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    if optimized:
        options.optimized_model_filepath = str(optimized)
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of kinds that the package does not export
        reason = str(error).splitlines()[0]
        raise FileError(f"{name}: ONNX Runtime {ort.__version__} refuses it: {reason}") from error
    [source] = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {source.name: x.numpy()})[0])


def optimized_nodes(model: bytes, name: str) -> dict[str, str]:
    """Return the operator of every node that the engine runs, by the node's name."""
    onnx = require("onnx", "--verify")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        open_session(model, name, path)
        nodes = onnx.load(path).graph.node
    return {node.name or f"{node.op_type}_{i}": node.op_type for i, node in enumerate(nodes)}


def inexact_layers(net: IntegerNetwork) -> list[str]:
    """Return the layers whose results on this processor are not those of exact integer sums.

    Each is tried on codes that are 0 or the largest: without VNNI, sums of two products saturate at
    16 bits, which needs weights of 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    names = []
    for layer in net.layers():
        codes = _extreme_codes(layer, generator)
        model = layer_to_onnx(layer, codes.shape[1:])
        output = open_session(model, layer.name)(codes)
        if not torch.equal(output.float(), layer.run(codes.float())):
            names.append(layer.name)
    return names


def _extreme_codes(layer: Layer, generator: torch.Generator) -> Tensor:
    """Return inputs of a layer, uint8: one of the largest codes, others with zeros at random."""
    m = layer.module
    shape = (4, m.in_features) if hasattr(m, "in_features") else (4, m.in_channels, 6, 6)
    codes = torch.randint(0, 2, shape, generator=generator)
    codes[0] = 1
    return (codes * layer.in_grid.max_code).to(torch.uint8)
