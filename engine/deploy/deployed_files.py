"""The files that a quantized network is deployed with: ONNX, packed integers, weights as floats."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.deploy.integer_layers import IntegerLayer, n_bits_needed
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.onnx_emitter import DEFAULT_FORM, Emitter, FileForm, TensorProto, helper, onnx
from engine.deploy.runtimes import RUNTIMES, WEB_PACKAGE, node_package
from engine.system import distributed
from engine.system.errors import FileError, SetupError
from engine.system.extras import require
from engine.system.io import atomic_write, file_boundary, save_weights

PACKAGES = {
    "export": ("onnx",),
    "verify": ("onnx", "onnxruntime"),
    "save_integers": ("safetensors",),
    "page": ("onnx",),
    "save_quantized": (),
}
FORMAT_KEY = "regulquant_format"  # in a model's metadata
FORMAT = "1"
# What the metadata of earlier versions' files do not say.
NOT_RECORDED = dict(
    act_symmetry="symmetric", equalize="false", rounding="nearest", clip_p="2.4", step_size="half",
    output_bias_correction="false", budget_bits="null",
)  # fmt: skip
UNKNOWN = ("quantize_sums", "dataset", "seed")  # nor do they say these, which could be anything


class ImageDataset(Protocol):
    """What is needed of data.ImageDataset."""

    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


def verification_record(model: Path) -> Path:
    """Return where --verify writes what it found of that ONNX file."""
    return model.with_suffix(".verified.json")


def check_run(flags: Collection[str], runtimes: Collection[str] = ()) -> None:
    """Raise SetupError where the given ones of PACKAGES need what is missing, or one process.

    `runtimes` are those of --verify, which must not be missing either.
    """
    for flag in flags:
        for package in PACKAGES[flag]:
            require(package, f"--{flag}")
        if distributed.get_world_size() > 1:
            raise SetupError(f"--{flag} runs in one process: start it without torchrun")
    if "page" in flags:
        node_package(WEB_PACKAGE, "--page")
    for name in runtimes:
        RUNTIMES[name].load()


def describe_source(
    path: Path,
    settings: Mapping[str, Any],
    how: Any,
    model: str,
    classes: Sequence[str],
    seed: int | None = None,
) -> dict[str, str]:
    """Return a file's metadata: what it was made from, and how. All of it decides the integers.

    `settings` are the values of the script's flags by name, `how` has scheme, n_bits and act_bits;
    `seed` is None where no integer depends on it.
    """
    learned = "{rounding} on {rounding_images} images in {rounding_steps} steps"
    pwlq = [settings[flag] for flag in ("distribution", "approximate", "overlapping")]
    return {
        "model": model,
        "rounding": learned.format(**settings) if settings["rounding"] != "nearest" else "nearest",
        "checkpoint": path.name,
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "class_names": json.dumps(classes),
        "scheme": how.scheme,
        "bits": str(how.n_bits),
        "act_bits": str(how.act_bits),
        "budget_bits": json.dumps(settings.get("budget_bits")),
        "act_symmetry": settings.get("act_symmetry", NOT_RECORDED["act_symmetry"]),
        **{k: json.dumps(settings[k]) for k in ("per_channel", "keep_first_last", "equalize")},
        "output_bias_correction": json.dumps(_output_correction(settings)),
        "clip_p": str(settings["clip_p"]),
        "step_size": settings.get("step_size", NOT_RECORDED["step_size"]),
        "pwlq": json.dumps(pwlq),
        "calibration": "{calibration} of {calibration_images} images".format(**settings),
        "quantize_sums": json.dumps(settings["quantize_sums"]),
        "dataset": settings["dataset"],
        "seed": json.dumps(seed),
    }


def _output_correction(settings: Mapping[str, Any]) -> str | bool:
    """Return how outputs were corrected, as earlier versions say it where they could do it."""
    how = settings.get("output_bias_correction")
    return {None: False, "quantized": True}.get(how, how)


def write_files(
    paths: Mapping[str, str | None],
    net_q: nn.Module,
    integers: IntegerNetwork | None = None,
    dataset: ImageDataset | None = None,
    source: Mapping[str, str] | None = None,
    form: FileForm = DEFAULT_FORM,
) -> None:
    """Write the files whose paths are given by flag: ONNX, `net_q`'s weights, packed integers.

    `integers`, `dataset` and `source`, the metadata, are for the first and the last of them, `form`
    for the first. Raises OSError.
    """
    if path := paths.get("export"):
        shape = dataset.test_images.shape[1:]
        model = to_onnx(integers, shape, dataset.mean, dataset.std, source, form)
        atomic_write(Path(path), lambda temporary: temporary.write_bytes(model))
        print(f"integers as ONNX:  {path}")
    if path := paths.get("save_quantized"):
        save_weights(net_q, Path(path))
        print(f"quantized weights: {path}")
    if path := paths.get("save_integers"):
        save_integers(integers.integers(), source, Path(path))
        print(f"packed integers:   {path}")


def to_onnx(
    net: IntegerNetwork,
    image_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    metadata: Mapping[str, str],
    form: FileForm = DEFAULT_FORM,
) -> bytes:
    """Return the ONNX model of a network, as a file's content; a quantized one has Q/DQ pairs.

    It maps "images", uint8 (batch, *image_shape), to "logits", (batch, classes). Images are
    normalized by mean and std, of pixels scaled to 0..1, as in engine/images/loader.py. The output
    of every quantized operation is a value with the operation's name. What each operation becomes
    is defined with its simulation in engine/deploy/integer_operations.py.
    """
    emitter = Emitter(form)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    scale = emitter.constant("normalize.scale", (1 / (255 * std)).float())
    shift = emitter.constant("normalize.shift", (-mean / std).float())
    scaled = emitter.node("Mul", [emitter.cast_to_float("images", "pixels"), scale], "scaled")
    emitter.node("Add", [scaled, shift], "input")
    for operation in net.operations:
        operation.emit(emitter)
    emitter.node("Identity", [emitter.as_float(net.output)], "logits")
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *image_shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "classes"])
    model = emitter.model([images], logits)
    helper.set_model_props(model, {FORMAT_KEY: FORMAT, **metadata})
    return model.SerializeToString()


def pack(codes: Tensor, n_bits: int) -> np.ndarray:
    """Return int8 codes of n_bits, which fit, as ⌈n·n_bits / 8⌉ bytes."""
    unsigned = codes.flatten().numpy().astype(np.int16) + 2 ** (n_bits - 1)
    bits = (unsigned[:, None] >> np.arange(n_bits)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little")


def packed(layers: Mapping[str, IntegerLayer]) -> dict[str, np.ndarray]:
    """Return the weights, scales and biases by their names in a file."""
    arrays = {}
    for name, layer in layers.items():
        for i, part in enumerate(layer.parts):
            arrays[f"{name}.codes{i}"] = pack(part.codes, n_bits_needed(part.codes))
            arrays[f"{name}.scale{i}"] = part.scale.flatten().numpy()
        arrays[f"{name}.bias"] = layer.bias.numpy()
    return arrays


def save_integers(
    layers: Mapping[str, IntegerLayer], metadata: Mapping[str, str], path: Path
) -> None:
    """Write the layers' integers: weights of b bits packed into bytes, with scales and biases.

    For each layer NAME and part i of its weight: `NAME.codes<i>`, uint8, code + 2^(b − 1) in b
    bits, the lowest bit first, across bytes; `NAME.scale<i>`, float32; `NAME.bias`, int32. The
    file's metadata "layers" is JSON: {NAME: {"shape", "bits": one a part, "input_scale",
    "input_zero_point", "input_bits"}}. docs/deploy.md has a loader of ten lines. Raises OSError.
    """
    numpy_files = require("safetensors.numpy", "--save_integers")
    described = {
        name: {
            "shape": list(layer.parts[0].codes.shape),
            "bits": [n_bits_needed(part.codes) for part in layer.parts],
            "input_scale": layer.in_grid.scale,
            "input_zero_point": layer.in_grid.zero_point,
            "input_bits": layer.in_grid.n_bits,
        }
        for name, layer in layers.items()
    }
    content = numpy_files.save(packed(layers), {**metadata, "layers": json.dumps(described)})
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def read_model(path: Path, source: Mapping[str, str], image_shape: Sequence[int]) -> bytes:
    """Return the bytes of an exported file.

    Raises FileError where it is none, or not of this source and images of `image_shape` (3, H, W).
    """
    with file_boundary(path, "is damaged or not an ONNX model"):
        model = onnx.load_from_string(path.read_bytes())
        onnx.checker.check_model(model)
    metadata = {key: source.get(key) for key in UNKNOWN} | NOT_RECORDED
    metadata |= {p.key: p.value for p in model.metadata_props}
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise FileError(f"{path} is an ONNX model, but not one that this version's --export makes")
    for key, value in source.items():
        if key == "checkpoint_sha256" and metadata.get(key) != value:
            made_of = metadata.get("checkpoint")
            raise FileError(f"{path} was made of other weights than these, of {made_of}")
        if key != "checkpoint" and metadata.get(key) != value:
            raise FileError(f"{path} was made with {key} {metadata.get(key)}, and this is {value}")
    ends = [each.name for each in (*model.graph.input, *model.graph.output)]
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim][1:]
    if ends != ["images", "logits"] or shape != [*image_shape]:
        raise FileError(
            f"{path} takes {ends[0]} of {shape} to {ends[-1]}: it should be images of "
            f"{[*image_shape]} to logits"
        )
    return model.SerializeToString()
