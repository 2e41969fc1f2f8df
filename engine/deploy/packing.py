"""Files of integers: weights of b bits packed into bytes, with scales and biases (safetensors).

For each layer NAME and part i of its weight: `NAME.codes<i>`, uint8, code + 2^(b − 1) in b bits,
the lowest bit first, across bytes; `NAME.scale<i>`, float32; `NAME.bias`, int32. The file's
metadata "layers" is JSON: {NAME: {"shape", "bits": one a part, "input_scale",
"input_zero_point", "input_bits"}}. docs/deploy.md has a loader of ten lines.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from engine.deploy.integer_layers import IntegerLayer, n_bits_needed
from engine.system.extras import require
from engine.system.io import atomic_write


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
    """Write the layers' integers; see the module for the format. Raises OSError."""
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
