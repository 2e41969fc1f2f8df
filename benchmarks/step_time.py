"""Time a training step: the plain reference against ours, alternating, on the same batch.

The reference is what a user would write: PyTorch's own modules, float32, the contiguous layout,
gradients by `create_graph=True`, penalty added to the loss. Ours is
`engine.step.gradients.compute_gradients`. Each has a process of its own and they take turns of two
steps, of which the second is timed: as in training, it follows a step of its own kind. A slow
moment of the machine meets all sides; a ratio is the median of the ratios within a turn. The last
line is a JSON object.

Rows of an exact penalty in every batch come first. Those after them are cheaper (by a difference,
in every 4th batch) and are compared with plain PyTorch's exact step in every batch; their time is
the mean of the 4 steps that repeat.

    python benchmarks/step_time.py [--model ResNet20] [--rounds 15] [--batch_size 128]

`--peers torch.func jax` adds the strongest exact steps of others: `torch.func`, compiled as one
graph (benchmarks/peers/functional_step.py), and JAX (jax_step.py), both in float32 and the layout
that is faster there. They have the rows none, L1Grad and L2Grad; neither updates the running
statistics of batch norms, which ours does.

`--compiled_step` adds ours as `train.py --step compiled` takes it, a side "compiled".

`--model all` measures every network of models.py, one after the other. Where bfloat16 is not fast,
ours is float32 as well, and has one side; where Winograd's algorithm is used for wide convolutions,
the side "direct" is without it. `--rows none L2Grad` measures these two rows alone.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import _root  # noqa: F401
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import utils
from engine.networks.compiling import set_compile
from engine.networks.layers import penalized_weights
from engine.networks.outputs import run_network
from engine.networks.winograd import set_winograd
from engine.step.compiled_step import CompiledStep
from engine.step.gradients import DIFFERENCE_STEP, compute_gradients, needs_double_backward
from engine.system import environment, hardware
from regularizers import Regularizer, make_regularizer


class Row(NamedTuple):
    """What a step does."""

    regularizer: str
    options: dict[str, Any] = {}  # noqa: RUF012
    every: int = 1  # the penalty is in the first of so many batches
    difference_step: float | None = None
    reference: str | None = None  # the row that plain PyTorch's step is of; None: this one

    @property
    def forward_passes(self) -> float:
        """How many forward passes' worth of products a step takes, in the mean."""
        penalized = 3 if "Grad" not in self.regularizer else 6 if self.difference_step else 9
        return 3 + (penalized - 3) / self.every


ROWS = {
    "none": Row("none"),
    "VarianceNorm": Row("VarianceNorm"),
    "L1Grad": Row("L1Grad"),
    "L2Grad": Row("L2Grad"),
    "L2Grad, no activations": Row("L2Grad", {"only_weight_grads": True}),
    "L2Grad, difference": Row("L2Grad", {}, 1, DIFFERENCE_STEP, "L2Grad"),
    "L2Grad, every 4th": Row("L2Grad", {}, 4, None, "L2Grad"),
    "L2Grad, difference every 4th": Row("L2Grad", {}, 4, DIFFERENCE_STEP, "L2Grad"),
}


PRECISIONS = {  # of sides not in float32
    **dict.fromkeys(("ours", "direct", "compiled"), "auto"),
    "autocast": "bf16",
}
PEERS = {"torch.func": "functional_step", "jax": "jax_step"}  # their modules
PEER_ROWS = ("none", "L1Grad", "L2Grad")

FIGURES = {  # of the last line: (row, side) of a time, and (row, side) of what it is divided by
    "plain_speedup": (("none", "reference"), ("none", "ours")),
    "l2grad_speedup": (("L2Grad", "reference"), ("L2Grad", "ours")),
    "l1grad_speedup": (("L1Grad", "reference"), ("L1Grad", "ours")),
    "penalty_ratio": (("L2Grad", "ours"), ("none", "ours")),
    "fp32_l2grad_speedup": (("L2Grad", "reference"), ("L2Grad", "fp32")),
    "plain_against_direct": (("none", "direct"), ("none", "ours")),
    "l2grad_against_direct": (("L2Grad", "direct"), ("L2Grad", "ours")),
    **{
        f"{name}_against_{peer}": ((row, peer), (row, "ours"))
        for peer in (*PEERS, "compiled")
        for name, row in (("plain", "none"), ("l1grad", "L1Grad"), ("l2grad", "L2Grad"))
    },
    **{
        f"{name}_{figure}": divided
        for name, row in (
            ("difference", "L2Grad, difference"),
            ("every_4th", "L2Grad, every 4th"),
            ("difference_every_4th", "L2Grad, difference every 4th"),
        )
        for figure, divided in (
            ("ratio", ((row, "ours"), ("none", "ours"))),
            ("speedup", ((row, "reference"), (row, "ours"))),
        )
    },
}


def plain_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    reg: Regularizer | None,
    row: Row,
    x: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Do a training step by plain autograd, exact and with the penalty."""
    with hardware.autocast(x.device, dtype):
        logits, activations = run_network(net, x, bool(reg) and "a_grads" in reg.inputs)
        loss = nn.functional.cross_entropy(logits, labels)
    weights, inputs_by_name = penalized_weights(net), {}
    if reg and needs_double_backward(reg):
        inputs = weights + (activations if "a_grads" in reg.inputs else [])
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        inputs_by_name = {"w_grads": grads[: len(weights)], "a_grads": grads[len(weights) :]}
    if reg:
        loss = loss + reg(*({"weights": weights, **inputs_by_name}[name] for name in reg.inputs))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make_steps(side: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return the work of each row for a side: its `every` steps.

    Sides are the PEERS, "ours", "fp32" (ours in float32), "direct" (ours without Winograd's
    algorithm), "compiled" (ours as one function), "reference" and "autocast": plain PyTorch in
    float32 and contiguous layout, and in bfloat16 autocast and channels-last layout.
    """
    torch.manual_seed(0)
    if side in PEERS:
        return make_peer_steps(side, args)
    is_plain, layout = side in ("reference", "autocast"), torch.contiguous_format
    if side != "reference":
        layout = hardware.MEMORY_FORMATS[args.memory_format]
    if is_plain:
        net = models.make_model(args.model, 10, args.width).to(args.device, memory_format=layout)
    else:
        hardware.tune_glibc_malloc()
        set_compile(args.compile, args.device)
        set_winograd(side not in ("direct", "compiled"), args.device)
        net = utils.make_net(args.model, 10, args.device, args.width, args.memory_format)
    dtype = hardware.resolve_precision(PRECISIONS.get(side, "fp32"), args.device)
    x = torch.randn(args.batch_size, 3, 32, 32).to(args.device, memory_format=layout)
    labels = torch.randint(10, (len(x),), device=x.device)
    optimizer = torch.optim.SGD(
        net.parameters(), 1e-3, 0.9, weight_decay=5e-4, fused=None if side == "reference" else True
    )

    criterion = nn.CrossEntropyLoss()
    take_step = CompiledStep(len(x)) if side == "compiled" else compute_gradients

    def our_steps(net, optimizer, reg, row, x, labels):
        for i in range(row.every):
            take_step(
                net, criterion, None if i else reg, x, labels, dtype, row.every, row.difference_step
            )
            optimizer.step()
        if side == "compiled" and not take_step.is_compiled:
            raise RuntimeError("the step was not compiled: the line above says why")

    def make_step(row: Row) -> Callable[[], None]:
        reg = make_regularizer(row.regularizer, 0.01, **row.options)
        if is_plain:
            return partial(plain_step, net, optimizer, reg, row, x, labels, dtype)
        return partial(our_steps, net, optimizer, reg, row, x, labels)

    return {name: make_step(row) for name, row in ROWS.items()}


def make_peer_steps(peer: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return a peer's step of each row, one of PEER_ROWS; each has a network of its own."""
    module = importlib.import_module(f"peers.{PEERS[peer]}")
    layout = hardware.MEMORY_FORMATS["channels_last"]
    x = torch.randn(args.batch_size, 3, 32, 32).to(args.device, memory_format=layout)
    labels = torch.randint(10, (len(x),), device=x.device)

    def make_step(row: str) -> Callable[[], None]:
        net = models.make_model(args.model, 10, args.width).to(args.device, memory_format=layout)
        return module.make_step(net, make_regularizer(row, 0.01), x, labels, 1e-3)

    return {row: make_step(row) for row in args.rows}


def milliseconds(step: Callable[[], object]) -> float:
    """Time one call, the device's work included."""
    started_at = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started_at)


def peak_megabytes(step: Callable[[], None]) -> float:
    """Return the most that one step holds at a time beyond what is there before it, in MB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Return GFLOP/s of a matrix product or, where it is faster, of a large 3×3 convolution."""
    n, batch = (2048, 128) if device == "cpu" else (8192, 4096)
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    x = torch.randn(batch, 256, 8, 8).to(device, dtype, memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).to(device, dtype, memory_format=torch.channels_last)
    works = {lambda: a @ b: n**3, lambda: nn.functional.conv2d(x, w, None, 1, 1): x.numel() * 2304}
    return max(
        2e-6 * products / min(milliseconds(work) for _ in range(3))
        for work, products in works.items()
    )


def gigaflop(args: argparse.Namespace) -> dict[str, float]:
    """Count the products of a step of each row."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.make_model(args.model, 10, args.width)(torch.randn(args.batch_size, 3, 32, 32))
    once = counter.get_total_flops() / 1e9
    return {name: once * row.forward_passes for name, row in ROWS.items()}


def serve(pipe, side: str, args: argparse.Namespace) -> None:
    """Answer requests (what, row) of the parent until it sends None."""
    steps = make_steps(side, args)

    dtype = hardware.resolve_precision(PRECISIONS.get(side, "fp32"), args.device)

    def time_second(row: str) -> float:
        milliseconds(steps[row])  # finds the caches as the other side left them
        return milliseconds(steps[row]) / (1 if side == "reference" else ROWS[row].every)

    answers = {
        "rate": lambda _: product_rate(dtype, args.device),
        "time": time_second,
        "memory": lambda row: peak_megabytes(steps[row]),
    }
    while request := pipe.recv():
        what, row = request
        pipe.send(answers[what](row))


def measure(
    ask: Callable, rows: dict[str, Row], sides: list[str], rounds: int
) -> tuple[dict, dict]:
    """Return the milliseconds {row: {side: [one a round]}} and the best product rate {side: }.

    The sides take turns, at the steps of each row and at the matrix product.
    """
    for _ in range(2):  # compiles, and fills the allocator
        for name, row in rows.items():
            for side in sides:
                if side != "reference" or not row.reference:
                    ask(side, "time", name)
    times, peaks = {row: {side: [] for side in sides} for row in rows}, dict.fromkeys(sides, 0.0)
    for _ in range(rounds):
        for name, row in rows.items():
            for side in sides:
                if side == "reference" and row.reference:  # measured in this round already
                    times[name][side].append(times[row.reference][side][-1])
                else:
                    times[name][side].append(ask(side, "time", name))
        peaks = {side: max(peaks[side], ask(side, "rate", "")) for side in sides}
    return times, peaks


def report(times: dict, memory: dict, work: dict, peaks: dict) -> dict[str, float]:
    """Print the table and return the figures of the last line."""

    def ratio(time: tuple[str, str], divisor: tuple[str, str]) -> float:
        (row, side), (other, other_side) = time, divisor
        pairs = zip(times[row][side], times[other][other_side], strict=True)
        return statistics.median(p / q for p, q in pairs)

    def is_measured(row: str, side: str) -> bool:
        return side in times.get(row, {})

    print(f"\n{'row':<30}{'side':<11}{'ms':>8}{'speedup':>9}{'of peak':>9}{'memory MB':>11}")
    for row, sides in times.items():
        for side, values in sides.items():
            ms = statistics.median(values)
            share = work[row] / ms * 1e3 / peaks[side]
            speedup = ratio((row, "reference"), (row, side))
            held = "–" if side == "jax" else f"{memory[row, side]:.0f}"  # not PyTorch's to count
            print(f"{row:<30}{side:<11}{ms:>8.1f}{speedup:>9.2f}{share:>9.0%}{held:>11}")
    figures = {
        name: ratio(*divided)
        for name, divided in FIGURES.items()
        if all(is_measured(*time) for time in divided)
    }
    if is_measured("L2Grad", "ours"):
        figures["memory_ratio"] = memory["L2Grad", "ours"] / memory["L2Grad", "reference"]
    return figures


def machine(device: str) -> str:
    """Name what this runs on."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{environment.processor_name()}, {torch.get_num_threads()} threads"


def one_or_all(text: str) -> str:
    """Return the name of a network, or "all": an argparse type."""
    return text if text == "all" else utils.network_name(text)


def main() -> None:
    """Compare the networks that the flags say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=one_or_all, default="ConvNet")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--memory_format", choices=hardware.MEMORY_FORMATS, default="channels_last")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[])
    parser.add_argument("--compiled_step", action="store_true")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--device", default=hardware.default_device())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.peers and (others := {*args.rows} - {*PEER_ROWS}):
        parser.error(f"--peers have no {', '.join(sorted(others))}: try --rows none L2Grad")
    if "jax" in args.peers:
        if not importlib.util.find_spec("jax"):
            parser.error("--peers jax needs JAX: python -m pip install jax==0.10.2")
        if args.model in ("all", "VGGSmall") or args.device != "cpu":
            parser.error("--peers jax: on a CPU, and one --model other than VGGSmall")
    if missing := {ROWS[row].reference for row in args.rows} - {None, *args.rows}:
        parser.error(f"--rows: rows given are compared with {', '.join(missing)}: add it")
    for model in models.MODELS if args.model == "all" else [args.model]:
        args.model = model
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Measure one network and print."""
    width = f" × {args.width:g}" if args.width != 1 else ""
    print(
        f"{time.strftime('%Y-%m-%d')}, {machine(args.device)}, torch {torch.__version__}, "
        f"{args.model}{width}, batch {args.batch_size}, {args.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    is_fp32 = hardware.choose_precision("auto", args.device) == "fp32"
    sides = ["reference", "ours"] if is_fp32 else ["reference", "fp32", "ours"]
    sides += ["direct"] * set_winograd(True, args.device) + ["compiled"] * args.compiled_step
    sides += args.peers
    rows = {name: ROWS[name] for name in args.rows}
    pipes, context = {}, multiprocessing.get_context("spawn")
    for side in sides:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, args), daemon=True).start()

    def ask(side: str, what: str, row: str) -> float:
        pipes[side].send((what, row))
        return pipes[side].recv()

    times, peaks = measure(ask, rows, sides, args.rounds)
    print("peak:", *(f"{side} {rate:.0f} GFLOP/s;" for side, rate in peaks.items()))
    memory = {(row, side): ask(side, "memory", row) for row in rows for side in sides}
    figures = report(times, memory, gigaflop(args), peaks)
    for pipe in pipes.values():
        pipe.send(None)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
