"""Prove on a GPU, in one run of at most ten minutes, that training there is correct and fast.

Each check prints a line. The last line is one JSON object of what all of them found; the exit code
is 1 where something does not hold, or where time was over before a check. With `--device cpu` what
makes sense there runs with a tiny size, and the rest prints "CUDA: not run".

    python benchmarks/gpu.py [--device cpu] [--checks gradients batches] [--minutes 10]

The baselines are plain PyTorch, and plain PyTorch in bfloat16 autocast and channels-last layout, in
a CUDA graph of its own where that works.
"""

import argparse
import copy
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401
import torch
from bf16_cosine import cosine
from epoch_time import make_work
from launches import count
from step_time import ROWS, machine, make_steps, milliseconds, peak_megabytes
from torch import nn

import data
import models
import utils
from engine.images.loader import Loader
from engine.networks.compiling import set_compile
from engine.networks.layers import penalized_weights
from engine.networks.outputs import run_network
from engine.step.evaluation import evaluate
from engine.step.gradients import compute_gradients
from engine.step.metrics import batch_metrics_row
from engine.system import hardware
from engine.system.io import load_weights
from regularizers import REGULARIZERS, Regularizer, make_regularizer

ROOT = Path(__file__).parents[1]
TIMED_ROWS = ("none", "L1Grad", "L2Grad", "L2Grad, difference", "L2Grad, every 4th")
SIDES = ("reference", "autocast", "ours")
Found = dict[str, Any]


class Failed(Exception):
    """A check found something that does not hold."""


def require(holds: bool, message: str) -> None:
    """Raise Failed with this message unless it holds."""
    if not holds:
        raise Failed(message)


# --- gradients -------------------------------------------------------------------------------


def random_batch(n: int, size: int, dtype: torch.dtype, device: str) -> tuple:
    """Return the same random images (n, 3, size, size) and labels (n,) on any device."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (n,), generator=generator).to(device)
    return x.to(device, dtype, memory_format=torch.channels_last), y


def our_net(args: argparse.Namespace, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the same network of fast layers in training mode on any device."""
    torch.manual_seed(0)
    return utils.make_net(args.model, 10, "cpu", args.width).to(device, dtype).train()


def our_gradient(
    args: argparse.Namespace,
    penalty: str,
    device: str,
    precision: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ∇(L + R) of one batch as a vector (float64, on the CPU)."""
    net = our_net(args, dtype, device)
    x, y = random_batch(args.n_images, args.image_size, dtype, device)
    regularizer = make_regularizer(penalty, 0.1)
    compute_gradients(net, nn.CrossEntropyLoss(), regularizer, x, y, precision)
    return flat([p.grad for p in net.parameters()])


def plain_gradient(args: argparse.Namespace, penalty: str, device: str) -> torch.Tensor:
    """Return the same by plain autograd in float64, of PyTorch's own layers."""
    ours, net = our_net(args, torch.float64, device), models.make_model(args.model, 10, args.width)
    net.to(device, torch.float64).train().load_state_dict(ours.state_dict())
    x, y = random_batch(args.n_images, args.image_size, torch.float64, device)
    logits, activations = run_network(net, x, with_activations=True)
    loss, weights = nn.functional.cross_entropy(logits, y), penalized_weights(net)
    if regularizer := make_regularizer(penalty, 0.1):
        grads = torch.autograd.grad(loss, [*weights, *activations], create_graph=True)
        named = {"w_grads": grads[: len(weights)], "a_grads": grads[len(weights) :]}
        loss = loss + regularizer(*(named[name] for name in regularizer.inputs))
    return flat(torch.autograd.grad(loss, [*net.parameters()]))


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return all elements as one vector (float64, on the CPU)."""
    return torch.cat([t.detach().flatten().double().cpu() for t in tensors])


def relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖ours − right‖ / ‖right‖."""
    return ((ours - right).norm() / right.norm()).item()


def check_gradients(args: argparse.Namespace) -> Found:
    """∇(L + R) in float64 against the CPU and plain autograd; in float32 and bfloat16 its angle."""
    found = {}
    for penalty in ("none", "L1Grad", "L2Grad"):
        right = our_gradient(args, penalty, "cpu", dtype=torch.float64)
        ours = our_gradient(args, penalty, args.device, dtype=torch.float64)
        figures = {
            "against_cpu": relative_error(ours, right),
            "against_plain": relative_error(ours, plain_gradient(args, penalty, args.device)),
            "fp32_cosine": cosine(our_gradient(args, penalty, args.device), right),
            "bf16_cosine": cosine(our_gradient(args, penalty, args.device, torch.bfloat16), right),
        }
        found[penalty] = figures
        for name in ("against_cpu", "against_plain"):
            require(figures[name] <= 1e-10, f"{penalty}: {name} in float64 {figures[name]:.1e}")
        for name, least in (("fp32_cosine", 0.99999), ("bf16_cosine", 0.5)):
            require(figures[name] >= least, f"{penalty}: {name} {figures[name]:.6f} < {least}")
    return found


def check_compiled(args: argparse.Namespace) -> Found:
    """∇(L + R) of compiled kernels against eager ones, in float32."""
    eager = our_gradient(args, "L2Grad", args.device)
    is_compiled = set_compile(True, args.device)
    try:
        compiled = our_gradient(args, "L2Grad", args.device)
    finally:
        set_compile(False)
    require(is_compiled, "nothing was compiled: a compiler or Triton is missing")
    angle = cosine(compiled, eager)
    require(angle >= 0.99999, f"compiled against eager: cosine {angle:.6f}")
    return {"cosine": angle}


# --- no synchronization ----------------------------------------------------------------------


def a_step(args: argparse.Namespace, regularizer: Regularizer | None, step: float | None):
    """Return a function that does a whole step of training in bfloat16."""
    net = our_net(args, torch.float32, args.device)
    x, y = random_batch(args.n_images, args.image_size, torch.float32, args.device)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=5e-4, fused=True)

    def do() -> None:
        criterion = nn.CrossEntropyLoss()
        result = compute_gradients(net, criterion, regularizer, x, y, torch.bfloat16, 1.0, step)
        batch_metrics_row(net, len(x), *result)
        optimizer.step()

    return do


def check_synchronizations(args: argparse.Namespace) -> Found:
    """No step of any regularizer, exact or by a difference, waits for the GPU."""
    names = [name.replace("<P>", P) for name in REGULARIZERS for P in "123"]
    waiting, n_steps = [], 0
    for name, difference in itertools.product(["none", *dict.fromkeys(names)], (None, 0.01)):
        step = a_step(args, make_regularizer(name, 0.01), difference)
        step()  # what is made once may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            waiting.append(f"{name} {difference or 'exact'}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        n_steps += 1
    require(not waiting, "; ".join(waiting))
    return {"steps": n_steps, "synchronizations": 0}


# --- data and accuracy -----------------------------------------------------------------------


def make_loader(dataset: data.ImageDataset, device: str, **options) -> Loader:
    """Return a loader of the dataset's training images, or of its test images without options."""
    kind = "train" if options else "test"
    images, labels = getattr(dataset, f"{kind}_images"), getattr(dataset, f"{kind}_labels")
    layout = torch.channels_last
    return Loader(
        images, labels, 128, dataset.mean, dataset.std, device=device, memory_format=layout,
        **options,
    )  # fmt: skip


def check_batches(args: argparse.Namespace) -> Found:
    """The first batches of an epoch are those of the CPU."""
    dataset, draws = data.synthetic(), {"seed": 3, "augment": True, "shuffle": True}
    pairs = zip(
        make_loader(dataset, args.device, **draws).batches(1),
        make_loader(dataset, "cpu", **draws).batches(1),
        strict=True,
    )
    error = 0.0
    for (x, y), (x_cpu, y_cpu) in itertools.islice(pairs, 4):
        require(torch.equal(y.cpu(), y_cpu), "labels are not those of the CPU")
        error = max(error, (x.cpu() - x_cpu).abs().max().item())
    require(error <= 1e-5, f"images differ by {error:.1e} from the CPU's")
    return {"largest_difference": error}


def check_accuracy(args: argparse.Namespace) -> Found:
    """Logits, loss and accuracy of a trained network are those of the CPU."""
    dataset, found, logits = data.synthetic(), {}, {}
    for device in ("cpu", args.device):
        net = utils.make_net("ConvNet", 10, device)
        load_weights(net, ROOT / "weights" / "control.pt")
        loader = make_loader(dataset, device)
        found[device] = evaluate(net, nn.CrossEntropyLoss(), loader)
        with torch.no_grad():
            x, _ = next(loader.batches(0))
            logits[device] = net(x)[0].double().cpu()
    error = relative_error(logits[args.device], logits["cpu"])
    require(error <= 1e-4, f"logits in float32 differ by {error:.1e} from the CPU's")
    return {**found, "error_of_logits": error}


# --- whole runs ------------------------------------------------------------------------------


def train_command(args: argparse.Namespace, folder: Path, *flags: object) -> list[str]:
    """Return the command of a short training into `folder`."""
    return [
        sys.executable, str(ROOT / "train.py"), "--dataset", "Synthetic", "--run_name", "run",
        "--save_file", str(folder / "run"), "--regularizer", "L2Grad", "--device", args.device,
        "--model", args.model, *(("--width", str(args.width)) if args.width != 1 else ()),
        "--n_epochs", str(args.n_epochs), "--lr", "0.01",
        "--train_subset", str(args.train_subset), "--precision", args.precision,
        "--compile" if args.compile else "--no-compile", *map(str, flags),
    ]  # fmt: skip


def start(command: Sequence[str], folder: Path) -> subprocess.Popen:
    """Start a process in `folder` with its output in `folder`/log, and an empty cache."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "cache"), "WANDB_MODE": "disabled"}
    with (folder / "log").open("a") as log:
        env = {**os.environ, **cache}
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)


def wait(process: subprocess.Popen, folder: Path) -> None:
    """Wait for its end; Failed with the log's end where its exit code is not 0."""
    if process.wait():
        tail = (folder / "log").read_text()[-500:]
        raise Failed(f"{process.args[1:]} ended with {process.returncode}: {tail}")


def weights_hash(folder: Path) -> str:
    """Return a hash of the bits of the weights that a training has saved."""
    state, digest = torch.load(folder / "run.pt", map_location="cpu"), hashlib.sha256()
    for name, t in state.items():
        digest.update(name.encode() + t.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_runs(args: argparse.Namespace) -> Found:
    """Two runs at once, with an empty cache, and one that is cut and resumed give the same bits."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / kind for kind in ("first", "second", "cut")]
        both = [start(train_command(args, folder), folder) for folder in folders[:2]]
        for process in both:
            process.wait()
        for process, folder in zip(both, folders[:2], strict=True):
            wait(process, folder)
        cut, command = folders[2], train_command(args, folders[2], "--checkpoint_every", 1)
        process = start(command, cut)
        while process.poll() is None and not (cut / "run.ckpt").exists():
            time.sleep(0.02)
        was_cut = process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait()
        wait(start([*command, "--resume"], cut), cut) if was_cut else wait(process, cut)
        hashes = dict(zip(("first", "second", "cut"), map(weights_hash, folders), strict=True))
    require(was_cut, "the run ended before it was cut")
    require(len(set(hashes.values())) == 1, f"weights differ: {hashes}")
    return hashes


def check_demo(args: argparse.Namespace) -> Found:
    """`make demo` ends well, and how long it takes; needs CIFAR-10 and the installed requirements.

    It runs in the folder of the project, and its files are those that it always makes.
    """
    if not shutil.which("make"):
        return {"not_run": "no make here"}
    started_at = time.perf_counter()
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    require(done.returncode == 0, f"make demo: {(done.stderr or done.stdout)[-500:]}")
    return {"seconds": time.perf_counter() - started_at}


def check_several_gpus(args: argparse.Namespace) -> Found:
    """The loss of a run on all GPUs is that on one."""
    n = torch.cuda.device_count()
    if n < 2:
        return {"not_run": "one GPU"}
    losses = {}
    with tempfile.TemporaryDirectory() as name:
        for k in (1, n):
            folder = Path(name) / f"on_{k}"
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={k}"]
            command = train_command(args, folder)
            wait(start([*launcher, *command[1:]], folder), folder)
            losses[k] = json.loads((folder / "run.json").read_text())["final_loss"]
    require(abs(losses[n] / losses[1] - 1) <= 0.05, f"losses on 1 and {n} GPUs: {losses}")
    return {"losses": losses}


# --- time ------------------------------------------------------------------------------------


def device_milliseconds(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the time of one call until the device is done, and until the host is."""
    if device == "cpu":
        ms = milliseconds(step)
        return {"ms": ms, "host_ms": ms}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    begin.record()
    step()
    end.record()
    host_ms = 1e3 * (time.perf_counter() - started_at)
    torch.cuda.synchronize()
    return {"ms": begin.elapsed_time(end), "host_ms": host_ms}


def kernels(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return how many kernels a call launches and how long they run; operations on a CPU."""
    if device == "cpu":
        return {"launches": sum(count(step, compiled=False).values())}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(events), "busy_ms": 1e-3 * sum(e.device_time for e in events)}


def graphed(step: Callable[[], None]) -> Callable[[], None] | str:
    """Return the replay of a CUDA graph of the step, or the first line of why there is none."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        return str(error).splitlines()[0]


def time_batch_size(
    args: argparse.Namespace, batch_size: int, rows: Sequence[str] = TIMED_ROWS
) -> Found:
    """Return the figures of each row and side at one batch size; the sides take turns."""
    args = copy.copy(args)
    args.batch_size, works, reasons = batch_size, {}, {}
    for side in args.sides:
        steps = make_steps(side, args)
        for row in rows:
            if side == "ours" or not ROWS[row].reference:
                works[row, side] = steps[row]
            if side == "autocast" and args.device != "cpu" and not ROWS[row].reference:
                replay = graphed(steps[row])
                if isinstance(replay, str):
                    reasons[row, "autocast graph"] = replay
                else:
                    works[row, "autocast graph"] = replay
    times: dict[tuple[str, str], list] = {key: [] for key in works}
    for _ in range(args.n_warm_up + args.rounds):  # what is compiled or captured is so first
        for key, work in works.items():
            times[key].append(device_milliseconds(work, args.device))
    found: Found = {}
    for (row, side), work in works.items():
        every = ROWS[row].every if side == "ours" else 1
        figures = {
            name: statistics.median(t[name] for t in times[row, side][args.n_warm_up :]) / every
            for name in ("ms", "host_ms")
        }
        figures |= {name: n / every for name, n in kernels(work, args.device).items()}
        figures["peak_mb"] = peak_megabytes(work)
        found.setdefault(row, {})[side] = figures
    for (row, side), reason in reasons.items():
        found[row][side] = {"not_run": reason}
    return found


def check_steps(args: argparse.Namespace) -> Found:
    """Milliseconds, launches and memory of a step; against the strongest baseline, on a GPU.

    There L2Grad has to be twice as fast at every batch size, and at most 5 ms at 128 images on an
    H100, the goals.
    """
    found, missed = {}, []
    for n in args.batch_sizes:
        found[n] = rows = time_batch_size(args, n)
        for row, sides in rows.items():
            baseline = rows[ROWS[row].reference or row]
            best = min(f["ms"] for side, f in baseline.items() if side != "ours" and "ms" in f)
            ms = sides["ours"]["ms"]
            sides["ours"]["speedup"] = speedup = best / ms
            print(f"  batch {n}, {row}, ours: {ms:.2f} ms, {speedup:.2f} times as fast")
            if row == "L2Grad" and args.device != "cpu" and speedup < 2:
                missed.append(f"batch {n}: L2Grad {speedup:.2f} times as fast, not 2")
    if args.device != "cpu" and "H100" in torch.cuda.get_device_name():
        ms = found[128]["L2Grad"]["ours"]["ms"]
        if ms > 5:
            missed.append(f"batch 128: L2Grad {ms:.1f} ms, not 5")
    if missed:
        print(json.dumps(found))
    require(not missed, "; ".join(missed))
    return found


def check_compiled_step(args: argparse.Namespace) -> Found:
    """Milliseconds of an L2Grad step of 128 images: ours, and `--step compiled`, in turns."""
    args = copy.copy(args)
    args.sides = ("ours", "compiled")
    found = time_batch_size(args, 128, ["L2Grad"])["L2Grad"]
    for side, figures in found.items():
        print(f"  batch 128, L2Grad, {side}: {figures['ms']:.2f} ms")
    return found


def check_epoch(args: argparse.Namespace) -> Found:
    """Seconds of an epoch of L2Grad, by its 391 batches, and what the loop adds to its steps."""
    set_compile(args.compile, args.device)
    epoch, steps = make_work("L2Grad", args.epoch_batches, args.device)
    steps()
    in_epoch, in_steps = milliseconds(epoch), milliseconds(steps)
    seconds = in_epoch / 1000 * 391 / args.epoch_batches
    return {"epoch_seconds": seconds, "epoch_ratio": in_epoch / in_steps}


def _work_alone(args: argparse.Namespace, barrier, results) -> None:
    """Time steps in a process of its own, from the moment when all of them are ready."""
    step = make_steps("ours", args)["L2Grad"]
    step()
    barrier.wait()
    started_at = time.perf_counter()
    for _ in range(args.epoch_batches):
        step()
    if args.device != "cpu":
        torch.cuda.synchronize()
    results.put(args.epoch_batches / (time.perf_counter() - started_at))


def check_processes(args: argparse.Namespace) -> Found:
    """Steps a second of 1, 2 and 4 processes at once on one GPU, in all."""
    args, found, context = copy.copy(args), {}, multiprocessing.get_context("spawn")
    args.batch_size = 128
    for n in (1, 2, 4):
        barrier, results = context.Barrier(n), context.Queue()
        processes = [
            context.Process(target=_work_alone, args=(args, barrier, results)) for _ in range(n)
        ]
        for process in processes:
            process.start()
        found[n] = sum(results.get(timeout=240) for _ in processes)
        for process in processes:
            process.join()
    return {"steps_per_second": found}


# --- the table of checks ---------------------------------------------------------------------


class Check(NamedTuple):
    """What is checked, and where that makes sense."""

    run: Callable[[argparse.Namespace], Found]
    needs_cuda: bool = False


CHECKS = {
    "gradients": Check(check_gradients),
    "batches": Check(check_batches),
    "accuracy": Check(check_accuracy),
    "synchronizations": Check(check_synchronizations, needs_cuda=True),
    "compiled": Check(check_compiled),
    "steps": Check(check_steps),
    "epoch": Check(check_epoch, needs_cuda=True),
    "runs": Check(check_runs),
    "processes": Check(check_processes, needs_cuda=True),
    "several_gpus": Check(check_several_gpus, needs_cuda=True),
    "demo": Check(check_demo, needs_cuda=True),
    "compiled_step": Check(check_compiled_step, needs_cuda=True),  # last: it may take minutes
}


def run_checks(args: argparse.Namespace) -> dict[str, Found]:
    """Run the checks of --checks; each one's result has "holds", or "not_run" and why."""
    found, deadline = {}, time.monotonic() + 60 * args.minutes
    for name in args.checks:
        started_at = time.monotonic()
        if CHECKS[name].needs_cuda and args.device == "cpu":
            result = {"not_run": "CUDA: not run"}
        elif started_at > deadline:
            result = {"holds": False, "reason": f"no time left of {args.minutes:g} minutes"}
        else:
            try:
                result = {**CHECKS[name].run(args), "holds": True}
            except Failed as error:
                result = {"holds": False, "reason": str(error)}
            except Exception as error:  # of any kind, so that the other checks still run
                traceback.print_exc()
                result = {"holds": False, "reason": f"{type(error).__name__}: {error}"}
            result["check_seconds"] = round(time.monotonic() - started_at, 1)
        line = result.get("not_run") or result.get("reason") or "holds"
        print(f"{name}: {line} ({time.monotonic() - started_at:.0f} s)", flush=True)
        found[name] = result
    return found


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", type=hardware.parse_device, default="cuda", help="cuda or cpu (default: cuda)")
    add("--checks", nargs="+", choices=CHECKS, default=[*CHECKS], metavar="CHECK", help="which")
    add("--minutes", type=float, default=10, help="after which no check begins (default: 10)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile kernels")
    return parser


def set_sizes(args: argparse.Namespace) -> None:
    """Add to the flags how much is done: little on a CPU."""
    tiny = args.device == "cpu"
    args.model, args.width = ("ResNet20", 0.25) if tiny else ("ConvNet", 1.0)
    args.memory_format = "channels_last"
    args.n_images, args.image_size = (4, 8) if tiny else (32, 32)
    args.sides, args.n_warm_up = SIDES, 1 if tiny else 5
    args.batch_sizes, args.rounds = ([8], 2) if tiny else ([128, 512, 2048], 5)
    args.n_epochs, args.epoch_batches = 1 if tiny else 2, 40
    args.train_subset, args.precision = (512, "fp32") if tiny else (2000, "auto")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the JSON line; return the exit code."""
    args = make_parser().parse_args(argv)
    set_sizes(args)
    hardware.use_ieee_float32()
    where = machine(args.device)
    print(f"{time.strftime('%Y-%m-%d')}, {where}, torch {torch.__version__}", flush=True)
    if args.device == "cpu":
        print("CUDA: not run. What follows is a tiny size on a CPU, and says nothing of a GPU.")
    found = run_checks(args)
    holds = all(result.get("holds", True) for result in found.values())
    print(json.dumps({"holds": holds, "device": where, "torch": torch.__version__, **found}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
