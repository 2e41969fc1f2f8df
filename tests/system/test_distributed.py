"""Processes on loopback: what N of them compute is what one computes."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reference
import test_networks
import tiny_scripts
import torch
from _ranks import free_port, rank_environment
from fork_server import launcher
from torch import nn

import train
from engine.images.loader import Loader
from engine.networks import fast_layers
from engine.step.gradients import compute_gradients
from engine.system import distributed
from engine.system.errors import RanksDifferError, SetupError
from engine.training import checkpoints, train_state
from regularizers import CombinedReg, Regularizer, make_regularizer


def combined():
    return CombinedReg(
        CombinedReg(make_regularizer("L2Grad", 0.3), make_regularizer("VarianceNorm", 2.0)),
        CombinedReg(make_regularizer("StepNoise", 1.0), make_regularizer("L1Grad", 0.02)),
    )


class WholeBatch(Regularizer, register=False):
    """A regularizer of one's own: no sum over images, and nothing about processes in it."""

    def forward(self, a_grads, w_grads):
        total = sum(torch.logsumexp(g.flatten(), 0) / len(g) for g in a_grads)
        return self.lmbda * (total + w_grads[0].abs().amax())


REGULARIZERS = {
    "one's own": lambda: CombinedReg(WholeBatch(0.5), make_regularizer("L2Grad", 0.3)),
    "none": lambda: None,
    "combined": combined,
    **{
        name: partial(make_regularizer, name, 0.5)
        for name in (
            "L1Grad",
            "L2Grad",
            "L3Grad",
            "LinfGrad",
            "VarianceNorm",
            "InverseStdDevNorm",
            "KurtosisNorm",
            "RangeNorm",
            "StepL1Grad",
            "StepL2Grad",
            "StepNoise",
            "AdaptiveSharpness",
        )
    },
    "L2Grad, weights": partial(make_regularizer, "L2Grad", 0.5, only_weight_grads=True),
    "RangeNorm, folded": partial(make_regularizer, "RangeNorm", 0.5, fold_bn=True),
    "difference, every second batch": combined,
    "difference of one's own": lambda: WholeBatch(0.5),
}


class Doubles:
    """A loader whose images are float64."""

    def __init__(self, **options):
        generator = torch.Generator().manual_seed(3)
        images = torch.randint(256, (27, 3, 6, 6), generator=generator, dtype=torch.uint8)
        labels = torch.randint(4, (27,), generator=generator)
        self.loader = Loader(images, labels, 10, (0.5,) * 3, (0.25,) * 3, **options)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def batches(self, *arguments, **options):
        for x, y in self.loader.batches(*arguments, **options):
            yield x.double(), y


def trained(name, sync=True):
    """Train two epochs in float64, the last batch of each smaller; return all that results."""
    torch.manual_seed(0)
    net, criterion = tiny_scripts.TinyFused().double(), nn.CrossEntropyLoss()
    for m in net.modules():
        m.sync = sync
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ranks = {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
    train_loader = Doubles(seed=1, augment=True, shuffle=True, **ranks)
    state = train_state.TrainState(net, optimizer, scheduler)
    every, step = 2 if "second" in name else 1, 0.01 if "difference" in name else None
    phases = [train.Phase(0, REGULARIZERS[name](), warmup=0.5, every=every)]
    config = train.FitConfig(2, criterion, torch.float64, difference_step=step)
    training = train.fit(state, train_loader, Doubles(cache=True), phases, config)
    history = reference.go_through(training)
    numbers = [[value for key, value in entry.items() if "second" not in key] for entry in history]
    return {"numbers": torch.tensor(numbers, dtype=torch.float64), **net.state_dict()}


class Ranks:
    """Processes that call work(*arguments), a function of a module, as ranks of one run."""

    def __init__(self, n, work, *arguments):
        port = free_port()
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, str(rank)) for rank in range(n)]
        self.pids = [
            launcher().start(be_rank, rank, n, port, file, work, *arguments)
            for rank, file in enumerate(self.files)
        ]

    def all_run(self):
        return all(launcher().poll(pid) is None for pid in self.pids)

    def wait(self):
        """Return by rank what work() returned on those that were not killed."""
        results = {}
        for rank, (pid, file) in enumerate(zip(self.pids, self.files, strict=True)):
            code = launcher().wait(pid)
            assert code in (0, -signal.SIGKILL), file.with_suffix(".err").read_text()
            if code == 0:
                results[rank] = pickle.loads(file.read_bytes())
        return results


def be_rank(rank, n, port, file, work, *arguments):
    """Call work(*arguments) as one of n ranks, and write what it returns to the file."""
    os.dup2(os.open(file.with_suffix(".err"), os.O_CREAT | os.O_WRONLY), 2)
    os.environ |= rank_environment(rank, n, port)
    distributed.RANK0_EXIT_SECONDS = 0.0  # there is no torchrun to end who waits
    file.write_bytes(pickle.dumps(work(*arguments)))


def on(n, work, *arguments):
    """Return what work(*arguments) returns on each of n ranks."""
    results = Ranks(n, work, *arguments).wait()
    return [results[rank] for rank in range(n)]


def all_trained(names, sync=True):
    """Return the results of these regularizers, as arrays by name and key."""
    with distributed.process_group("cpu"):
        return {name: {key: t.numpy() for key, t in trained(name, sync).items()} for name in names}


def assert_same(results, expected, where):
    for name, result in expected.items():
        for key, value in result.items():
            np.testing.assert_allclose(
                results[name][key], value, rtol=1e-9, atol=1e-10, err_msg=f"{where} {name} {key}"
            )


# one for each kind of input: the others are computed from the same sums over processes
OF_EACH_KIND = ["one's own", "combined", "LinfGrad", "RangeNorm, folded", "StepL2Grad",
                "difference, every second batch"]  # fmt: skip


@pytest.mark.parametrize(
    "names", [OF_EACH_KIND, pytest.param([*REGULARIZERS], marks=pytest.mark.slow)], ids=len
)
def test_n_processes_train_what_one_does(names):
    (single,) = on(1, all_trained, names)
    for n, some in ((2, names), (4, ["combined", "difference, every second batch"])):
        for rank, results in enumerate(on(n, all_trained, some)):
            assert_same(results, {name: single[name] for name in some}, (n, rank))


@pytest.mark.slow
def test_with_statistics_of_their_own_the_ranks_still_agree():
    names = ["L2Grad", "RangeNorm, folded"]
    (alone,) = on(1, all_trained, names)
    first, second = on(2, all_trained, names, False)
    assert_same(first, second, "ranks")
    for name in names:
        assert np.abs(first[name]["conv1.weight"] - alone[name]["conv1.weight"]).max() > 1e-4


def message_of_a_rank_that_differs():
    with distributed.process_group("cpu"):
        net = tiny_scripts.TinyFused()
        for t in net.state_dict().values():
            t.zero_()
        distributed.check_replicated(net.state_dict())
        if distributed.get_rank():
            net.conv1.weight.data.view(-1)[3] = 1e-40
        with pytest.raises(RanksDifferError) as caught:
            distributed.check_replicated(net.state_dict())
        return str(caught.value)


def test_a_parameter_that_differs_between_ranks_ends_the_run():
    messages = on(2, message_of_a_rank_that_differs)
    assert all(message.startswith("conv1.weight is not the same") for message in messages)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    def chosen(n_gpus, device="cuda"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        return distributed._choose_gpu(device).index

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (chosen(8), chosen(4), chosen(1)) == (3, 3, 0)  # a launcher may show each one alone
    for n_gpus, device in ((3, "cuda"), (0, "cuda"), (4, "cuda:1")):
        with pytest.raises(SetupError, match=f"4 processes and {n_gpus} GPUs"):
            chosen(n_gpus, device)


def test_two_processes_on_one_gpu_are_refused():
    store = torch.distributed.HashStore()
    store.set("gpu/1", "GPU-b")
    distributed._check_own_gpu(store, 0, 2, "GPU-a")
    with pytest.raises(SetupError, match="2 processes and 1 GPUs: each process needs one"):
        distributed._check_own_gpu(store, 0, 2, "GPU-b")


def network_gradients():
    """Return the gradients of one step of each network of test_networks.py, as arrays."""
    gradients, criterion, penalty = {}, nn.CrossEntropyLoss(), make_regularizer("L2Grad", 0.1)
    with distributed.process_group("cpu"):
        begin, end = distributed.share_bounds(
            5, distributed.get_rank(), distributed.get_world_size()
        )
        for name in test_networks.SMALL:
            net = fast_layers.use_fast_layers(test_networks.make(name))
            x, y = test_networks.batch(32 if "torchvision" in name else 16, n=5)
            with distributed.sharded(5):
                compute_gradients(net, criterion, penalty, x[begin:end], y[begin:end])
            gradients[name] = {key: p.grad.numpy() for key, p in net.named_parameters()}
    return gradients


@pytest.mark.slow
def test_two_processes_take_the_step_of_plain_double_backprop_with_every_network():
    expected = {}
    for name in test_networks.SMALL:
        plain = test_networks.make(name)
        x, y = test_networks.batch(32 if "torchvision" in name else 16, n=5)
        test_networks.plain_step(plain, x, y)
        expected[name] = {key: p.grad.numpy() for key, p in plain.named_parameters()}
    for results in on(2, network_gradients):
        for name, gradients in expected.items():
            scale = max(np.abs(g).max() for g in gradients.values())
            for key, g in gradients.items():
                np.testing.assert_allclose(results[name][key], g, rtol=0, atol=1e-9 * scale)


# --- the scripts -----------------------------------------------------------------------------

FLAGS = [
    *tiny_scripts.FLAGS,
    "--model",
    "TinyFused",
    "--n_epochs",
    "3",
    "--regularizer",
    "L2Grad",
    "--lr",
    "0.001",
]


def run(folder, script, *argv):
    """Run the script in the folder, its output in log<rank>; return its exit code."""
    os.chdir(folder)
    log = os.open(f"log{os.environ['RANK']}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return tiny_scripts.run(script, list(argv))


def logs(folder, n=2):
    return [(folder / f"log{rank}").read_text() for rank in range(n)]


def weights(folder):
    return torch.load(folder / "r.pt", weights_only=True)


def started(folder, *flags):
    """Start a long run on two ranks and wait for its first checkpoint."""
    ranks = Ranks(2, run, folder, "train.py", *FLAGS, *flags)
    while not (folder / "r.ckpt").exists():
        assert ranks.all_run(), logs(folder)
        time.sleep(0.02)
    return ranks


def test_rank_0_alone_writes_and_prints(tmp_path):
    assert on(2, run, tmp_path, "train.py", *FLAGS) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "log0",
        "log1",
        "r.pt",
        "r.json",
        "r.ckpt",
        "r.ckpt.previous",
    }
    printed, silent = logs(tmp_path)
    assert "2 processes" in printed and silent == ""
    assert json.loads((tmp_path / "r.json").read_text())["machine"]["processes"] == 2


@pytest.mark.parametrize("n", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stopped_run_is_resumed_by_another_number_of_processes(n, tmp_path):
    (tmp_path / "single").mkdir()
    assert on(1, run, tmp_path / "single", "train.py", *FLAGS, "--n_epochs", "20") == [0]
    ranks = started(tmp_path, "--n_epochs", "20")
    os.kill(ranks.pids[1], signal.SIGTERM)  # one is told, all stop after the same batch
    assert ranks.wait() == {0: 143, 1: 143}
    assert "--resume" in logs(tmp_path)[0] and ": stopped" not in logs(tmp_path)[1]
    again = [*FLAGS, "--n_epochs", "20", "--resume"]
    assert on(n, run, tmp_path, "train.py", *again) == [0] * n
    expected = weights(tmp_path / "single")
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_run_in_one_line(victim, tmp_path):
    ranks = started(tmp_path, "--n_epochs", "1000000")
    os.kill(ranks.pids[victim], signal.SIGKILL)
    assert ranks.wait() == {1 - victim: 1}
    log = logs(tmp_path)[1 - victim]
    assert "Traceback" not in log and log.splitlines()[-1].count("error:") == 1
    assert "another process of this run is gone" in log and "--resume continues" in log
    checkpoints.load_checkpoint(tmp_path / "r.ckpt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_subset", "33"], "a batch of 1 images"),
        (["--model", "Foreign"], "norm1 is a ForeignNorm of tiny_scripts"),
        (["--n_epochs", "0"], "--n_epochs"),
    ],
)
def test_what_cannot_be_shared_out_is_told_once(flags, message, tmp_path):
    (tmp_path / "r.pt").write_text("of an earlier run")
    assert on(2, run, tmp_path, "train.py", *FLAGS, *flags) == [2, 2]
    assert (tmp_path / "r.pt").exists()  # nothing is set aside for a run that cannot be
    reported, silent = logs(tmp_path)
    assert (
        "error:" in reported.splitlines()[-1]
        and message in reported
        and "Traceback" not in reported
    )
    assert silent == ""


@pytest.mark.parametrize("flags", [("Tiny",), ("Foreign", "--no-sync_bn")])
@pytest.mark.sampled(2)
def test_plain_batch_norms_train_with_sync_and_foreign_ones_without(flags, tmp_path):
    assert on(2, run, tmp_path, "train.py", *FLAGS, "--model", *flags) == [0, 0]


def test_a_number_that_is_not_finite_is_told_once(tmp_path):
    assert on(2, run, tmp_path, "train.py", *FLAGS, "--lr", "1e18") == [1, 1]
    reported, silent = logs(tmp_path)
    assert reported.splitlines()[-1].count(": error: epoch") and silent == ""


def test_a_rank_left_in_the_environment_means_nothing_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert distributed.get_rank() == 0


def test_without_torchrun_there_are_no_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SetupError, match="LOCAL_RANK, LOCAL_WORLD_SIZE"):
        with distributed.process_group("cpu"):
            pass


def test_what_rank_0_cannot_read_ends_all_quietly(tmp_path):
    (tmp_path / "r.ckpt").write_bytes(b"nonsense")
    assert on(2, run, tmp_path, "train.py", *FLAGS, "--resume") == [1, 1]
    reported, silent = logs(tmp_path)
    assert reported.count("error:") == 1 and silent == ""


QUANTIZE = (
    "quant_inference.py r.pt --model TinyFused --dataset Tiny --batch_size 10 --per_layer "
    "--bits 3 8 --act_bits 8 --calibration_images 64 --per_layer_images 64 --no_plots"
).split()


def test_quantization_is_the_same_on_two_processes(tmp_path):
    assert on(1, run, tmp_path, "train.py", *FLAGS) == [0]
    results = {}
    for n in (1, 2):
        exit_codes = on(n, run, tmp_path, *QUANTIZE, "--output", str(n))
        assert exit_codes == [0] * n, logs(tmp_path, n)
        results[n] = json.loads((tmp_path / str(n) / "results.json").read_text())
    assert logs(tmp_path)[1] == ""
    for table in ("rows", "per_layer"):
        for one, two in zip(results[1][table], results[2][table], strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                assert two[key] == (
                    pytest.approx(value, rel=1e-5, abs=1e-7) if type(value) is float else value
                )


def children(pid):
    """Return the pids of the process's children."""
    results = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError):  # it may have ended
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == pid:
                results.append(int(process.name))
    return results


@pytest.mark.slow
def test_torchrun_starts_again_what_died_and_it_goes_on(tmp_path):
    """Through torchrun: a rank is killed, all are started again, the result has the same bits."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "--max_restarts",
            "1",
            tiny_scripts.__file__,
            "train.py",
            *FLAGS,
            "--n_epochs",
            "20",
        ],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "r.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    message = process.communicate(timeout=120)[0]
    assert process.returncode == 0, message
    (tmp_path / "single").mkdir()
    single = tmp_path / "single"
    assert on(2, run, single, "train.py", *FLAGS, "--n_epochs", "20") == [0, 0]
    expected = weights(tmp_path / "single")
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path).items())
