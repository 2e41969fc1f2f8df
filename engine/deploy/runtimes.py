"""The runtimes that --verify can give a file to, each without options, as users start it.

`load` returns what `run` needs: the package of Python, or Node.js and the name of its package. It
raises SetupError, in one line, where that is missing. `run` takes this, a model's bytes and images,
uint8 (N, …), and returns the runtime's version and every output of the model by name, as NumPy
arrays. What it raises where the runtime does not take the model is a FileError of `run_model`.
"""

import base64
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.deploy.integer_layers import MAX_CODE
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.onnx_emitter import onnx
from engine.system.errors import SetupError
from engine.system.extras import require
from engine.system.io import file_boundary

Outputs = Mapping[str, np.ndarray]
BATCH = 100  # images at once
NODE_SCRIPT = Path(__file__).with_name("run_in_node.mjs")


class Runtime(NamedTuple):
    """What loads a runtime, and what runs a model in it; see the module."""

    load: Callable[[], Any]
    run: Callable[[Any, bytes, Tensor], tuple[str, Outputs]]


def _in_batches(run: Callable[[np.ndarray], Mapping[str, np.ndarray]], images: Tensor) -> Outputs:
    """Return the outputs on all images, by name."""
    parts = [run(batch.contiguous().numpy()) for batch in images.split(BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def run_in_onnxruntime(ort: ModuleType, model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Run a session without options, on the CPU."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    outputs = _in_batches(
        lambda x: dict(zip(names, session.run(None, {"images": x}), strict=True)), images
    )
    return ort.__version__, outputs


def run_in_openvino(openvino: ModuleType, model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Compile the model for the CPU."""
    number = version("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU")
    ports = {name: port for port in compiled.outputs for name in port.get_names()}

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        results = compiled(x)
        return {key: np.array(results[port]) for key, port in ports.items()}  # it reuses them

    return number, _in_batches(run, images)


def run_in_reference(reference: ModuleType, model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Evaluate node after node, as ONNX defines them."""
    evaluator = reference.ReferenceEvaluator(onnx.load_from_string(model))
    names = evaluator.output_names
    outputs = _in_batches(
        lambda x: dict(zip(names, evaluator.run(None, {"images": x}), strict=True)), images
    )
    return onnx.__version__, outputs


def run_in_tvm(tvm: ModuleType, model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Import the model into Relax and compile it for this processor, without tuning."""
    from tvm.relax import VirtualMachine
    from tvm.relax.frontend.onnx import from_onnx

    content = onnx.load_from_string(model)
    compiled = tvm.compile(from_onnx(content, keep_params_in_input=False), target="llvm")
    machine = VirtualMachine(compiled, tvm.cpu())
    names = [each.name for each in content.graph.output]

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        results = machine["main"](tvm.runtime.tensor(x))
        results = [results] if len(names) == 1 else results
        return {name: each.numpy() for name, each in zip(names, results, strict=True)}

    return tvm.__version__, _in_batches(run, images)


def run_in_tract(tract: ModuleType, model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Load the model in tract, a runtime in Rust."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            path.write_bytes(model)
            loaded = tract.onnx().load(path)
        names = [loaded.output_name(i) for i in range(loaded.output_count())]
        runnable = loaded.into_model().into_runnable()
    except tract.TractError as error:  # what follows its first line is a backtrace
        raise RuntimeError(str(error).partition("\n")[0]) from error

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, (each.to_numpy() for each in runnable.run([x])), strict=True))

    return tract.version(), _in_batches(run, images)


WEB_PACKAGE = "onnxruntime-web"  # of Node.js


def node_package(package: str, flag: str) -> Path:
    """Return the folder of a package of Node.js in the current folder; SetupError without it."""
    folder = Path("node_modules", package)
    if not folder.is_dir():
        raise SetupError(
            f"{flag} needs Node.js and, in this folder: npm install --no-save {package}"
        )
    return folder


def find_node(package: str) -> tuple[str, str]:
    """Return Node.js and the name of its package, which is installed in the current folder."""
    node_package(package, f"--runtimes {package}")
    node = shutil.which("node")
    if not node:
        raise SetupError(f"--runtimes {package} needs Node.js, the program node")
    return node, package


def run_in_node(program: tuple[str, str], model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Run a package of Node.js in a process of its own."""
    node, package = program
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("model.onnx", "images", "outputs.json")]
        paths[0].write_bytes(model)
        paths[1].write_bytes(images.contiguous().numpy().tobytes())
        shape = ",".join(map(str, images.shape))
        command = [node, NODE_SCRIPT, package, *paths, shape]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no word"]
            raise RuntimeError(next((line for line in lines if "Error:" in line), lines[-1]))
        result = json.loads(paths[2].read_text(encoding="utf-8"))
    outputs = {}
    for each in result["outputs"]:
        content = b"".join(map(base64.b64decode, each["batches"]))
        outputs[each["name"]] = np.frombuffer(content, each["type"]).reshape(len(images), -1)
    return result["version"], outputs


def _from_pip(
    module: str, name: str, file: str = "requirements-runtimes.txt"
) -> Callable[[], ModuleType]:
    return partial(require, module, f"--runtimes {name}", file)


RUNTIMES = {
    "onnxruntime": Runtime(_from_pip("onnxruntime", "onnxruntime"), run_in_onnxruntime),
    "openvino": Runtime(_from_pip("openvino", "openvino"), run_in_openvino),
    WEB_PACKAGE: Runtime(partial(find_node, WEB_PACKAGE), run_in_node),
    "onnxruntime-node": Runtime(partial(find_node, "onnxruntime-node"), run_in_node),
    "reference": Runtime(_from_pip("onnx.reference", "reference"), run_in_reference),
    "tract": Runtime(_from_pip("tract", "tract"), run_in_tract),
    "tvm": Runtime(_from_pip("tvm", "tvm", "requirements-tvm.txt"), run_in_tvm),
}


def run_model(name: str, model: bytes, images: Tensor) -> tuple[str, Outputs]:
    """Return the version of a runtime, and the model's outputs in it on images; see the module.

    Raises SetupError where it is missing, and FileError where it refuses the model.
    """
    load, run = RUNTIMES[name]
    loaded = load()
    with file_boundary("the model:", f"{name} refuses it"):
        return run(loaded, model, images)


def compare_runtime(
    name: str, model: bytes, images: Tensor, simulated: Tensor, net: IntegerNetwork, first: Tensor
) -> dict[str, object]:
    """Return how a runtime's logits differ from the simulated ones, (N, classes), on all images.

    `first` are the first images, normalized. Where a prediction differs, the integer network `net`
    says on these which operation's codes do first.
    """
    number, outputs = run_model(name, model, images)
    logits = torch.from_numpy(outputs["logits"].copy()).view_as(simulated)
    n_differing = (logits.argmax(1) != simulated.argmax(1)).sum().item()
    comparison = {
        "version": number,
        "differing_predictions": n_differing,
        "differing_logits": (logits != simulated).sum().item(),
        "n_logits": logits.numel(),
    }
    if n_differing:
        few = images[: len(first)]
        comparison["first_difference"] = first_difference(name, model, few, net, first)
    return comparison


def first_difference(
    runtime: str, model: bytes, images: Tensor, net: IntegerNetwork, x: Tensor
) -> str:
    """Return which operation's codes differ first from those of `net` on x, normalized images.

    To be seen, codes are made outputs of the model: a runtime then may not join what it joins
    otherwise, and find nothing.
    """
    watched = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    inferred = {value.name: value for value in watched.graph.value_info}
    names = [each.name for each in net.operations if each.out_grid and each.name in inferred]
    watched.graph.output.extend(inferred[name] for name in names)
    _, outputs = run_model(runtime, watched.SerializeToString(), images)
    values = net.values(x)
    for name in names:
        codes = outputs[name].astype(np.int64)
        codes += MAX_CODE * (outputs[name].dtype == np.int8)
        n_differing = (codes.ravel() != values[name].numpy().ravel()).sum()
        if n_differing:
            return f"{name}: {n_differing:,} of {codes.size:,} codes differ"
    return "no operation's codes differ where they are outputs of the model"
