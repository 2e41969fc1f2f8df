import functools
import random
import signal

import numpy as np
import pytest
import reference
import tiny_scripts
import torch

import train
import utils
from data import synthetic
from engine.images.loader import Loader
from engine.networks.layers import not_finite
from engine.system import signals
from engine.system.io import FileError
from engine.system.signals import STOP_SIGNALS, GracefulShutdown, StoppedBySignal
from engine.training import checkpoints
from engine.training.averaging import make_average
from engine.training.checkpoints import CheckpointClock, load_checkpoint, save_checkpoint
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


def begin():
    torch.manual_seed(3)
    net = reference.DropoutNet(num_classes=10)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4)
    return TrainState(
        net, optimizer, utils.make_scheduler("multistep", optimizer, 0.1, "default", 4)
    )


def train_on(training, name, after_batch=None, n_epochs=4):
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
    config = FitConfig(n_epochs, difference_step=step)
    return reference.go_through(
        fit(training, train_loader, test_loader, phases, config), after_batch
    )


class Cut(Exception):
    pass


@functools.cache
def uninterrupted(name):
    """Return weights and history of the run that was not cut."""
    training = begin()
    history = train_on(training, name)
    return training.net.state_dict(), history


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("cut_at", [1, 3, 5, 6, 11])  # of 12 batches, in and between epochs
@pytest.mark.sampled(4)
def test_a_run_that_was_cut_gives_the_same_bits(name, cut_at, tmp_path):
    path, (weights, history) = tmp_path / "r.ckpt", uninterrupted(name)
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
    for a, b in zip(weights.values(), resumed.net.state_dict().values(), strict=True):
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
    checkpoints.set_all_rng_states(load_checkpoint(tmp_path / "c")["random"])
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
    save_checkpoint({"n": 1}, path)

    def full(value, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "torch_save", full)
    save_checkpoint({"n": 2}, path)
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


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(batches, *flags) trains the tiny network, batches = {n: call after the n-th batch}.

    Returns the number of batches done at each checkpoint, and the exit code.
    """
    monkeypatch.chdir(tmp_path)

    def run(batches, *flags):
        done, saved, step, save = [], [], TrainState.step, checkpoints.save_checkpoint

        def counted(state):
            step(state)
            done.append(None)
            batches.get(len(done), lambda: None)()

        def noted(content, path):
            saved.append(len(done))
            save(content, path)

        with monkeypatch.context() as patch:
            patch.setattr(TrainState, "step", counted)
            patch.setattr(train, "save_checkpoint", noted)
            return saved, tiny_scripts.run("train.py", [*tiny_scripts.FLAGS, *flags])

    return run


def test_a_signal_in_the_last_batches_of_an_epoch_keeps_its_checkpoint(monkeypatch, run):
    """On several processes, which compare signals only now and then."""
    monkeypatch.setattr(signals.distributed, "all_reduce_max", lambda n: n)
    shutdown = GracefulShutdown()
    with monkeypatch.context() as patch:
        patch.setattr(signals.distributed, "get_world_size", lambda: 2)
        shutdown.signal = signal.SIGTERM
        assert not shutdown.requested(batch=1)
        assert shutdown.requested(batch=0) == shutdown.requested(batch=8) == signal.SIGTERM
    requested = GracefulShutdown.requested
    at_the_end = lambda self, batch: requested(self, batch) if batch == 0 else 0  # noqa: E731
    monkeypatch.setattr(GracefulShutdown, "requested", at_the_end)
    stop = {4: lambda: signal.raise_signal(signal.SIGTERM)}  # in the first of two epochs of five
    assert run(stop, "--n_epochs", "2", "--checkpoint_every", "5") == ([5], 143)


def test_checkpoints_come_when_they_are_due(monkeypatch):
    saved, clock = [], [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    saver = CheckpointClock(every=2, minutes=10, n_epochs=5)

    def save_if_due(epoch, batch):
        if saver.is_due(epoch, batch):
            saved.append(clock[0])
            saver.restart()

    for minute in range(1, 26):
        clock[0] = 60.0 * minute + 1
        save_if_due(0, minute)
    assert [round(t / 60) for t in saved] == [10, 21]
    saved.clear()
    for epoch in (1, 2, 3, 4):
        save_if_due(epoch, 0)
    assert len(saved) == 2
    save_if_due(5, 0)
    assert len(saved) == 3


def test_a_run_saves_when_it_is_due(run):
    assert run({}, "--n_epochs", "3", "--checkpoint_every", "2") == ([10, 15], 0)
    assert run({}, "--n_epochs", "1", "--checkpoint_minutes", "1e-9") == ([1, 2, 3, 4, 5, 5], 0)


@pytest.fixture(params=STOP_SIGNALS)
def number(request):
    """One of the signals, heard also where the tests run under nohup or in a shell's background."""
    default = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(request.param, default)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_batch_and_a_checkpoint(number, run, tmp_path, capfd):
    def stop():
        signal.raise_signal(number)
        assert not (tmp_path / "r.ckpt").exists()

    assert run({7: stop}, "--n_epochs", "3", "--checkpoint_every", "3") == ([7], 128 + number)
    progress = load_checkpoint(tmp_path / "r.ckpt")["state"]
    assert (progress["epoch"], progress["batch"]) == (1, 2)
    assert "checkpoint" in capfd.readouterr().err


def test_the_handlers_before_come_back(number):
    before = signal.getsignal(number)
    with GracefulShutdown():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


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


def test_what_was_infinite_before_training_may_stay_so():
    """As a causal mask; after a checkpoint and in the average, too."""
    states = []
    for _ in range(2):
        net = tiny_scripts.Tiny(10)
        net.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scheduler = utils.make_scheduler("none", optimizer, 0.1, "default", 2)
        average, infinite = make_average(net, 0.5), not_finite(net)
        states.append(TrainState(net, optimizer, scheduler, average=average, infinite=infinite))
    assert states[0].infinite == ["mask"]
    content = states[0].state_dict(None)
    states[1].load_state_dict({**content, "random": checkpoints.get_all_rng_states()}, 1, 1)
    assert torch.equal(states[1].net.conv1.weight, states[0].net.conv1.weight)
