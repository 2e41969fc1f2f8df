"""Count what a training step of ConvNet launches, and time that of a tiny ResNet20 on the host.

A launch is an operation of PyTorch that computes something: on a GPU, a kernel or a few. Views and
empty tensors are none. With --compiled, a compiled function counts as one, which is the least that
it can be; without, its operations count. The last line is a JSON object of
launches and of milliseconds of a step (the median), by regularizer.

    python benchmarks/launches.py [--compiled] [--repetitions 200]
"""

import argparse
import json
import statistics
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import _root  # noqa: F401
import torch
from step_time import ROWS, milliseconds
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from engine.networks import batch_norm_kernels as kernels
from engine.step.gradients import compute_gradients
from engine.step.metrics import batch_metrics_row
from regularizers import make_regularizer

FREE = {  # operations that launch nothing
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view",
    "alias", "as_strided", "as_strided_", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "promote_types", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold",
    "unsqueeze", "view",
}  # fmt: skip
COUNTED_ROWS = ("none", "L1Grad", "L2Grad", "L2Grad, difference")


class LaunchCounter(TorchDispatchMode):
    """Context manager that counts launches in `launches`, by the operation's name."""

    def __init__(self) -> None:
        """Begin at none."""
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.in_compiled = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, and count it unless it is part of a compiled function."""
        name = func.overloadpacket.__name__
        if name not in FREE and not self.in_compiled:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))

    def as_one(self, name: str, fn):
        """Return fn such that a call of it counts as one launch of that name."""

        def call(*args, **options):
            self.launches[name] += 1
            self.in_compiled = True
            try:
                return fn(*args, **options)
            finally:
                self.in_compiled = False

        return call


def compiled_functions() -> list[str]:
    """Return the names of the compiled functions of engine/networks/batch_norm_kernels.py."""
    return [name for name, fn in vars(kernels).items() if getattr(fn, "is_compiled", False)]


def count(step, compiled: bool) -> Counter[str]:
    """Return the launches of one call of `step`, by the operation's name."""
    counter = LaunchCounter()
    with ExitStack() as stack:
        for name in compiled_functions() if compiled else ():
            one = counter.as_one(f"compiled {name}", getattr(kernels, name))
            stack.enter_context(mock.patch.object(kernels, name, one))
        stack.enter_context(counter)
        step()
    return counter.launches


def make_step(row: str, model: str = "ConvNet", width: float = 1.0, size: int = 32):
    """Return a function that does a whole step of training with two images of size × size."""
    torch.manual_seed(0)
    net = utils.make_net(model, 10, "cpu", width).train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=5e-4, fused=True)
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    y, reg = torch.randint(10, (2,)), make_regularizer(ROWS[row].regularizer, 0.01)
    dtype, h = torch.bfloat16, ROWS[row].difference_step

    def step() -> None:
        result = compute_gradients(net, nn.CrossEntropyLoss(), reg, x, y, dtype, 1.0, h)
        batch_metrics_row(net, 2, *result)
        optimizer.step()

    return step


def main() -> None:
    """Print a table of launches by operation and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--repetitions", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for row in COUNTED_ROWS:
        step = make_step(row)
        step()
        launches = count(step, args.compiled)
        print(f"{row}:", ", ".join(f"{n} {name}" for name, n in launches.most_common(12)))
        tiny_step = make_step(row, "ResNet20", 0.25, 8)
        tiny_step()
        times = [milliseconds(tiny_step) for _ in range(args.repetitions)]
        figures[row] = [sum(launches.values()), round(statistics.median(times), 3)]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
