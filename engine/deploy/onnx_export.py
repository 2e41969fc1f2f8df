"""ONNX files of networks: uint8 images in, logits out; quantized ones with Q/DQ pairs.

What each operation becomes is defined with its simulation in engine/deploy/integer_operations.py.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.integer_operations import Arithmetic
from engine.deploy.onnx_emitter import Emitter, TensorProto, helper

FORMAT_KEY = "regulquant_format"  # in a model's metadata
FORMAT = "1"


def to_onnx(
    net: IntegerNetwork,
    image_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    metadata: Mapping[str, str],
) -> bytes:
    """Return the model, as a file's content.

    It maps "images", uint8 (batch, *image_shape), to "logits", (batch, classes). Images are
    normalized by mean and std, of pixels scaled to 0..1, as in engine/images/loader.py. The output
    of every quantized operation is a value with the operation's name.
    """
    emitter = Emitter()
    emitter.normalize(mean, std)
    for operation in net.operations:
        operation.emit(emitter)
    emitter.node("Identity", [emitter.as_float(net.output)], "logits")
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *image_shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "classes"])
    model = emitter.model([images], logits)
    helper.set_model_props(model, {FORMAT_KEY: FORMAT, **metadata})
    return model.SerializeToString()


def operation_to_onnx(operation: Arithmetic, codes: Sequence[Tensor]) -> bytes:
    """Return a model of one quantized operation alone: inputs such as `codes` → its output."""
    emitter = Emitter()
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
