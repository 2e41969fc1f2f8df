"""What training on several processes costs: bytes and time in messages, and whether it is exact.

One process is timed against two, one thread each, on the same global batch of 128 for the same
ConvNet: without a regularizer, and with L2Grad. Steps alternate between the two, and a ratio is
the median of the ratios within a turn. Time in messages is what the steps wait for, the slower
process included. Exactness is the largest difference of a weight after 3 steps in float64, over its
layer's largest. The last line is a JSON object.

    python benchmarks/scaling.py [--rounds 7]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from types import SimpleNamespace

import _root  # noqa: F401
import torch
import torch.distributed as dist
from _ranks import free_port, rank_environment
from torch import nn

import utils
from engine.networks.compiling import set_compile
from engine.step.gradients import compute_gradients
from engine.system import distributed, hardware
from regularizers import make_regularizer

BATCH, ROWS = 128, ("none", "L2Grad")


class Meter:
    """Counts what passes through torch.distributed: messages, bytes, and seconds waited."""

    def __init__(self) -> None:
        """Put itself between."""
        self.clear()
        for name, place in (("all_reduce", 0), ("all_gather", 1)):
            setattr(dist, name, self._metered(getattr(dist, name), place))

    def clear(self) -> None:
        """Begin anew."""
        self.messages, self.bytes, self.seconds = 0, 0, 0.0

    def _timed(self, call):
        def timed(*arguments, **options):
            started_at = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started_at

        return timed

    def _metered(self, call, place):
        def metered(*arguments, **options):
            self.messages, self.bytes = self.messages + 1, self.bytes + arguments[place].nbytes
            work = self._timed(call)(*arguments, **options)
            return work and SimpleNamespace(wait=self._timed(work.wait))

        return metered


def serve(pipe, rank: int, n: int, port: int) -> None:
    """Be that rank of n: answer each (regularizer, exact, steps) with what `measure` returns."""
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, n, port)
    hardware.tune_glibc_malloc()
    meter = Meter()
    with distributed.process_group("cpu"):
        while request := pipe.recv():
            pipe.send(measure(meter, rank, n, *request))


def measure(meter: Meter, rank: int, n: int, name: str, exact: bool, steps: int):
    """Return the seconds of a step and the meter's counts; if `exact`, in float64, the weights."""
    set_compile(not exact)
    torch.manual_seed(0)
    net = utils.make_net("ConvNet", 10, "cpu")
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    x = x.contiguous(memory_format=torch.channels_last)
    if exact:
        net, x = net.double(), x.double()
    dtype = torch.float64 if exact else hardware.resolve_precision("auto", "cpu")
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9)
    regularizer, criterion = make_regularizer(name, 0.01), nn.CrossEntropyLoss()
    share = slice(*distributed.share_bounds(BATCH, rank, n))

    def step() -> None:
        with distributed.sharded(BATCH):
            compute_gradients(net, criterion, regularizer, x[share], y[share], dtype)
        optimizer.step()

    if not exact:
        step()  # compiles
    meter.clear()
    started_at = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - started_at) / steps
    if exact:
        return {key: t.clone() for key, t in net.state_dict().items()}
    return seconds, meter.messages / steps, meter.bytes / steps, meter.seconds / steps


def start(n: int) -> list:
    """Start n processes; return a pipe to each."""
    port, context, pipes = free_port(), multiprocessing.get_context("spawn"), []
    for rank in range(n):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, rank, n, port), daemon=True).start()
        pipes.append(ours)
    return pipes


def ask(pipes: list, *request) -> list:
    """Return each process's answer."""
    for pipe in pipes:
        pipe.send(request)
    return [pipe.recv() for pipe in pipes]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a turn")
    args = parser.parse_args()
    one, two = start(1), start(2)
    figures = {}
    for row in ROWS:
        for pipes in (one, two):
            ask(pipes, row, False, 1)  # compiles
        turns = [
            (ask(one, row, False, args.steps)[0], ask(two, row, False, args.steps)[0])
            for _ in range(args.rounds)
        ]
        alone, shared = zip(*turns, strict=True)
        messages, n_bytes = shared[0][1:3]
        waited = statistics.median(s[3] for s in shared)
        figures[row] = {
            "one_ms": round(1e3 * statistics.median(a[0] for a in alone), 1),
            "two_ms": round(1e3 * statistics.median(s[0] for s in shared), 1),
            "speedup": round(statistics.median(a[0] / s[0] for a, s in turns), 3),
            "messages": messages,
            "bytes": int(n_bytes),
            "waited_ms": round(1e3 * waited, 1),
        }
        (whole,), parts = ask(one, row, True, 3), ask(two, row, True, 3)
        figures[row]["largest_difference"] = max(
            ((part[key] - t).abs().max() / t.abs().max().clamp(min=1e-30)).item()
            for part in parts
            for key, t in whole.items()
        )
        print(row, figures[row], flush=True)
    n_params = sum(p.numel() for p in utils.make_net("ConvNet", 10, "cpu").parameters())
    figures["parameter_bytes"] = 4 * n_params
    for pipe in one + two:
        pipe.send(None)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
