"""One training on many processes, as `torchrun` starts them: sums over the ranks, and who writes.

Each rank has its share of every batch and a copy of everything else. So there are two kinds of
tensors: *partial* ones, of which the sum over the ranks is meant, such as the gradient of this
rank's contribution to the loss; and *replicated* ones, the same on every rank: parameters, summed
gradients, penalties. All ranks call the same functions here in the same order.

Inside `sharded` a batch is divided among the ranks. Elsewhere each rank's batches are its own. In a
run of one process these functions change nothing.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.system.errors import PeerLostError, PenaltyError, RanksDifferError, SetupError

TIMEOUT = timedelta(minutes=10)  # how long to wait for a rank: another may be fetching the data
RANK0_EXIT_SECONDS = 180.0  # that the other ranks give rank 0 to report an error and to exit
BUCKET_BYTES = 2**20  # of gradients summed in one message, while the backward pass goes on

_batch_size: int | None = None  # of the batch that is divided among the ranks just now
_cpu_group: dist.ProcessGroup | None = None  # for CPU tensors; None: the default group


def _call_collective(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a collective operation; PeerLostError where the backend fails."""
    try:
        return call(*arguments, **options)
    except (RuntimeError, ValueError) as error:  # what backends raise is of many kinds
        reason = str(error).splitlines()[0]
        raise PeerLostError(f"another process of this run is gone or stuck ({reason})") from error


# --- processes -------------------------------------------------------------------------------


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Context manager that joins the processes torchrun started into one run; rank 0 prints.

    Does nothing in a run of one process. Raises SetupError where each process cannot have a device
    of its own, and PeerLostError where the others cannot be found.
    """
    global _cpu_group
    if _env_int("WORLD_SIZE", 1) == 1:
        yield
        return
    if missing := {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} - os.environ.keys():
        raise SetupError(f"WORLD_SIZE is set, but not {', '.join(sorted(missing))}: use torchrun")
    on_gpu = torch.device(device).type == "cuda"
    gpu = _choose_gpu(device) if on_gpu else None
    store, rank, world_size = _call_collective(next, dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store survives a restart, and then still has the addresses of dead processes
    store = dist.PrefixStore(f"start {_env_int('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if gpu is not None:
        torch.cuda.set_device(gpu)
        uuid_of_gpu = str(torch.cuda.get_device_properties(gpu).uuid)
        _call_collective(_check_own_gpu, store, rank, world_size, uuid_of_gpu)
    backend = "nccl" if on_gpu else "gloo"
    options = {"device_id": gpu, "store": store, "rank": rank, "world_size": world_size}
    _call_collective(dist.init_process_group, backend, timeout=TIMEOUT, **options)
    if on_gpu:
        _cpu_group = _call_collective(dist.new_group, backend="gloo", timeout=TIMEOUT)
    try:
        with open(os.devnull, "w") as devnull, redirect_stdout(devnull if rank else sys.stdout):
            yield
    finally:
        _cpu_group = None
        dist.destroy_process_group()


def _choose_gpu(device: str) -> torch.device:
    """Return this process's GPU: its local rank's or, where it sees one alone, that one.

    Raises SetupError where there are fewer GPUs than processes, or `device` has a number.
    """
    n_here = int(os.environ["LOCAL_WORLD_SIZE"])
    n_gpus = torch.cuda.device_count()
    if torch.device(device).index is not None or not (n_gpus == 1 or n_here <= n_gpus):
        raise SetupError(
            f"--device {device}, {n_here} processes and {n_gpus} GPUs here: each "
            "process needs one, with --device cuda; or use --device cpu"
        )
    return torch.device("cuda", _env_int("LOCAL_RANK", 0) if n_gpus > 1 else 0)


def _check_own_gpu(store: dist.Store, rank: int, world_size: int, gpu: str) -> None:
    """Raise SetupError where two processes have the GPU of the same unique name."""
    store.set(f"gpu/{rank}", gpu)
    gpus = [store.get(f"gpu/{other}").decode() for other in range(world_size)]
    if len(set(gpus)) < world_size:
        raise SetupError(
            f"{world_size} processes and {len(set(gpus))} GPUs: each process needs one of its own; "
            "or use --device cpu"
        )


def _env_int(name: str, default: int) -> int:
    """Return the whole number that torchrun put into the environment; exit if it is not one."""
    text = os.environ.get(name, str(default))
    if not text.strip().lstrip("-").isdecimal():
        sys.exit(
            f"error: {name} is {text!r} in the environment: unset it, or use torchrun, which sets "
            "a number"
        )
    return int(text)


def get_world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return this process's rank, outside `process_group` as torchrun says; rank 0 writes."""
    if dist.is_initialized():
        return dist.get_rank()
    return _env_int("RANK", 0) if _env_int("WORLD_SIZE", 1) > 1 else 0


def is_restart_here() -> bool:
    """Tell whether torchrun restarted the processes of this node after one had died."""
    return _env_int("TORCHELASTIC_RESTART_COUNT", 0) > 0


def wait_for_rank0_exit() -> None:
    """On other ranks, wait for rank 0 to report an error and exit: torchrun then ends us."""
    if get_rank():
        time.sleep(RANK0_EXIT_SECONDS)


def run_on_rank0_and_broadcast(call: Callable[[], Any]) -> Any:
    """Call on rank 0 and return its result on every rank; an error there ends all of them."""
    if get_world_size() == 1:
        return call()
    outcome, error = [None, False], None
    if get_rank() == 0:
        try:
            outcome = [call(), True]
        except BaseException as raised:
            error = raised
    _call_collective(dist.broadcast_object_list, outcome, group=_cpu_group)
    if error is not None:
        raise error
    if not outcome[1]:
        wait_for_rank0_exit()
        raise SystemExit(1)
    return outcome[0]


def all_reduce_max(n: int) -> int:
    """Return the largest n of all ranks."""
    if get_world_size() == 1:
        return n
    value = torch.tensor(n)
    _call_collective(dist.all_reduce, value, dist.ReduceOp.MAX, group=_cpu_group)
    return int(value)


@contextmanager
def local_rank0_first() -> Iterator[None]:
    """Context manager that lets one process of each node go first, as to fetch a data set."""
    several = get_world_size() > 1
    if several and not is_local_rank0():
        _call_collective(dist.barrier, group=_cpu_group)
    try:
        yield
    finally:
        if several and is_local_rank0():
            _call_collective(dist.barrier, group=_cpu_group)


def is_local_rank0() -> bool:
    """Tell whether this is local rank 0, the first process of its node."""
    return _env_int("LOCAL_RANK", 0) == 0


# --- sums ------------------------------------------------------------------------------------


def all_reduce_sum(t: Tensor) -> Tensor:
    """Return the sum of t over the ranks, also outside `sharded`."""
    if get_world_size() > 1:
        t = t.clone()
        _call_collective(dist.all_reduce, t)
    return t


def all_reduce_mean_(tensors: Iterable[Tensor]) -> None:
    """Set each tensor of floating point to its mean over the ranks."""
    if get_world_size() > 1 and (averaged := [t for t in tensors if t.is_floating_point()]):
        means = _split(all_reduce_sum(_flat(averaged)) / get_world_size(), averaged)
        torch._foreach_copy_(averaged, means)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo _flat: in the shapes and memory formats of `like`."""
    parts = flat.split([t.numel() for t in like])
    return [
        torch.empty_like(t).copy_(part.view(t.shape)) for t, part in zip(like, parts, strict=True)
    ]


def check_replicated(tensors: Mapping[str, Tensor]) -> None:
    """Raise RanksDifferError, with its name, where a tensor has other bits on some rank.

    What is compared is a sum of each one's bits.
    """
    if get_world_size() == 1:
        return
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors.values()]
    sums = torch.stack([t.detach().view(views[t.itemsize]).sum() for t in real])
    largest, smallest = sums.clone(), sums
    _call_collective(dist.all_reduce, largest, dist.ReduceOp.MAX)
    _call_collective(dist.all_reduce, smallest, dist.ReduceOp.MIN)
    differing = (largest != smallest).nonzero().flatten().tolist()
    if differing:
        name = list(tensors)[differing[0]]
        raise RanksDifferError(
            f"{name} is not the same in all processes any more ({len(differing)} of {len(tensors)} "
            "tensors differ): the run cannot go on"
        )


# --- a batch that is shared out --------------------------------------------------------------


@contextmanager
def sharded(batch_size: int) -> Iterator[None]:
    """Context manager in which each rank's batch is its share of a batch of that size."""
    global _batch_size
    _batch_size = batch_size if get_world_size() > 1 else None
    try:
        yield
    finally:
        _batch_size = None


def is_sharded() -> bool:
    """Tell whether a batch is divided among the ranks just now."""
    return _batch_size is not None


def global_batch_size(n: int) -> int:
    """Return the number of images in the batch of which this rank has n."""
    return n if _batch_size is None else _batch_size


def to_global_mean(mean: Tensor, n: int) -> Tensor:
    """Turn a mean over this rank's n images into its contribution to the global mean."""
    return mean if _batch_size is None else mean * (n / _batch_size)


def batch_sum(t: Tensor) -> Tensor:
    """Return the sum of a partial tensor, without a derivative."""
    return t if _batch_size is None else all_reduce_sum(t)


def gather(t: Tensor) -> Tensor:
    """Return the t of all ranks, stacked along a new first dimension; replicated.

    The backward pass returns this rank's row.
    """
    return t[None] if _batch_size is None else _gather_images(t[None], get_world_size())


def share_bounds(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first image, and the one after the last, of a rank's share of n images."""
    return n * rank // world_size, n * (rank + 1) // world_size


def whole_batch(shares: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return tensors (B, …) of the whole batch, given this rank's share of each.

    Each is gathered when it is asked for; the backward pass returns this rank's rows.
    """
    return shares if _batch_size is None else _WholeBatch(shares)


def local_shares(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return this rank's share of what `whole_batch` returned, or the tensors themselves."""
    return tensors.shares if isinstance(tensors, _WholeBatch) else tensors


class _WholeBatch(Sequence):
    def __init__(self, shares: Sequence[Tensor]) -> None:
        self.shares = shares

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _WholeBatch(self.shares[index])
        return _gather_images(self.shares[index], _batch_size)


def _gather_images(share: Tensor, n: int) -> Tensor:
    """Return the n images of all ranks, in order; the backward pass returns this rank's rows.

    An image may have several rows each. Raises PenaltyError where the share's rows are not of
    images.
    """
    world_size = get_world_size()
    bounds = [share_bounds(n, rank, world_size) for rank in range(world_size)]
    begin, end = bounds[get_rank()]
    n_own = end - begin
    n_rows = len(share) // max(n_own, 1)
    if n < world_size:  # a rank without images cannot tell
        rows = torch.tensor(n_rows, device=share.device)
        _call_collective(dist.all_reduce, rows, dist.ReduceOp.MAX)
        n_rows = int(rows)
    if len(share) != n_rows * n_own:
        raise PenaltyError(
            f"an activation of {len(share)} rows for {n_own} images: several processes cannot put "
            "it together"
        )
    bounds = [(begin * n_rows, end * n_rows) for begin, end in bounds]
    sizes = [end - begin for begin, end in bounds]
    own_rows = slice(*bounds[get_rank()])

    def gathered(share: Tensor) -> Tensor:
        padded = share.new_zeros((max(sizes), *share.shape[1:]))  # one size for all: gloo's rule
        padded[: len(share)] = share
        rows = [torch.empty_like(padded) for _ in sizes]
        _call_collective(dist.all_gather, rows, padded)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    return _WithBackward.apply(gathered, lambda g: [g[own_rows]], share)


def copy_to_ranks(*replicated: Tensor) -> tuple[Tensor, ...]:
    """Return replicated tensors for computing partial ones; `reduce_from_ranks` sums the result.

    The backward pass sums the cotangents, which are partial, over the ranks in one message.
    """
    if _batch_size is None:
        return replicated

    def summed(*cotangents: Tensor) -> list[Tensor]:
        return _split(all_reduce_sum(_flat(cotangents)), cotangents)

    return _WithBackward.apply(lambda *ts: tuple(t.view_as(t) for t in ts), summed, *replicated)


def reduce_from_ranks(contribution: Tensor) -> Tensor:
    """Return the sum of a partial tensor over the ranks: a replicated one.

    The backward pass returns the cotangent, which is replicated, as that of every contribution.
    """
    if _batch_size is None:
        return contribution
    return _WithBackward.apply(all_reduce_sum, lambda g: [g], contribution)


class _WithBackward(torch.autograd.Function):
    """forward(*tensors), with backward(*cotangents) as the cotangents of the tensors."""

    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        ctx.cotangents = backward
        return forward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        return None, None, *ctx.cotangents(*cotangents)


@contextmanager
def overlapped_grad_all_reduce(params: Sequence[Tensor]) -> Iterator[Callable[[Sequence], list]]:
    """Context manager that yields `sum_grads`; pass it the gradients computed inside, once each.

    `sum_grads(grads)` returns their sums over the ranks, detached, None where there is none. The
    sums are taken in buckets as the backward pass finishes them, while it goes on with the others.
    """
    if _batch_size is None:
        yield lambda grads: [g if g is None else g.detach() for g in grads]
        return
    waiting: dict[int, Tensor] = {}  # gradients by the index of the parameter
    sent: list[tuple[dict[int, Tensor], Tensor, dist.Work]] = []  # with the message under way

    def add(index: int, g: Tensor) -> None:
        waiting[index] = g.detach()
        if sum(g.nbytes for g in waiting.values()) >= BUCKET_BYTES:
            send()

    def send() -> None:
        if waiting:
            flat = _flat([*waiting.values()])
            work = _call_collective(dist.all_reduce, flat, async_op=True)
            sent.append((dict(waiting), flat, work))
            waiting.clear()

    def sum_grads(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        send()
        sums = [g if g is None else g.detach() for g in grads]
        for contributions, flat, work in sent:
            _call_collective(work.wait)
            totals = _split(flat, [*contributions.values()])
            for index, total in zip(contributions, totals, strict=True):
                sums[index] = total
        return sums

    hooks = [p.register_hook(partial(add, i)) for i, p in enumerate(params)]
    try:
        yield sum_grads
    finally:
        for hook in hooks:
            hook.remove()
