"""The files that a quantized network is deployed with: ONNX, packed integers, weights as floats."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from engine.deploy import onnx_export
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.packing import save_integers
from engine.system import distributed
from engine.system.errors import FileError, SetupError
from engine.system.extras import require
from engine.system.io import save_weights

PACKAGES = {
    "export": ("onnx",),
    "verify": ("onnx", "onnxruntime"),
    "save_integers": ("safetensors",),
    "save_quantized": (),
}
# What the metadata of earlier versions' files do not say.
NOT_RECORDED = {"equalize": "false", "rounding": "nearest", "clip_p": "2.4"}


class ImageDataset(Protocol):
    """What is needed of data.ImageDataset."""

    test_images: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


def check_run(args: argparse.Namespace) -> None:
    """Raise SetupError where the flags need packages that are missing, or one process only."""
    for flag, packages in PACKAGES.items():
        if getattr(args, flag):
            for package in packages:
                require(package, f"--{flag}")
            if distributed.get_world_size() > 1:
                raise SetupError(f"--{flag} runs in one process: start it without torchrun")


# --- files -----------------------------------------------------------------------------------


def describe_source(
    path: Path, args: argparse.Namespace, n_bits: int, act_bits: int, dataset: ImageDataset
) -> dict[str, str]:
    """Return a file's metadata: what it was made from, and how. All of it decides the integers."""
    learned = f"adaround on {args.rounding_images} images in {args.rounding_steps} steps"
    return {
        "rounding": learned if args.rounding == "adaround" else "nearest",
        "checkpoint": path.name,
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "class_names": json.dumps(dataset.classes),
        "scheme": args.schemes[0],
        "bits": str(n_bits),
        "act_bits": str(act_bits),
        "per_channel": json.dumps(args.per_channel),
        "keep_first_last": json.dumps(args.keep_first_last),
        "equalize": json.dumps(args.equalize),
        "clip_p": str(args.clip_p),
        "pwlq": json.dumps([args.distribution, args.approximate, args.overlapping]),
        "calibration": f"{args.calibration} of {args.calibration_images} images",
    }


def write_files(
    args: argparse.Namespace,
    net_q: nn.Module,
    integers: IntegerNetwork | None = None,
    dataset: ImageDataset | None = None,
    source: Mapping[str, str] | None = None,
) -> None:
    """Write the files that the flags name. Raises OSError."""
    if args.export:
        model = to_model(integers, dataset, source)
        onnx_export.save_model(model, Path(args.export))
        print(f"integers as ONNX:  {args.export}")
    if args.save_quantized:
        save_weights(net_q, Path(args.save_quantized))
        print(f"quantized weights: {args.save_quantized}")
    if args.save_integers:
        save_integers(integers.integers(), source, Path(args.save_integers))
        print(f"packed integers:   {args.save_integers}")


def to_model(
    net: IntegerNetwork, dataset: ImageDataset, source: Mapping[str, str], **options: bool
) -> bytes:
    """Return the ONNX model of a network of the data set's images."""
    shape = dataset.test_images.shape[1:]
    return onnx_export.to_onnx(net, shape, dataset.mean, dataset.std, source, **options)


def read_model(path: Path, source: Mapping[str, str]) -> bytes:
    """Return the bytes of an exported file; FileError where it is not of this source."""
    model = onnx_export.load_model(path)
    metadata = NOT_RECORDED | {p.key: p.value for p in model.metadata_props}
    for key, value in source.items():
        if key != "checkpoint" and metadata.get(key) != value:
            raise FileError(f"{path} was made with {key} {metadata.get(key)}, and this is {value}")
    return model.SerializeToString()
