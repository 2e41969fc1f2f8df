"""A page that runs a network in a browser: integers and floating point side by side."""

import base64
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from engine.deploy.deployed_files import ImageDataset, to_onnx
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.onnx_emitter import FileForm
from engine.deploy.runtimes import WEB_PACKAGE, node_package
from engine.images.loader import Loader
from engine.system.io import atomic_write

FILES = {  # of the package: its program for WebAssembly alone
    "runtime": "dist/ort.wasm.bundle.min.mjs",
    "wasm": "dist/ort-wasm-simd-threaded.wasm",
}
N_IMAGES = 100  # test images that the page shows
TEMPLATE = Path(__file__).with_name("page.html")


def _base64(content: bytes | np.ndarray) -> str:
    return base64.b64encode(bytes(content)).decode("ascii")


def write_page(
    path: Path,
    graph: fx.GraphModule,
    integers: IntegerNetwork,
    form: FileForm,
    test: Loader,
    dataset: ImageDataset,
    source: Mapping[str, str],
) -> None:
    """Write one self-contained HTML file, of 20 MB and more: runtime, models, images are inside.

    `graph` is the network in float, folded; `test` makes normalized batches of the test images.
    Raises SetupError where the runtime's package is missing, OSError where the file cannot be
    written.
    """
    folder = node_package(WEB_PACKAGE, "--page")
    nets = {"integers": integers, "float": IntegerNetwork.from_graph(graph)}
    options = dataset.test_images.shape[1:], dataset.mean, dataset.std, source, form
    n_batches = -(-N_IMAGES // test.batch_size)
    first = torch.cat([x.cpu() for x, _ in islice(test.batches(0), n_batches)])[:N_IMAGES]
    with torch.inference_mode():
        simulated = integers(first)[0]
    n_classes = simulated.shape[1]
    unnamed = [f"class {k}" for k in range(len(dataset.classes), n_classes)]
    images, labels = test.pixels(len(first)), dataset.test_labels[: len(first)]
    bits = "{bits}-bit weights and {act_bits}-bit inputs".format(**source)
    data: dict[str, Any] = {
        "title": f"{source['model']} in integers",
        "about": f"{source['checkpoint']}, {bits}, beside the same network in floating point, on "
        f"{len(images)} test images.",
        "classes": [*dataset.classes, *unnamed][:n_classes],
        "labels": labels.tolist(),
        "shape": list(images.shape[1:]),
        "images": _base64(images.contiguous().numpy().tobytes()),
        "simulated": _base64(simulated.numpy().astype("<f4").tobytes()),
        **{name: _base64(to_onnx(net, *options)) for name, net in nets.items()},
        "runtime": (folder / FILES["runtime"]).read_text(encoding="utf-8"),
        "wasm": _base64((folder / FILES["wasm"]).read_bytes()),
        "version": json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"],
    }
    text = json.dumps(data).replace("<", "\\u003c")  # no tag ends the script that holds it
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text)
    atomic_write(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
