"""What `quant_inference.py --verify` measures: an ONNX file against simulations and float32."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from timeit import Timer
from typing import Any

import torch
from torch import Tensor, fx, nn

from engine.deploy import onnx_session
from engine.deploy.comparison import first_disagreement
from engine.deploy.deployed_files import (
    ImageDataset,
    packed,
    read_model,
    to_onnx,
    verification_record,
)
from engine.deploy.integer_network import IntegerNetwork
from engine.deploy.integer_operations import Layer
from engine.deploy.runtimes import compare_runtime
from engine.images.loader import Loader
from engine.networks.outputs import run_network
from engine.quantization.coverage import first_names
from engine.system.environment import describe_environment, processor_name
from engine.system.extras import require
from engine.system.io import save_json

BATCHES = (1, 128)  # images at once whose times are measured
ROUNDS = 5
SECONDS_PER_ROUND = 0.3
N_COMPARED = 16  # images on which operations are compared one by one
RUNTIME = "engine"  # the key of ONNX Runtime in records, the same since the first one
Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Compared:
    """What an ONNX file is compared with.

    Attributes:
        integers: its exact simulation.
        simulations: networks with quantized weights and inputs that PyTorch runs, by what they are.
        quantized: the graph with quantized weights; biases and inputs are not rounded.
        float_net: the graph before it was quantized, without batch norms.
        net: the network itself.
    """

    integers: IntegerNetwork
    simulations: Mapping[str, nn.Module]
    quantized: fx.GraphModule
    float_net: fx.GraphModule
    net: nn.Module


def verify_file(
    path: Path,
    compared: Compared,
    *,
    test: Loader,
    dataset: ImageDataset,
    source: Mapping[str, str],
    runtimes: Sequence[str] = (),
) -> bool:
    """Measure an ONNX file, print that and write it beside the file; tell whether all agrees.

    What ONNX Runtime gives on all test images is compared with simulations; `test` makes normalized
    batches of these in their order. So is what other `runtimes` give, by name. Raises FileError
    where the file is not of this source or a runtime refuses it.
    """
    model = read_model(path, source, dataset.test_images.shape[1:])
    integers = compared.integers
    session = onnx_session.open_session(model, "the model")
    images = test.pixels()
    logits = logits_on(test, session, compared, images)
    first = next(iter(test.batches(0)))[0][:N_COMPARED].cpu()
    simulated = logits["integer"], integers, first
    measured = {
        "file": path.name,
        "source": dict(source),
        **compare_predictions(logits, test.labels.cpu(), integers),
        "runtimes": {name: compare_runtime(name, model, images, *simulated) for name in runtimes},
        "disagreement": first_disagreement(integers, compared.quantized.cpu(), first),
        "inexact_layers": onnx_session.inexact_operations(integers, model),
        "nodes": onnx_session.optimized_nodes(model, "the model"),
        "images_per_second": measure_speed(session, compared, test, dataset, images),
        "bytes": {
            "file": len(model),
            "packed": sum(each.nbytes for each in packed(integers.integers()).values()),
            # in a graph a weight that several layers share is there several times
            "float32": 4 * min(map(n_numbers, (compared.float_net, compared.net))),
        },
        "onnxruntime": require("onnxruntime", "--verify").__version__,
        "environment": describe_environment(),
    }
    print(f"\n{format_report(measured)}")
    for line in warnings(measured):
        print(f"quant_inference.py: warning: {line}", file=sys.stderr)
    record = verification_record(path)
    save_json(measured, record)
    print(f"verified: {record}")
    differing = [measured["differing_predictions"]["integer"], measured["disagreement"]]
    differing += [each["differing_predictions"] for each in measured["runtimes"].values()]
    return not any(differing)


def n_numbers(net: nn.Module) -> int:
    """Return how many numbers are stored: of a graph in buffers, else in parameters."""
    return sum(each.numel() for each in [*net.parameters()] or net.buffers())


@torch.inference_mode()
def logits_on(test: Loader, session: Run, compared: Compared, images: Tensor) -> dict[str, Tensor]:
    """Return the logits of ONNX Runtime and of all networks on the test images, by name."""
    nets = {"integer": compared.integers, **compared.simulations, "unquantized": compared.float_net}
    parts: dict[str, list[Tensor]] = {name: [] for name in (RUNTIME, *nets)}
    n_done = 0
    for x, _ in test.batches(0):
        parts[RUNTIME].append(session(images[n_done : n_done + len(x)].contiguous()))
        n_done += len(x)
        for name, net in nets.items():
            parts[name].append(run_network(net.to(x.device), x)[0].cpu())
    return {name: torch.cat(parts[name]) for name in parts}


def compare_predictions(
    logits: Mapping[str, Tensor], labels: Tensor, integers: IntegerNetwork
) -> dict[str, Any]:
    """Return accuracies, and how far each simulation is from ONNX Runtime.

    Differences of logits are in units of the last layer's scale, the largest of its channels'.
    """
    last = [*integers.integers().values()][-1]
    scale = last.product_scale(last.parts[0]).max()
    predicted = {name: each.argmax(1) for name, each in logits.items()}
    reference, predicted_by_runtime = logits[RUNTIME], predicted[RUNTIME]
    nets = [name for name in logits if name != RUNTIME]
    return {
        "n_images": len(labels),
        "accuracy": {k: (v == labels).double().mean().item() for k, v in predicted.items()},
        "differing_predictions": {
            name: (predicted[name] != predicted_by_runtime).sum().item() for name in nets
        },
        "largest_logit_difference": {
            name: ((logits[name] - reference).abs() / scale).max().item() for name in nets
        },
    }


def measure_speed(
    session: Run, compared: Compared, test: Loader, dataset: ImageDataset, images: Tensor
) -> dict[str, dict[str, float]]:
    """Return the images per second of the file and of float32, by batch size.

    All of them begin with uint8 images, take turns, and have PyTorch's number of threads. Images
    are there several times where a batch has more than there are.
    """
    float_net = compared.float_net.cpu().to(memory_format=torch.channels_last)
    scale, shift = test.scale.cpu(), test.shift.cpu()

    @torch.inference_mode()
    def in_pytorch(batch: Tensor) -> Tensor:
        x = batch.to(torch.float32, memory_format=torch.channels_last)
        return run_network(float_net, x.mul_(scale).add_(shift))[0]

    runs = {RUNTIME: session, "float32 PyTorch": in_pytorch}
    for name, net in other_networks(compared).items():
        model = to_onnx(net, images.shape[1:], dataset.mean, dataset.std, {})
        runs[name] = onnx_session.open_session(model, name)
    speeds = {}
    for n in BATCHES:
        batch = images[torch.arange(n) % len(images)]
        seconds = seconds_per_call(runs, batch)
        speeds[str(n)] = {name: n / seconds[name] for name in runs}
    return speeds


def other_networks(compared: Compared) -> dict[str, IntegerNetwork]:
    """Return the networks whose speed says something beside that of the file.

    The float32 one and, where layers have two weights, those without the second.
    """
    nets = {"float32 ONNX Runtime": IntegerNetwork.from_graph(compared.float_net.cpu())}
    if any(len(layer.parts) > 1 for layer in compared.integers.integers().values()):
        nets["without the second sums"] = first_parts(compared.integers, False)
        nets["one fused convolution a layer"] = first_parts(compared.integers, True)
    return nets


def first_parts(net: IntegerNetwork, is_fused: bool) -> IntegerNetwork:
    """Return the network with the first weight of each layer only, fused or as it was."""
    operations = [
        replace(
            each,
            integers=replace(each.integers, parts=each.integers.parts[:1]),
            is_fused=is_fused or len(each.integers.parts) == 1,
        )
        if isinstance(each, Layer)
        else each
        for each in net.operations
    ]
    return IntegerNetwork(operations, net.output)


def seconds_per_call(runs: Mapping[str, Run], batch: Tensor) -> dict[str, float]:
    """Return the median over rounds of each function's mean time; in each round all take turns."""
    timers = {name: Timer(lambda run=run: run(batch)) for name, run in runs.items()}
    n_calls = {}
    for name, timer in timers.items():
        timer.timeit(1)  # which allocates
        n_calls[name] = max(1, round(SECONDS_PER_ROUND / timer.timeit(1)))
    rounds = [
        {name: timer.timeit(n_calls[name]) / n_calls[name] for name, timer in timers.items()}
        for _ in range(ROUNDS)
    ]
    return {name: median(seconds[name] for seconds in rounds) for name in runs}


def format_report(measured: Mapping[str, Any]) -> str:
    """Return the report as text."""
    n = measured["n_images"]
    accuracy = measured["accuracy"]
    machine = f"{processor_name()}, threads: {torch.get_num_threads()}"
    lines = [
        f"{measured['file']} in ONNX Runtime {measured['onnxruntime']} on {machine}",
        f"accuracy: {accuracy[RUNTIME]:.2%}, unquantized {accuracy['unquantized']:.2%}",
    ]
    for name, n_differing in measured["differing_predictions"].items():
        if name != "unquantized":
            lines.append(
                f"simulated ({name}): {accuracy[name]:.2%}, {n_differing} of {n} predictions "
                f"differ, logits by up to {measured['largest_logit_difference'][name]:.4g} of the "
                "last scale"
            )
    for name, result in measured["runtimes"].items():
        lines.append(
            f"{name} {result['version']}: {result['differing_predictions']} of {n} predictions and "
            f"{result['differing_logits']:,} of {result['n_logits']:,} logits differ"
        )
    for batch, speeds in measured["images_per_second"].items():
        titles = {name: "this file" if name == RUNTIME else name for name in speeds}
        numbers = ", ".join(f"{titles[name]} {speed:,.0f}" for name, speed in speeds.items())
        lines.append(f"images/s at batch {batch}: {numbers}")
    size = measured["bytes"]
    lines.append(
        f"bytes: file {size['file']:,}, packed integers {size['packed']:,}, "
        f"float32 weights {size['float32']:,}"
    )
    for title, is_integer in (("integer kernels", True), ("around them", False)):
        operators = measured["nodes"].values()
        counts = Counter(o for o in operators if (o in onnx_session.INTEGER_KERNELS) == is_integer)
        lines.append(f"{title}: " + ", ".join(f"{n} {op}" for op, n in counts.most_common()))
    return "\n".join(lines)


def warnings(measured: Mapping[str, Any]) -> list[str]:
    """Return a line for everything that is not as it should be."""
    lines = []
    if in_float := [k for k, op in measured["nodes"].items() if op in onnx_session.FLOAT_KERNELS]:
        lines.append(f"not on integer kernels: {', '.join(in_float)}")
    if names := measured["inexact_layers"]:
        lines.append(f"{first_names(names)}: not computed exactly on this processor")
    if line := measured["disagreement"]:
        lines.append(line)
    if n := measured["differing_predictions"]["integer"]:
        lines.append(f"{n} of {measured['n_images']} predictions differ from the simulation")
    for name, result in measured["runtimes"].items():
        if n := result["differing_predictions"]:
            lines.append(f"{name}: {n} predictions differ; {result['first_difference']}")
    return lines
