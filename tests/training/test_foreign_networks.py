"""Networks, losses and data sets of others: trained as plain PyTorch does, or one line."""

import argparse
import copy
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import reference
import test_distributed
import torch
from torch import nn
from torch.nn import functional as F

import combined_protocol
import data
import models
import train
import utils
from engine.networks.batch_norm import describe_unfolded, folded_weights
from engine.step.gradients import compute_gradients
from engine.step.trial import check_criterion, check_penalty
from engine.system import distributed
from engine.system.errors import DataError, FileError, PenaltyError, SetupError
from engine.training.resume import check_init_from
from engine.training.train_state import TrainProgress
from regularizers import LPGrad

CE = nn.CrossEntropyLoss()
SHAPE = (3, 8, 8)


class Fading(nn.Module):
    """What reads the batch norm changes with `is_late`, which each kind below decides otherwise."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.head, self.count = nn.Linear(6, num_classes), 0
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = self.act(y)
        if self.training and self.is_late():
            z = z + 0.5 * y
        return self.head(z.mean((2, 3)))


class ByBuffer(Fading):
    def is_late(self):
        self.n_batches += 1
        return self.n_batches > 2


class ByCounter(Fading):
    def is_late(self):
        self.count += 1
        return self.count > 2


class AtRandom(Fading):
    def is_late(self):
        return torch.rand(()).item() < 0.5


class AtPythonsRandom(Fading):
    def is_late(self):
        return random.random() < 0.5


class ByType(Fading):
    """It rectifies after modules of one type."""

    def forward(self, x):
        for module in (self.conv, self.norm):
            x = module(x)
            x = x.relu() if type(module) is nn.BatchNorm2d else x
        return self.head(x.mean((2, 3)))


class ByTurns(Fading):
    is_odd = False

    def is_late(self):
        self.is_odd = not self.is_odd
        return self.is_odd


@pytest.mark.parametrize("kind", [ByBuffer, ByCounter, ByTurns, AtRandom, AtPythonsRandom, ByType])
def test_a_network_that_changes_is_trained_as_it_is(kind, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "Own", kind)
    for seed in range(3):  # another branch is taken while the network is made
        torch.manual_seed(seed)
        random.seed(seed)
        net = utils.make_net("Own", 10, "cpu", image_shape=SHAPE).double()
        assert ("trained with PyTorch's own layers" in capsys.readouterr().out) == (kind is ByType)
        plain = kind().double()
        plain.load_state_dict(net.state_dict())
        plain.count = net.count
        for batch in range(4):
            x, y = torch.randn(6, *SHAPE, dtype=torch.float64), torch.randint(10, (6,))
            losses = []
            for each in (net, plain):
                torch.manual_seed(batch)
                random.seed(batch)
                if each is net:
                    losses.append(compute_gradients(net, CE, None, x, y, torch.float64)[0])
                else:
                    losses.append(CE(plain(x), y))
            torch.testing.assert_close(*losses)
            grads = torch.autograd.grad(losses[1], [*plain.parameters()])
            torch.testing.assert_close([p.grad for p in net.parameters()], [*grads])


class NotedMode(Fading):
    """It keeps plain values that say nothing of its order."""

    def train(self, mode=True):
        self.mode = "train" if mode else "eval"
        return super().train(mode)

    def is_late(self):
        self.last = 3
        return False


class NoisyByNumpy(Fading):
    def forward(self, x):
        return super().forward(x + np.random.randn())

    def is_late(self):
        return False


@pytest.mark.parametrize(("kind", "is_paired"), [(NotedMode, True), (NoisyByNumpy, False)])
def test_a_network_that_stays_keeps_the_fast_layers(kind, is_paired, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "Own", kind)
    state = np.random.get_state()[1].copy()
    net = utils.make_net("Own", 10, "cpu", image_shape=SHAPE)
    assert "PyTorch's own" not in capsys.readouterr().out
    assert type(net.norm).__name__ == ("BatchNormBeforeRectifier" if is_paired else "BatchNorm2d")
    assert type(net.norm) is not nn.BatchNorm2d
    assert np.array_equal(np.random.get_state()[1], state)


# --- activations that are not (B, …) -------------------------------------------------------------


class Tokens(nn.Module):
    """Activations of windows (B·4, …) and of tokens (T, B, …)."""

    def __init__(self):
        super().__init__()
        self.of_windows, self.of_tokens, self.head = (
            nn.Linear(12, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )
        self.act = nn.Softplus()

    def forward(self, x):
        windows = self.act(self.of_windows(x.reshape(-1, 12)))
        tokens = windows.reshape(len(x), -1, 6).transpose(0, 1)
        return self.head(self.act(self.of_tokens(tokens)).mean(0))


class Windows(Tokens):
    """Activations of windows alone."""

    def forward(self, x):
        return self.head(
            self.act(self.of_windows(x.reshape(len(x), -1, 12).flatten(0, 1)))
            .reshape(len(x), -1, 6)
            .mean(1)
        )


class Generated(Tokens):
    """A layer whose factors are made by another, from no image."""

    def __init__(self):
        super().__init__()
        self.generate = nn.Linear(3, 6)

    def forward(self, x):
        factors = self.act(self.generate(torch.ones(5, 3, dtype=x.dtype))).mean(0)
        return self.head(self.act(self.of_windows(x.reshape(len(x), -1, 12)).mean(1) * factors))


def expected_penalty(net, x, y):
    activations = []
    hook = net.act.register_forward_hook(lambda m, args, a: activations.append(a))
    loss = CE(net(x), y)
    hook.remove()
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
    grads = torch.autograd.grad(loss, [*weights, *activations], materialize_grads=True)
    return 0.5 * sum(
        g.norm() * (1 if i < len(weights) else len(x) ** -0.5) for i, g in enumerate(grads)
    )


def tokens_problem():
    torch.manual_seed(0)
    x, y = torch.randn(6, *SHAPE, dtype=torch.float64), torch.randint(4, (6,))
    return x, y


@pytest.mark.parametrize("kind", [Tokens, Generated])
def test_b_is_the_number_of_images(kind):
    x, y = tokens_problem()
    net = kind().double()
    _, penalty, _ = compute_gradients(net, CE, LPGrad(0.5, 2), x, y, torch.float64)
    torch.testing.assert_close(penalty, expected_penalty(net, x, y))


CASES = [(Tokens, LPGrad), (Windows, LPGrad), (Windows, test_distributed.WholeBatch)]


def penalties(share=slice(None)):
    """The penalty of each case, of a rank's share of the images."""
    x, y = tokens_problem()
    found = []
    for kind, penalty in CASES:
        regularizer = penalty(0.5, 2) if penalty is LPGrad else penalty(0.5)
        torch.manual_seed(1)
        net = kind().double()
        with distributed.sharded(6):
            value = compute_gradients(net, CE, regularizer, x[share], y[share], torch.float64)[1]
        found.append(value.item())
    return found


def penalties_of_a_rank():
    with distributed.process_group("cpu"):
        rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
        found = penalties(slice(*distributed.share_bounds(6, rank, n_ranks)))
        with distributed.sharded(2 * n_ranks):
            with pytest.raises(PenaltyError) as refused:
                check_penalty(Generated(), LPGrad(0.5, 2), SHAPE)
        return found, str(refused.value)


def test_processes_agree_on_activations_of_windows_and_tokens():
    expected = penalties()
    for found, message in test_distributed.on(2, penalties_of_a_rank):
        assert found == pytest.approx(expected, rel=1e-9)
        assert "activation 0, (5, 6), is of no image, and its gradient a sum" in message


# --- what a network keeps ------------------------------------------------------------------------


class Keeping(reference.SmoothNet):
    """It keeps a tensor with its graph, and a number that its state_dict lacks."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes=num_classes)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x):
        logits, activations = super().forward(x - self.mean)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        self.last = activations
        return logits, activations


FLAGS = (
    "--dataset Synthetic --device cpu --model Own --train_subset 96 --batch_size 32 --run_name r"
)
COMMON = [*FLAGS.split(), "--no-compile", "--lr", "0.01"]


def weights(name):
    return torch.load(f"{name}.pt", weights_only=True)


def test_buffers_that_no_state_dict_has_are_resumed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Own", Keeping)
    flags = [*COMMON, "--regularizer", "L2Grad", "--ema", "0.9"]
    train.main([*flags, "--n_epochs", "3"])
    train.main([*flags, "--n_epochs", "1", "--save_file", "cut"])
    train.main([*flags, "--n_epochs", "3", "--save_file", "cut", "--resume"])
    for name in ("", "_ema"):
        whole, cut = weights(f"r{name}"), weights(f"cut{name}")
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    history = [json.loads((tmp_path / f"{n}.json").read_text())["history"] for n in ("r", "cut")]
    assert history[0][-1]["test_loss"] == history[1][-1]["test_loss"]


def test_a_trial_leaves_buffers_as_they_are():
    class Counting(reference.SmoothNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("n_runs", torch.zeros(()))
            self.register_buffer("doubled", torch.ones(()))

        def forward(self, x):
            self.n_runs += 1
            self.doubled = 2 * self.doubled
            return super().forward(x)

    net = Counting()
    check_penalty(net, LPGrad(0.1, 2), SHAPE)
    assert (net.n_runs, net.doubled) == (0, 1)
    assert dict(net.named_buffers())["doubled"] is net.doubled


class Odd(reference.SmoothNet):
    """Its buffers cannot be written, are its parameters, come and grow."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes=num_classes)
        self.register_buffer("expanded", torch.ones(1).expand(4), persistent=False)
        self.register_buffer("view", self.linear.weight[0], persistent=False)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("phase", torch.ones((), dtype=torch.complex128))

    def forward(self, x):
        self.table = torch.linspace(0, 1, x.shape[-1])
        self.late = x.mean()
        return super().forward(x + self.table)


def test_buffers_of_every_kind_are_tried_and_resumed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Own", Odd)
    net = Odd()
    check_penalty(net, LPGrad(0.1, 2), SHAPE)
    assert net.late is None and net.table.shape == (1,)
    flags = [*COMMON, "--regularizer", "L2Grad", "--train_subset", "64"]
    train.main([*flags, "--n_epochs", "2"])
    train.main([*flags, "--n_epochs", "1", "--save_file", "cut"])
    train.main([*flags, "--n_epochs", "2", "--save_file", "cut", "--resume"])
    whole, cut = weights("r"), weights("cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


class TwoNorms(nn.Module):
    """Two layers and their norms, of which something is shared or computed."""

    def __init__(self, shared):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.all = nn.ModuleList([self.a, self.b])
        self.norm_a, self.norm_b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        if shared == "gamma":
            self.norm_b.weight = self.norm_a.weight
        elif shared == "variance":
            self.norm_b._buffers["running_var"] = self.norm_a.running_var
        elif shared == "norm":
            self.norm_b = self.norm_a
        elif shared == "parametrized":
            nn.utils.parametrize.register_parametrization(self.norm_b, "weight", nn.Softplus())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm_b(self.b(self.norm_a(self.a(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("shared", ["nothing", "gamma", "variance", "norm", "parametrized"])
def test_norms_that_share_something_are_folded(shared):
    torch.manual_seed(0)
    net = TwoNorms(shared)
    for norm in (net.norm_a, net.norm_b):
        norm.running_var.uniform_(1, 2)
        nn.init.uniform_(next(norm.parameters()), 1, 2)
    a, b, head = folded_weights(net)
    for folded, layer, norm in ((a, net.a, net.norm_a), (b, net.b, net.norm_b)):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(folded, layer.weight * gain[:, None, None, None])
    assert head is net.head.weight and describe_unfolded(net, SHAPE, "R") is None


def test_a_batch_norm_of_ones_own_is_folded():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.b = nn.Parameter(torch.rand(6) + 1), nn.Parameter(torch.zeros(6))
            self.register_buffer("rm", torch.zeros(6))
            self.register_buffer("rv", torch.rand(6) + 1)

        def forward(self, x):
            return F.batch_norm(x, self.rm, self.rv, self.g, self.b, self.training, 0.1, 1e-3)

    net = nn.Sequential(nn.Conv2d(3, 6, 3), Norm(), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    assert describe_unfolded(net, SHAPE, "KurtosisNorm") is None
    gain = net[1].g / (net[1].rv + 1e-3).sqrt()
    folded, last = folded_weights(net)
    torch.testing.assert_close(folded, net[0].weight * gain[:, None, None, None])
    assert last is net[4].weight


# --- flags, files and data that do not fit -------------------------------------------------------


def error_of(flags, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.main([*COMMON, *flags.split()])
    assert end.value.code in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_ends_with_one_line(monkeypatch, tmp_path, capsys):
    class Sparse(Keeping):
        def __init__(self, num_classes=10):
            super().__init__(num_classes)
            self.frozen = nn.Embedding(4, num_classes, sparse=True).requires_grad_(False)
            self.table = nn.Embedding(4, num_classes, sparse=True)

        def forward(self, x):
            logits, activations = super().forward(x)
            return logits + self.table(torch.zeros(len(x), dtype=torch.long)), activations

    class Double(Keeping):
        def __init__(self, num_classes=10):
            super().__init__(num_classes)
            self.double()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Own", Sparse)
    assert "Sparse: table has sparse gradients" in error_of("--n_epochs 1", capsys)
    monkeypatch.setitem(models.MODELS, "Own", Double)
    assert "Double is of float64, and images are of float32" in error_of("--n_epochs 1", capsys)
    monkeypatch.setitem(models.MODELS, "Own", Keeping)
    state = Keeping().state_dict()
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, "nan.pt")
    line = error_of("--init_weights nan.pt --n_epochs 1", capsys)
    assert "nan.pt: conv1.weight holds NaN or infinite values" in line


def test_phases_beyond_the_run_are_none(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Own", Keeping)
    combined_protocol.main([*COMMON, "--n_epochs", "1", "--phases", "5:RangeNorm=0.1"])
    printed = capsys.readouterr()
    assert "never reached, the last epoch is 0: --phases 5" in printed.err
    assert "no regularizer" in printed.out


def test_epochs_of_a_quantized_network_are_no_beginning():
    args = argparse.Namespace(init_from="q.ckpt", n_epochs=5, freeze_bn_from=None, qat_bits=None)
    settings = {"qat_bits": "4,4", "qat_from": 1}
    check_init_from(TrainProgress(epoch=1), [], args, settings)
    with pytest.raises(FileError, match=r"q\.ckpt has 2 epochs done, with --qat_bits 4,4 from"):
        check_init_from(TrainProgress(epoch=2), [], args, settings)


class Focal(nn.Module):
    def forward(self, logits, y):
        p = logits.softmax(1).gather(1, y[:, None])
        return -((1 - p) ** 2 * p.log()).mean()


class Learned(Focal):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))


class Broken(nn.Module):
    def forward(self, logits, y):
        return F.mse_loss(logits, y)


def weighted(label_smoothing=0.0):
    weights = torch.tensor([1.0] * 9 + [20.0])
    return nn.CrossEntropyLoss(weights, label_smoothing=label_smoothing)


class Noisy(Focal):
    """A mean of losses with noise, which counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, logits, y):
        self.n_calls += 1
        return super().forward(logits * (1 + 0.1 * torch.rand(())), y)


def test_a_trial_of_a_loss_changes_nothing():
    criterion, before = Noisy(), torch.get_rng_state()
    assert check_criterion("Noisy", criterion, 10) and check_criterion("Noisy", criterion, 1)
    assert criterion.n_calls == 0 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "flags", "said"),
    [
        (Focal, "", None),
        (Focal, "--label_smoothing 0.1", "--label_smoothing: the loss Own has none"),
        (Learned, "", "Own has parameters of its own, which nothing would train"),
        (Broken, "", "--criterion Own: The size of tensor a"),
        (weighted, "", "--criterion Own is no mean over images: losses of an epoch and of the"),
    ],
)
def test_a_loss_of_ones_own_is_tried(make, flags, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Own", Keeping)
    monkeypatch.setitem(utils.CRITERIA, "Own", make)
    flags = f"--criterion Own --n_epochs 1 {flags}"
    if make in (Focal, weighted) and "smoothing" not in flags:
        train.main([*COMMON, *flags.split()])
        assert (said or "epoch 0") in capsys.readouterr().out
    else:
        assert said in error_of(flags, capsys)


def test_a_loss_that_is_no_mean_is_for_one_process(monkeypatch):
    monkeypatch.setitem(utils.CRITERIA, "Own", weighted)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    args = train.make_parser().parse_args(["--criterion", "Own"])
    with pytest.raises(SetupError, match="Own is no mean over images, of which each process has"):
        train.make_config(args, 32, 10)


TINY = data.ImageDataset(
    torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 10,
    torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": TINY.train_labels[:, None]}, "train_labels are (6, 1), not (6,)"),
        ({"test_labels": TINY.test_labels.int()}, "test_labels are of torch.int32: int64"),
        ({"train_labels": TINY.train_labels.numpy()}, "train_labels are of int64"),
        ({"num_classes": 5}, "train_labels are from 0 to 5: 0 to 4"),
        ({"test_labels": TINY.test_labels - 1}, "test_labels are from -1 to 2: 0 to 9"),
        ({"train_images": TINY.train_images / 255}, "train_images are of torch.float32: uint8"),
        ({"train_images": TINY.train_images[:, 0]}, "train_images are no (N, 3, H, W)"),
        ({"test_images": TINY.test_images[:0]}, "it has no test_images"),
        ({"mean": (125.0,) * 3}, "mean and std are of pixels scaled to 0 … 1, not 125"),
        ({"std": (0.0, 0.2, 0.2)}, "std has a 0"),
    ],
)
def test_a_data_set_that_training_does_not_take_is_one_line(changes, message, monkeypatch):
    own = replace(copy.copy(TINY), **changes)
    monkeypatch.setitem(data.DATASETS, "Synthetic", lambda data_dir, seed: own)
    args = train.make_parser().parse_args(["--dataset", "Synthetic"])
    if "numpy" in type(own.train_labels).__module__:
        message = "train_labels"
    with pytest.raises(DataError, match=re.escape(f"data set Synthetic: {message}")):
        utils.load_dataset(args)


def test_a_function_that_returns_no_data_set_is_one_line(monkeypatch):
    monkeypatch.setitem(data.DATASETS, "Synthetic", lambda data_dir, seed: (1, 2))
    args = train.make_parser().parse_args(["--dataset", "Synthetic"])
    with pytest.raises(DataError, match="its function returns a tuple, no ImageDataset"):
        utils.load_dataset(args)
