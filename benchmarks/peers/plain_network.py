"""What a peer's script shares with the others: the network, the job it reads, how it is measured.

It needs PyTorch alone, since it runs in the environments of the peers as well.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
BATCH = 100  # images that are measured at once
WATCHED = 64  # images on which the values of inputs are counted
POOLING = {aten.mean.dim, aten._adaptive_avg_pool2d.default, aten.avg_pool2d.default}
Node = tuple[str, str, dict[str, Any], list[str]]  # name, kind, options, names of what it reads


class Add(nn.Module):
    """The sum of two tensors."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add x and y, of one shape."""
        return x + y


class Subsample(nn.Module):
    """Every second pixel, and `before` and `after` new channels of zeros."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, before + C + after, ⌈H/2⌉, ⌈W/2⌉)."""
        return nn.functional.pad(x[:, :, ::2, ::2], self.padding)


KINDS = {
    "conv": nn.Conv2d,
    "linear": nn.Linear,
    "relu": nn.ReLU,
    "pool": nn.AdaptiveAvgPool2d,
    "flatten": nn.Flatten,
    "add": Add,
    "subsample": Subsample,
}


class PlainNetwork(nn.Module):
    """A network of PyTorch's own modules, made from a list of nodes in the order they run in."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        self.reads = {name: inputs for name, _, _, inputs in nodes}
        for name, kind, options, _ in nodes:
            self.add_module(name, KINDS[kind](**options))

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (B, 3, H, W) to logits (B, classes)."""
        values = {"images": x}
        for name, inputs in self.reads.items():
            values[name] = x = getattr(self, name)(*[values[each] for each in inputs])
        return x


class Watch(TorchDispatchMode):
    """Context manager that counts the distinct values that products and pooling are given.

    These are the tensors that PyTorch's own operations get, whatever a toolkit calls them.
    """

    def __init__(self, net: nn.Module, per_channel: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.stored = {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
        self.weight_levels: list[int] = []  # of each layer, per range
        self.input_levels: list[int] = []
        self.pooling_levels: list[int] = []
        self.biases_in_float = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Count, and run the operation."""
        if func is aten.convolution.default:
            self._layer(args[0], args[1], args[2])
        elif func is aten.addmm.default:  # bias, x, transposed weight
            self._layer(args[1], args[2].t(), args[0])
        elif func in POOLING:
            self.pooling_levels.append(args[0].unique().numel())
        return func(*args, **(kwargs or {}))

    def _layer(self, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
        ranges = w.flatten(1) if self.per_channel else w.reshape(1, -1)
        self.weight_levels.append(max(each.unique().numel() for each in ranges))
        self.input_levels.append(x.unique().numel())
        self.biases_in_float &= bias is None or bias.data_ptr() in self.stored


@torch.no_grad()
def measure(net: nn.Module, images: Tensor, labels: Tensor, per_channel: bool) -> dict[str, Any]:
    """Return a network's accuracy, and how many values its layers, inputs and logits take."""
    batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    n_correct = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    with Watch(net, per_channel) as watch:
        logits = net(images[:WATCHED])
    return {
        "accuracy": n_correct / len(labels),
        "weight_levels": watch.weight_levels,
        "input_levels": watch.input_levels,
        "pooling_levels": watch.pooling_levels,
        "logit_levels": logits.unique().numel(),
        "biases_in_float": watch.biases_in_float,
    }


def run_job(
    packages: Iterable[str],
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    quantize: Callable[..., nn.Module],
) -> None:
    """Quantize the network of the job file that the command line names in all ways; print records.

    Args:
        packages: whose versions a record holds.
        settings: returns the options of each way to quantize a row, by name.
        quantize: returns the quantized network of (network, row, options, job).
    """
    parser = argparse.ArgumentParser(description="Quantize the network of a job file.")
    parser.add_argument("job", help="file that benchmarks/toolkits.py has written")
    job = torch.load(parser.parse_args().job, weights_only=True)
    torch.set_num_threads(1)
    versions = {name: metadata.version(name) for name in packages}
    for row_name, row in job["rows"].items():
        for name, options in settings(row).items():
            if [row_name, name] in job["done"]:
                continue
            torch.manual_seed(0)
            net = PlainNetwork(job["nodes"]).eval()
            net.load_state_dict(job["network"])
            started = time.process_time()
            quantized = quantize(net, row, options, job)
            seconds = time.process_time() - started
            found = measure(quantized, job["test_images"], job["test_labels"], row["per_channel"])
            record = {"row": row_name, "setting": name, "seconds": seconds, **found}
            print(json.dumps(record | {"versions": versions}), file=sys.stdout, flush=True)
