"""A step waits for no device: it reads no tensor's value, and no tensor in it lies on the CPU.

It runs on PyTorch's "meta" device, whose tensors have no values: where a GPU would have to be
waited for, reading one is an error here. What would be copied from the CPU to a GPU is a tensor
that is not on this device.
"""

import contextlib

import pytest
import torch
from reference import SmoothNet, go_through
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from engine.images import loader
from engine.networks import batch_norm, fast_layers
from engine.step import batch_loss, gradients
from engine.step.metrics import batch_metrics_row
from engine.training.train_state import TrainState
from models import ConvNet
from regularizers import REGULARIZERS, CombinedReg, KurtosisNorm, LPGrad, make_regularizer

META = torch.device("meta")
PENALTIES = [
    make_regularizer(name.replace("<P>", P), 0.1)
    for name in REGULARIZERS
    for P in (("1", "2", "3") if "<P>" in name else ("",))
]
PENALTIES += [
    LPGrad(0.1, 2, only_weight_grads=True),
    KurtosisNorm(0.1, fold_bn=True),
    CombinedReg(LPGrad(0.1, 2), KurtosisNorm(0.1)),
]


class OnOneDevice(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor elsewhere than on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, result)):
            if isinstance(t, torch.Tensor) and t.device != META:
                raise AssertionError(f"{func} has a tensor on the CPU")
        return result


class NotMadeOfNumbers(TorchFunctionMode):
    """Fails where a tensor is made of Python's numbers: they are copied to the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise AssertionError(f"{func.__name__} copies to the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronization():
    with OnOneDevice(), NotMadeOfNumbers():
        yield


@pytest.fixture(autouse=True)
def _meta_is_a_device(monkeypatch):
    """Streams of random numbers and autocast, which the meta device has not."""
    monkeypatch.setattr(batch_loss, "get_rng_state", lambda device: None)
    monkeypatch.setattr(batch_loss, "rng_from", lambda state, device: contextlib.nullcontext())
    monkeypatch.setattr(train.hardware, "seed_rng", lambda seed, device: None)
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)  # to bfloat16
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)


class TwoBlocks(ConvNet):
    """A short ConvNet: an operation on the meta device takes a millisecond."""

    BLOCKS = ((3, 4, 1), (4, 6, 2))


def make_net(kind):
    with META:
        return fast_layers.use_fast_layers(kind())


def batch(n=4):
    return torch.empty(n, 3, 8, 8, device=META), torch.empty(n, dtype=torch.int64, device=META)


def test_a_batch_norm_that_averages_over_all_batches():
    with META:
        norm = fast_layers.use_fast_layers(nn.Sequential(nn.BatchNorm2d(3, momentum=None)))
    x, _ = batch()
    with no_synchronization():
        norm(x)


@pytest.mark.parametrize("kind", [TwoBlocks, SmoothNet])
@pytest.mark.parametrize("difference_step", [None, 0.01])
@pytest.mark.parametrize("penalty", [None, *PENALTIES], ids=lambda p: p and p.label)
@pytest.mark.sampled(5)
def test_a_step(kind, penalty, difference_step):
    net, criterion = make_net(kind), nn.CrossEntropyLoss(label_smoothing=0.1)
    x, y = batch()
    if penalty and "folded_weights" in penalty.inputs:
        batch_norm.find_foldings(net, x.shape[1:])  # which a run finds before its first step
    with no_synchronization():
        result = gradients.compute_gradients(
            net, criterion, penalty, x, y, torch.bfloat16, 0.5, difference_step
        )
        batch_metrics_row(net, len(x), *result)


def test_a_batch_of_the_loop(monkeypatch):
    net, batches = make_net(ConvNet), loader.Loader(
        torch.zeros(12, 3, 8, 8, dtype=torch.uint8), torch.zeros(12, dtype=torch.int64), 4,
        (0.5,) * 3, (0.2,) * 3, augment=True, shuffle=True, device=META,
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, foreach=True)
    state = TrainState(net, optimizer, None)
    monkeypatch.setattr(train, "summarize", lambda state, regularizer: {})  # reads, once an epoch
    made = batches.batches(0)
    first = next(made)  # sends the epoch's order to the device

    def rest(epoch, start):
        yield first
        yield from made

    monkeypatch.setattr(batches, "batches", rest)
    with no_synchronization():
        phase = train.Phase(0, LPGrad(0.1, 2), warmup=1)
        go_through(train.run_epoch(state, batches, phase, train.FitConfig(1)))
    assert state.progress.batch == 3


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor(1.0),
        lambda x: x + torch.ones(8),
        lambda x: torch.tensor(1.0, device=x.device) + x,
    ],
)
def test_what_would_wait_is_found(waits):
    x, _ = batch()
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), no_synchronization():
        waits(x)
