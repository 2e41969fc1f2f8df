"""One training on many processes, as `torchrun` starts them: sums over the ranks, and who writes.

Each rank has its share of every batch and a copy of everything else. So there are two kinds of
tensors: *partial* ones, of which the sum over the ranks is meant, such as the gradient of the
share's part of the loss; and *replicated* ones, the same on every rank: parameters, summed
gradients, penalties. All the ranks call the same functions here in the same order.

Within `sharded` a batch is shared out. Elsewhere each rank's batches are its own, and in a run of
one process everything is: then these functions change nothing.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

TIMEOUT = timedelta(minutes=10)  # how long to wait for a rank: another may be fetching the data
GRACE = 180.0  # seconds in which rank 0 may tell an error and close its log; others wait for it
BUCKET_BYTES = 2**20  # of gradients summed in one message, while the backward pass goes on

_batch_size: int | None = None  # of the batch that is shared out just now
_control: dist.ProcessGroup | None = None  # for what is not on a GPU; None: the one there is


class SetupError(ValueError):
    """This run cannot be shared out to these processes; the message says what would do."""


class LostError(RuntimeError):
    """Another process of the run is gone, or did not answer in time."""


def _surely(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call; LostError where the backend fails."""
    try:
        return call(*arguments, **options)
    except (RuntimeError, ValueError) as error:  # what backends raise is of many kinds
        reason = str(error).splitlines()[0]
        raise LostError(f"another process of this run is gone or stuck ({reason})") from error


# --- processes -------------------------------------------------------------------------------


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Within it, the processes that torchrun started are one run, of which rank 0 prints.

    Alone, there is nothing to do. Raises SetupError where the device is not one that every process
    can have for its own, and LostError where the others cannot be found.
    """
    global _control
    if _started_as("WORLD_SIZE", 1) == 1:
        yield
        return
    if missing := {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} - os.environ.keys():
        raise SetupError(f"WORLD_SIZE is set, but not {', '.join(sorted(missing))}: use torchrun")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        n_here, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if torch.device(device).index is not None or n_here > n_gpus:
            raise SetupError(f"--device {device}, {n_here} processes and {n_gpus} GPUs here: each "
                             "process needs one, with --device cuda; or use --device cpu")
        torch.cuda.set_device(_started_as("LOCAL_RANK", 0))
    store, number, n = _surely(next, dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(_surely(_meet, store, number, n), store)
    _surely(dist.init_process_group, "nccl" if on_gpu else "gloo", store=store, rank=number,
            world_size=n, timeout=TIMEOUT)
    _control = _surely(dist.new_group, backend="gloo", timeout=TIMEOUT) if on_gpu else None
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    finally:
        _control = None
        dist.destroy_process_group()


def _started_as(name: str, alone: int) -> int:
    """Return the number that torchrun put into the environment; end the program if it is none."""
    try:
        return int(os.environ.get(name, alone))
    except ValueError:
        sys.exit(f"error: {name} is {os.environ[name]!r} in the environment: unset it, or use "
                 "torchrun, which sets a number")


def _meet(store: dist.Store, number: int, n: int) -> str:
    """Return a word that all processes of this start have in common, and no earlier one had.

    torchrun's store outlives a restart, with the addresses of the dead in it, and its count of
    restarts differs between nodes. So each process greets with a word of its own, which may take
    the place of a dead one's, and rank 0 answers what it finds until it has heard from all.
    """
    mine = uuid.uuid4().hex
    store.set(f"hello/{number}", mine)
    if number:
        word = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{word}/{number}", "")
        return word
    silent, ends = set(range(1, n)), time.monotonic() + TIMEOUT.total_seconds()
    while silent:
        if time.monotonic() > ends:
            raise RuntimeError(f"no word from ranks {sorted(silent)}")
        for other in list(silent):
            store.set(f"answer/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"heard/{mine}/{other}"]):
                silent.remove(other)
        time.sleep(0.02)
    return mine


def world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number; 0 is the one that logs and writes.

    Before `processes` and after, it is what torchrun says.
    """
    if dist.is_initialized():
        return dist.get_rank()
    return _started_as("RANK", 0) if _started_as("WORLD_SIZE", 1) > 1 else 0


def restarted() -> bool:
    """Tell whether torchrun started the run again after a process had died, on any node."""
    return largest(_started_as("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def leave_it_to_main() -> None:
    """Wait, on ranks other than 0: when that has told what is wrong and ended, torchrun ends us."""
    if rank():
        time.sleep(GRACE)


def from_main(call: Callable[[], Any]) -> Any:
    """Return on every rank what call() returns on rank 0; what it raises there ends all."""
    if world_size() == 1:
        return call()
    outcome, error = [None, False], None
    if rank() == 0:
        try:
            outcome = [call(), True]
        except BaseException as raised:
            error = raised
    _surely(dist.broadcast_object_list, outcome, group=_control)
    if error is not None:
        raise error
    if not outcome[1]:
        leave_it_to_main()
        raise SystemExit(1)
    return outcome[0]


def largest(n: int) -> int:
    """Return the largest n of all ranks."""
    if world_size() == 1:
        return n
    value = torch.tensor(n)
    _surely(dist.all_reduce, value, dist.ReduceOp.MAX, group=_control)
    return int(value)


@contextmanager
def one_first() -> Iterator[None]:
    """Let one process of each node go first: it may have to make what the others then find."""
    several = world_size() > 1
    if several and not is_first_here():
        _surely(dist.barrier, group=_control)
    try:
        yield
    finally:
        if several and is_first_here():
            _surely(dist.barrier, group=_control)


def is_first_here() -> bool:
    """Tell whether this is the first process of its node."""
    return _started_as("LOCAL_RANK", 0) == 0


# --- sums ------------------------------------------------------------------------------------


def total(t: Tensor) -> Tensor:
    """Return the sum of t over the ranks, also outside `sharded`."""
    if world_size() > 1:
        t = t.clone()
        _surely(dist.all_reduce, t)
    return t


def average(tensors: Iterable[Tensor]) -> None:
    """Set each tensor of floating point to its mean over the ranks."""
    if world_size() > 1 and (averaged := [t for t in tensors if t.is_floating_point()]):
        for t, mean in zip(averaged, _split(total(_flat(averaged)) / world_size(), averaged),
                           strict=True):
            t.copy_(mean)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo _flat: in the shapes and memory formats of `like`."""
    parts = flat.split([t.numel() for t in like])
    return [torch.empty_like(t).copy_(part.view(t.shape))
            for t, part in zip(like, parts, strict=True)]


# --- a batch that is shared out --------------------------------------------------------------


@contextmanager
def sharded(batch_size: int) -> Iterator[None]:
    """Within it, each rank's batch is its share of a batch of that size."""
    global _batch_size
    if world_size() == 1:
        yield
        return
    _batch_size = batch_size
    try:
        yield
    finally:
        _batch_size = None


def is_sharded() -> bool:
    """Tell whether a batch is shared out."""
    return _batch_size is not None


def whole_size(n: int) -> int:
    """Return the number of images in the batch of which this rank has n."""
    return n if _batch_size is None else _batch_size


def part(mean: Tensor, n: int) -> Tensor:
    """Turn a mean over this rank's n images into its part of the mean over the batch."""
    return mean if _batch_size is None else mean * (n / _batch_size)


def batch_sum(t: Tensor) -> Tensor:
    """Return the sum of a partial tensor, without a derivative."""
    return t if _batch_size is None else total(t)


def gather(t: Tensor) -> Tensor:
    """Return the t of all ranks, stacked along a new first dimension; replicated."""
    return t[None] if _batch_size is None else _Gather.apply(t)


def enter(*replicated: Tensor) -> tuple[Tensor, ...]:
    """Return replicated tensors, from which partial ones are computed; `leave` ends that."""
    return replicated if _batch_size is None else _Enter.apply(*replicated)


def leave(partial: Tensor) -> Tensor:
    """Return the sum of a partial tensor, which is replicated."""
    return partial if _batch_size is None else _Leave.apply(partial)


class _Gather(torch.autograd.Function):
    """Partial t of all ranks, stacked; a replicated cotangent is that of each rank's own row."""

    @staticmethod
    def forward(ctx, t):
        rows = t.new_empty((world_size(), *t.shape))
        _surely(dist.all_gather, list(rows.unbind()), t.contiguous())
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g[rank()]


class _Enter(torch.autograd.Function):
    """The identity; cotangents, which are partial, are summed, in one message."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *partial):
        return tuple(_split(total(_flat(partial)), partial))


class _Leave(torch.autograd.Function):
    """The sum; its cotangent, which is replicated, is that of every part."""

    @staticmethod
    def forward(ctx, partial):
        return total(partial)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g


@contextmanager
def summing(params: Sequence[Tensor]) -> Iterator[Callable[[Sequence], list]]:
    """Within it, compute partial gradients of params, once each, and call the result on them.

    It returns their sums over the ranks, detached, None where there is none. The sums are taken in
    buckets as the backward pass finishes them, while it goes on with the others.
    """
    if _batch_size is None:
        yield lambda grads: [g if g is None else g.detach() for g in grads]
        return
    bucket: list[tuple[int, Tensor]] = []
    sent = []

    def send() -> None:
        if bucket:
            indices, grads = zip(*bucket, strict=True)
            flat = _flat(grads)
            sent.append((indices, grads, flat, _surely(dist.all_reduce, flat, async_op=True)))
            bucket.clear()

    def note(index: int, g: Tensor) -> None:
        bucket.append((index, g.detach()))
        if sum(g.nbytes for _, g in bucket) >= BUCKET_BYTES:
            send()

    def sums(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        send()
        found = [g if g is None else g.detach() for g in grads]
        for indices, parts, flat, work in sent:
            _surely(work.wait)
            for index, whole in zip(indices, _split(flat, parts), strict=True):
                found[index] = whole
        return found

    hooks = [p.register_hook(lambda g, i=i: note(i, g)) for i, p in enumerate(params)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
