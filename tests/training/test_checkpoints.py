import random
import signal
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import nn

import utils
from data import synthetic
from engine.images.loader import Loader
from engine.system.io import FileError
from engine.training import checkpoints
from engine.training.checkpoints import (
    Checkpointer,
    GracefulShutdown,
    StoppedBySignal,
    load_checkpoint,
    save_checkpoint,
)
from engine.training.train_state import TrainProgress, TrainState
from regularizers import CombinedReg, LPGrad, VarianceNorm
from train import FitConfig, Phase, fit

REGULARIZERS = {
    "none": None,
    "L1Grad": LPGrad(0.1, 1),
    "L2Grad": LPGrad(0.1, 2),
    "StdDevNorm": VarianceNorm(0.1, std_dev=True),
    "combined": CombinedReg(VarianceNorm(0.1), LPGrad(0.1, 2, only_weight_grads=True)),
    "by a difference, every second batch": LPGrad(0.1, 2),
}


class DropoutNet(reference.SmoothNet):
    """A net that draws from torch's global stream."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def begin():
    torch.manual_seed(3)
    net = DropoutNet(num_classes=10)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4)
    return TrainState(
        net, optimizer, utils.make_scheduler("multistep", optimizer, 0.1, "default", 4)
    )


def train_on(training, name, after_batch=lambda state: None, n_epochs=4):
    dataset = synthetic("", 0)
    common = {"mean": dataset.mean, "std": dataset.std}
    train_loader = Loader(
        dataset.train_images[:70],
        dataset.train_labels[:70],
        32,
        shuffle=True,
        augment=True,
        seed=3,
        **common,
    )
    test_loader = Loader(dataset.test_images[:40], dataset.test_labels[:40], 32, **common)
    every, step = (2, 0.01) if "difference" in name else (1, None)
    phases = [Phase(0), Phase(1, REGULARIZERS[name], every=every)]
    config = FitConfig(n_epochs, difference_step=step, after_batch=after_batch)
    return fit(training, train_loader, test_loader, phases, config)


class Cut(Exception):
    pass


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("cut_at", [1, 3, 5, 6, 11])  # of 12 batches, in and between epochs
def test_a_run_that_was_cut_gives_the_same_bits(name, cut_at, tmp_path):
    path, uninterrupted = tmp_path / "r.ckpt", begin()
    history = train_on(uninterrupted, name)

    cut, batches = begin(), []

    def save_and_die(state):
        batches.append(state.batch)
        if len(batches) == cut_at:
            save_checkpoint(cut.state_dict(None), path)
            raise Cut

    with pytest.raises(Cut):
        train_on(cut, name, save_and_die)
    torch.rand(10)
    random.random()
    resumed = begin()
    resumed.load_state_dict(load_checkpoint(path), n_epochs=4, n_batches=3)
    resumed_history = train_on(resumed, name)
    for a, b in zip(
        uninterrupted.net.state_dict().values(), resumed.net.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    untimed = [
        [{key: value for key, value in entry.items() if "second" not in key} for entry in entries]
        for entries in (history, resumed_history)
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("entry", [{"epoch": 0}, {"epoch": 0, "test_accuracy": "0.5"}])
def test_a_history_without_accuracies_is_refused(entry, tmp_path):
    content = begin().state_dict(None)
    content["state"] |= {"epoch": 1, "history": [entry]}
    save_checkpoint(content, tmp_path / "r.ckpt")
    with pytest.raises(FileError, match="the checkpoint.state.history"):
        begin().load_state_dict(load_checkpoint(tmp_path / "r.ckpt"), n_epochs=4, n_batches=3)


def test_random_states_come_back(tmp_path):
    save_checkpoint({}, tmp_path / "c")
    first = random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()
    checkpoints.set_rng_state(load_checkpoint(tmp_path / "c")["random"])
    assert (random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()) == first


def test_two_generations_are_kept_and_the_whole_one_is_found(tmp_path, capsys):
    path = tmp_path / "c"
    assert load_checkpoint(path) is None
    for n in (1, 2, 3):
        save_checkpoint({"n": n}, path)
    assert load_checkpoint(path)["n"] == 3
    path.write_bytes(path.read_bytes()[:-100])
    assert load_checkpoint(path)["n"] == 2 and path.exists()
    assert "the one before it is taken" in capsys.readouterr().err
    assert load_checkpoint(path, repair=True)["n"] == 2
    assert not path.exists() and (tmp_path / "c.damaged").exists()
    assert load_checkpoint(path)["n"] == 2
    checkpoints.backup_path(path).write_bytes(b"")
    with pytest.raises(FileError):
        load_checkpoint(path)


def test_a_write_that_fails_leaves_both_generations(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c"
    saver = Checkpointer(path, lambda: {"n": 1}, every=1, minutes=1e9, shutdown=GracefulShutdown())
    saver.save()

    def full(value, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "torch_save", full)
    saver.save()
    assert "No space left" in capsys.readouterr().err
    assert load_checkpoint(path)["n"] == 1 and [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"format": 99},
        {"format": 1},
        {"format": 1, "net": {}, "random": {}},
        {"format": 1, "net": 3, "optimizer": 4, "scheduler": None, "state": (), "random": []},
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_line(content, tmp_path):
    torch.save(content, tmp_path / "c")
    with pytest.raises(FileError) as refused:
        begin().load_state_dict(load_checkpoint(tmp_path / "c"), n_epochs=4, n_batches=3)
    assert "\n" not in str(refused.value)


def test_a_signal_in_the_last_batches_of_an_epoch_keeps_its_checkpoint(monkeypatch):
    """On several processes, which compare signals only now and then."""
    saved = []
    monkeypatch.setattr(checkpoints.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoints.distributed, "all_reduce_max", lambda n: n)
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda c, p: saved.append(p))
    shutdown = GracefulShutdown()
    saver = Checkpointer(Path("c"), dict, every=5, minutes=1e9, shutdown=shutdown)
    shutdown.signal = signal.SIGTERM
    saver.after_batch()
    assert not saved
    with pytest.raises(StoppedBySignal):
        saver.after_epoch(1, is_last=False)
    assert len(saved) == 1


def test_checkpoints_come_when_they_are_due(monkeypatch):
    saved, clock = [], [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda c, p: saved.append(clock[0]))
    saver = Checkpointer(Path("c"), dict, every=2, minutes=10, shutdown=GracefulShutdown())
    for minute in range(1, 26):
        clock[0] = 60.0 * minute + 1
        saver.after_batch()
    assert [round(t / 60) for t in saved] == [10, 21]
    saved.clear()
    for epoch in (1, 2, 3, 4):
        saver.after_epoch(epoch, is_last=False)
    assert len(saved) == 2
    saver.after_epoch(5, is_last=True)
    assert len(saved) == 3


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_batch_and_a_checkpoint(number, tmp_path, capfd):
    with (
        pytest.raises(StoppedBySignal) as stopped,
        GracefulShutdown() as shutdown,
        shutdown.deferred(),
    ):
        saver = Checkpointer(
            tmp_path / "c", lambda: {"n": 7}, every=1, minutes=1e9, shutdown=shutdown
        )
        saver.after_batch()
        signal.raise_signal(number)
        assert not (tmp_path / "c").exists()
        saver.after_batch()
    assert stopped.value.code == 128 + number and load_checkpoint(tmp_path / "c")["n"] == 7
    assert "checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_of_training_stops_at_once(number):
    with pytest.raises(StoppedBySignal) as stopped, GracefulShutdown():
        signal.raise_signal(number)
        pytest.fail("the signal did not stop it")
    assert stopped.value.code == 128 + number


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulShutdown():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), GracefulShutdown() as shutdown, shutdown.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_what_is_not_finite_is_not_saved(tmp_path):
    training = begin()
    train_on(training, "none", n_epochs=1)
    with torch.no_grad():
        training.net.linear.bias[0] = float("nan")
    with pytest.raises(Exception, match="linear.bias"):
        training.state_dict(None)
    assert isinstance(training.progress, TrainProgress)
