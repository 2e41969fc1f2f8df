import argparse
import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import reference
import tiny_scripts
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import combined_protocol
import models
import train
import utils
from data import synthetic
from engine.images.loader import Loader
from engine.networks.layers import moved
from engine.step import gradients
from engine.step.evaluation import evaluate
from engine.step.gradients import compute_gradients
from engine.system import hardware, progress
from engine.system.errors import FileError, NotFiniteError, PenaltyError, SetupError
from engine.training.resume import check_init_from
from engine.training.train_state import TrainProgress, TrainState
from regularizers import (
    CombinedReg,
    InverseVarianceNorm,
    KurtosisNorm,
    LPGrad,
    RangeNorm,
    Regularizer,
    StepL1Grad,
    StepL2Grad,
    StepNoise,
    VarianceNorm,
    make_regularizer,
)
from train import FitConfig, Phase, fit

CASES = {
    "L1Grad": LPGrad(0.3, 1),
    "L2Grad": LPGrad(0.3, 2),
    "L2Grad weights": LPGrad(0.3, 2, only_weight_grads=True),
    "L5Grad": LPGrad(0.3, 5),
    "VarianceNorm": VarianceNorm(0.7),
    "StdDevNorm": VarianceNorm(0.7, std_dev=True),
    "InverseVarianceNorm": InverseVarianceNorm(0.01),
    "InverseStdDevNorm": InverseVarianceNorm(0.01, std_dev=True),
    "LinfGrad": LPGrad(0.3, math.inf),
    "KurtosisNorm": KurtosisNorm(0.5),
    "RangeNorm": RangeNorm(0.5),
    "StepL1Grad": StepL1Grad(0.5),
    "StepL2Grad": StepL2Grad(0.5, target_bits=2),
    "StepL2Grad and noise": CombinedReg(StepL2Grad(2.0), StepNoise(0.0)),
    "combined": CombinedReg(VarianceNorm(1.25), LPGrad(0.05, 2, only_weight_grads=True)),
    "nested": CombinedReg(CombinedReg(LPGrad(0.1, 1), VarianceNorm(1.0)), LPGrad(0.2, 2)),
}
NOISES = {
    "StepNoise": StepNoise(0.7, target_bits=2),
    "with VarianceNorm": CombinedReg(VarianceNorm(1.0), StepNoise(0.7)),
    "with StepL1Grad": CombinedReg(StepL1Grad(0.5), StepNoise(0.7)),
}
CE = nn.CrossEntropyLoss()


def penalty_of(regularizer):
    """The regularizer as a function of everything it might be fed."""

    def call(weights, w_grads, a_grads):
        available = {
            "weights": weights,
            "w_grads": w_grads,
            "a_grads": a_grads,
            "loss_change": lambda deltas: torch.zeros((), dtype=weights[0].dtype),
        }
        return regularizer(*(available[name] for name in regularizer.inputs))

    return call


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_plain_double_backprop(name, problem):
    torch.manual_seed(0)
    net, plain = reference.SmoothNet().double(), reference.SmoothNet().double()
    plain.load_state_dict(net.state_dict())
    loss, penalty, n_correct = compute_gradients(net, CE, CASES[name], *problem)
    expected = reference.backward_twice(plain, CE, penalty_of(CASES[name]), *problem)
    torch.testing.assert_close((loss, penalty), expected, rtol=1e-12, atol=0)
    assert penalty > 0 and 0 <= n_correct <= len(problem[0])
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["StepNoise", "held"])
def test_noise_costs_the_loss_change_at_other_weights(name, problem):
    """Gradients of L + λ(L(W + Δ) − L(W)) against two passes of plain autograd."""
    torch.manual_seed(0)
    net, plain = reference.SmoothNet().double(), reference.SmoothNet().double()
    plain.load_state_dict(net.state_dict())
    x, y = problem
    torch.manual_seed(5)
    loss, penalty, _ = compute_gradients(net, CE, StepNoise(0.7, 3, name == "held"), x, y)

    torch.manual_seed(5)
    weights = reference.penalized_weights(plain)
    steps = [reference.step(w.detach() if name == "held" else w, 3) for w in weights]
    perturbed = [w + s * (torch.rand_like(w) - 0.5) for w, s in zip(weights, steps, strict=True)]
    clean = CE(plain(x)[0], y)
    running = plain.norm1.running_mean.clone()
    names = ("conv1.weight", "conv2.weight", "linear.weight")
    noisy = CE(
        torch.func.functional_call(plain, dict(zip(names, perturbed, strict=True)), (x,))[0], y
    )
    (clean + 0.7 * (noisy - clean)).backward()
    torch.testing.assert_close((loss, penalty), (clean.detach(), 0.7 * (noisy - clean).detach()))
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(net.norm1.running_mean, running)
    assert net.norm1.num_batches_tracked == 1


@pytest.mark.parametrize("beside", [None, LPGrad(0.3, 2)])
def test_the_range_of_folded_weights_moves_weights_and_batch_norm(beside, problem):
    """Against plain autograd of L + λ Σ max|Ŵ|, with the running variance before the batch."""
    torch.manual_seed(0)
    net, plain = reference.SmoothNet().double(), reference.SmoothNet().double()
    for n in (net, plain):
        with torch.no_grad():
            n.norm1.running_var.copy_(torch.tensor([0.5, 2.0, 3.0]))
            n.norm1.weight.copy_(torch.tensor([-1.0, 2.0, 0.5]))
    plain.load_state_dict(net.state_dict())
    norm = RangeNorm(0.7, fold_bn=True)
    regularizer = CombinedReg(norm, beside) if beside else norm
    loss, penalty, _ = compute_gradients(net, CE, regularizer, *problem, penalty_scale=0.5)

    largest = sum(w.abs().max() for w in reference.folded_weights(plain))
    rest = penalty_of(beside) if beside else lambda *lists: 0.0
    expected = reference.backward_twice(
        plain, CE, lambda *lists: 0.5 * (0.7 * largest + rest(*lists)), *problem
    )
    torch.testing.assert_close((loss, penalty), expected)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert not torch.equal(net.norm1.running_var, torch.tensor([0.5, 2.0, 3.0]).double())


@pytest.mark.parametrize("beside", [StepNoise(0.0), LPGrad(0.0, 2)])
def test_the_range_of_folded_weights_is_evaluated_as_it_is_trained(beside, problem):
    dataset = synthetic("", 0)
    loader = Loader(
        dataset.test_images[:40], dataset.test_labels[:40], 20, mean=dataset.mean, std=dataset.std
    )
    net = reference.SmoothNet(num_classes=10)
    regularizer = CombinedReg(RangeNorm(2.0, fold_bn=True), beside)
    found = evaluate(net, CE, loader, regularizer=regularizer)[regularizer.name]
    assert found == pytest.approx(
        2 * sum(w.abs().max() for w in reference.folded_weights(net)).item(), rel=1e-5
    )


def test_evaluated_noise_is_the_loss_change_without_a_trace_and_the_same_every_time():
    dataset = synthetic("", 0)
    loader = Loader(
        dataset.test_images[:40], dataset.test_labels[:40], 40, mean=dataset.mean, std=dataset.std
    )
    torch.manual_seed(0)
    net = reference.SmoothNet(num_classes=10)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    values = evaluate(net, CE, loader, regularizer=StepNoise(2.0))
    torch.rand(3)
    assert evaluate(net, CE, loader, regularizer=StepNoise(2.0)) == values
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for w in reference.penalized_weights(net):
            w += reference.step(w, 4) * (torch.rand_like(w) - 0.5)
    perturbed = evaluate(net, CE, loader)
    assert values["StepNoise"] == pytest.approx(2 * (perturbed["loss"] - values["loss"]), rel=1e-4)


@pytest.mark.parametrize("name", [*CASES, *NOISES])
def test_penalty_gradient_by_central_differences(name, problem):
    torch.manual_seed(1)
    net, regularizer = reference.SmoothNet().double(), {**CASES, **NOISES}[name]
    compute_gradients(net, CE, None, *problem)
    alone = [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(7)
    compute_gradients(net, CE, regularizer, *problem)
    ours = [p.grad - g for p, g in zip(net.parameters(), alone, strict=True)]
    directions = [torch.randn_like(p) for p in net.parameters()]
    slope = sum((g * d).sum() for g, d in zip(ours, directions, strict=True)).item()

    def penalty_at(t):
        with torch.no_grad():
            for p, d in zip(net.parameters(), directions, strict=True):
                p.add_(t * d)
        torch.manual_seed(7)  # the same noise
        value = compute_gradients(net, CE, regularizer, *problem)[1].item()
        with torch.no_grad():
            for p, d in zip(net.parameters(), directions, strict=True):
                p.sub_(t * d)
        return value

    h = 1e-6
    measured = (penalty_at(h) - penalty_at(-h)) / (2 * h)
    assert slope == pytest.approx(measured, rel=1e-5)


def test_a_regularizer_of_weights_makes_no_second_order_graph(problem, monkeypatch):
    graphs = []
    plain_grad = torch.autograd.grad
    monkeypatch.setattr(
        gradients,
        "grad",
        lambda *a, **k: graphs.append(k.get("create_graph", False)) or plain_grad(*a, **k),
    )
    compute_gradients(reference.SmoothNet().double(), CE, VarianceNorm(1.0), *problem)
    assert not any(graphs)


@pytest.mark.parametrize("difference_step", [None, 0.01])
@pytest.mark.sampled(2)
def test_autocast_keeps_float32_where_it_matters(difference_step):
    torch.manual_seed(0)
    net = utils.make_net("ConvNet", 10, "cpu")
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss, penalty, _ = compute_gradients(
        net, CE, LPGrad(0.01, 2), x, y, torch.bfloat16, difference_step=difference_step
    )
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert loss.dtype == penalty.dtype == torch.float32
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    with hardware.autocast(x.device, torch.bfloat16):
        logits, activations = net(x)
    assert logits.dtype == torch.float32 and activations[0].dtype == torch.bfloat16


def test_strength_is_a_factor_of_the_penalty(problem):
    torch.manual_seed(0)
    net = reference.SmoothNet().double()
    _, expected, _ = compute_gradients(net, CE, LPGrad(0.06, 2), *problem)
    gradient = net.conv1.weight.grad.clone()
    _, penalty, _ = compute_gradients(net, CE, LPGrad(0.3, 2), *problem, penalty_scale=0.2)
    torch.testing.assert_close((penalty, net.conv1.weight.grad), (expected, gradient))


def test_frozen_parameters_are_constants_and_not_penalized(problem):
    torch.manual_seed(0)
    net, plain = [reference.SmoothNet(num_classes=10).double() for _ in range(2)]
    plain.load_state_dict(net.state_dict())
    net.conv1.weight.requires_grad_(False)
    net.norm1.bias.requires_grad_(False)
    _, penalty, _ = compute_gradients(net, CE, LPGrad(0.3, 2), *problem)
    assert net.conv1.weight.grad is None and net.norm1.bias.grad is None
    loss = CE(plain(problem[0])[0], problem[1])
    frozen_norm = torch.autograd.grad(loss, plain.conv1.weight)[0].norm()
    _, unfrozen_penalty, _ = compute_gradients(plain, CE, LPGrad(0.3, 2), *problem)
    torch.testing.assert_close(penalty, unfrozen_penalty - 0.3 * frozen_norm)


@pytest.mark.parametrize("name", ["L2Grad", "StepL1Grad", "with VarianceNorm"])
def test_a_network_with_frozen_parameters_trains(name):
    torch.manual_seed(0)
    net = reference.SmoothNet(num_classes=10)
    net.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    small_fit([Phase(0, {**CASES, **NOISES}[name])], 1, net)
    assert torch.equal(net.conv1.weight, before["conv1.weight"])
    assert not torch.equal(net.conv2.weight, before["conv2.weight"])


class Plain(nn.Module):
    """PyTorch's modules alone: under autocast its logits are bfloat16."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        a = self.conv(x).relu()
        return self.linear(a.mean(dim=(2, 3))), [a]


def test_the_loss_of_a_net_of_plain_modules_is_float32_under_autocast(problem):
    torch.manual_seed(0)
    x, y = problem
    net = Plain()
    loss, penalty, _ = compute_gradients(net, CE, LPGrad(0.1, 2), x.float(), y, torch.bfloat16)
    exact, exact_penalty, _ = compute_gradients(net, CE, LPGrad(0.1, 2), x.float(), y)
    assert loss.dtype == penalty.dtype == torch.float32
    torch.testing.assert_close((loss, penalty), (exact, exact_penalty), rtol=0.02, atol=0)


# --- fit -------------------------------------------------------------------------------------


class CountingReg(Regularizer, register=False):
    """Zero, and a note of every call."""

    def __init__(self):
        super().__init__(1.0)
        self.calls = 0

    def forward(self, weights):
        self.calls += 1
        return 0 * weights[0].sum()


def small_fit(phases, n_epochs, net=None, lr=0.05, after_batch=None, after_epoch=None, **kwargs):
    dataset = synthetic("", 0)
    torch.manual_seed(3)
    net = net or reference.SmoothNet(num_classes=10)
    common = {"mean": dataset.mean, "std": dataset.std}
    loaders = [
        Loader(
            dataset.train_images[:70],
            dataset.train_labels[:70],
            32,
            shuffle=True,
            augment=True,
            seed=3,
            **common,
        ),
        Loader(dataset.test_images[:40], dataset.test_labels[:40], 32, **common),
    ]
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr, 0.9, weight_decay=5e-4)
    scheduler = utils.make_scheduler("exponential", optimizer, 0.5, "default", n_epochs)
    state = TrainState(net, optimizer, scheduler)
    training = fit(state, *loaders, phases, FitConfig(n_epochs, **kwargs))
    return net, reference.go_through(training, after_batch, after_epoch)


def test_fit_is_the_plain_loop(monkeypatch):
    """Three epochs of fit against the loop that a textbook would print, same batches."""
    regularizer = LPGrad(0.1, 2)
    net, history = small_fit([Phase(0), Phase(1, regularizer)], 3)
    dataset = synthetic("", 0)
    torch.manual_seed(3)
    plain = reference.SmoothNet(num_classes=10)
    loader = Loader(
        dataset.train_images[:70],
        dataset.train_labels[:70],
        32,
        shuffle=True,
        augment=True,
        seed=3,
        mean=dataset.mean,
        std=dataset.std,
    )
    momentum = [torch.zeros_like(p) for p in plain.parameters()]
    penalties = []
    for epoch in range(3):
        for x, y in loader.batches(epoch):
            active = penalty_of(regularizer) if epoch >= 1 else lambda w, g, a: 0 * g[0].sum()
            _, penalty = reference.backward_twice(plain, CE, active, x, y)
            penalties.append((epoch, len(x), penalty.item()))
            with torch.no_grad():
                for p, m in zip(plain.parameters(), momentum, strict=True):
                    m.mul_(0.9).add_(p.grad + 5e-4 * p)
                    p.sub_(0.05 * 0.5**epoch * m)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    mean = sum(n * r for e, n, r in penalties if e == 2) / 70
    assert history[2]["train_L2Grad"] == pytest.approx(mean, rel=1e-4)
    assert [entry["lr"] for entry in history] == pytest.approx([0.05, 0.025, 0.0125])


def test_phases_switch_at_their_epochs():
    first, second = CountingReg(), CountingReg()
    phases = [Phase(1, first), Phase(3, second), Phase(4)]
    _, history = small_fit(phases, 6, test_penalty=False)
    assert (first.calls, second.calls) == (2 * 3, 1 * 3)  # three batches an epoch
    logged = [entry["epoch"] for entry in history if "train_CountingReg" in entry]
    assert logged == [1, 2, 3]


def test_frozen_batch_norms_are_those_of_evaluation():
    """An epoch at learning rate 0 against plain double backprop in evaluation mode."""
    seen, regularizer = [], LPGrad(0.1, 2)
    torch.manual_seed(3)
    net = tiny_scripts.TinyFused(10)
    small_fit(
        [Phase(0), Phase(1, regularizer)],
        2,
        net,
        freeze_bn_from=1,
        after_epoch=lambda state: seen.append(copy.deepcopy(net.state_dict())),
    )
    statistics = [key for key in seen[0] if "running_" in key or "num_batches" in key]
    assert statistics and all(torch.equal(seen[0][key], seen[1][key]) for key in statistics)
    dataset = synthetic("", 0)
    loader = Loader(
        dataset.train_images[:70],
        dataset.train_labels[:70],
        32,
        shuffle=True,
        augment=True,
        seed=3,
        mean=dataset.mean,
        std=dataset.std,
    )
    values = {}
    for freeze in (True, False):
        state = TrainState(net, torch.optim.SGD(net.parameters(), 0.0), None)
        config = FitConfig(1, freeze_bn_from=0 if freeze else None)
        reference.go_through(train.run_epoch(state, loader, Phase(0, regularizer), config))
        values[freeze] = train.summarize(state, regularizer)
        if freeze:
            plain = copy.deepcopy(net).eval()
    loss = penalty = 0.0
    for x, y in loader.batches(0):
        of_batch = reference.backward_twice(plain, CE, penalty_of(regularizer), x, y)
        loss, penalty = (
            a + len(x) * b.item() / 70 for a, b in zip((loss, penalty), of_batch, strict=True)
        )
    assert (values[True]["loss"], values[True]["L2Grad"]) == pytest.approx((loss, penalty), 1e-4)
    assert values[False]["L2Grad"] != pytest.approx(penalty, rel=0.01)


def test_history_holds_what_is_promised():
    _, history = small_fit([Phase(0, LPGrad(0.01, 1))], 1)
    assert set(history[0]) == {
        "epoch",
        "lr",
        "train_loss",
        "train_accuracy",
        "train_L1Grad",
        "test_loss",
        "test_accuracy",
        "test_L1Grad",
        "images_per_second",
        "epoch_seconds",
    }
    _, history = small_fit([Phase(0, LPGrad(0.01, 1))], 1, test_penalty=False)
    assert "test_L1Grad" not in history[0]


def test_test_penalty_is_the_mean_over_test_batches_in_evaluation_mode():
    regularizer = LPGrad(0.2, 2)
    net, _ = small_fit([Phase(0)], 1)
    dataset = synthetic("", 0)
    loader = Loader(
        dataset.test_images[:40], dataset.test_labels[:40], 32, mean=dataset.mean, std=dataset.std
    )
    values = evaluate(net, CE, loader, regularizer=regularizer)
    net.eval()
    total = 0.0
    for x, y in loader.batches(0):
        _, penalty = reference.backward_twice(net, CE, penalty_of(regularizer), x, y)
        total += len(x) * penalty.item()
    assert values["L2Grad"] == pytest.approx(total / 40, rel=1e-5)


def test_warmup_raises_the_penalty_batch_by_batch(monkeypatch):
    strengths = []

    def recorded(*args):
        strengths.append(args[6])
        return compute_gradients(*args)

    ones = type(
        "Ones",
        (Regularizer,),
        {"forward": lambda self, weights: 1 + 0 * weights[0].sum()},
        register=False,
    )
    phases = [Phase(1, ones(1.0), warmup=1.5)]
    monkeypatch.setattr(train, "compute_gradients", recorded)
    _, history = small_fit(phases, 4)
    expected = [1, 1, 1, *(i / 3 / 1.5 for i in range(5)), 1, 1, 1, 1]  # three batches an epoch
    assert strengths == pytest.approx(expected)
    assert history[1]["train_Ones"] == pytest.approx((32 / 4.5 + 6 * 2 / 4.5) / 70)
    assert [history[i]["test_Ones"] for i in (1, 2, 3)] == pytest.approx([1 / 1.5, 1, 1])


def test_noise_repeats_whatever_the_global_streams_do():
    """Also when the run is entered in the middle, with another global stream."""
    first, history = small_fit([Phase(0, StepNoise(1.0))], 2)
    torch.rand(1000)
    second, again = small_fit([Phase(0, StepNoise(1.0))], 2, after_batch=lambda _: torch.rand(3))
    assert history[1]["train_StepNoise"] == again[1]["train_StepNoise"] != 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_weights_before_a_phase_are_saved(tmp_path):
    at_start = {}
    path = tmp_path / "before.pt"

    def after_epoch(state):
        if state.epoch == 2:
            at_start.update({k: v.clone() for k, v in net.state_dict().items()})

    torch.manual_seed(3)
    net = reference.SmoothNet(num_classes=10)
    small_fit([Phase(2, VarianceNorm(1.0), save_as=path)], 4, net=net, after_epoch=after_epoch)
    torch.testing.assert_close(torch.load(path, weights_only=True), at_start, rtol=0, atol=0)


def test_bitwise_repeatable_whatever_the_global_streams_do():
    first, _ = small_fit([Phase(0, LPGrad(0.1, 1))], 2)
    torch.rand(1000)
    second, _ = small_fit([Phase(0, LPGrad(0.1, 1))], 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


class NaNReg(Regularizer, register=False):
    """NaN from the nth call on."""

    def __init__(self, n):
        super().__init__(1.0)
        self.n = n

    def forward(self, weights):
        self.n -= 1
        return weights[0].sum() * (math.nan if self.n < 0 else 0.0)


def test_what_is_not_finite_stops_the_run_and_is_named():
    torch.manual_seed(3)
    net, batches = reference.SmoothNet(num_classes=10), []
    with pytest.raises(
        NotFiniteError, match=r"epoch 1, batch 1: the penalty NaNReg is nan; the loss is f"
    ):
        small_fit([Phase(1, NaNReg(1))], 3, net=net, after_batch=lambda s: batches.append(s.batch))
    assert batches == [1, 2, 3, 1]  # at that batch, and before it moved the weights
    assert all(p.isfinite().all() for p in net.parameters())
    with pytest.raises(NotFiniteError, match=r"epoch \d, batch \d: the (loss|gradient of \S+) is"):
        small_fit([], 3, lr=1e30)


# --- the scripts -----------------------------------------------------------------------------

FAST = (
    "--model VGGSmall --width 0.06 --dataset Synthetic --train_subset 64 --holdout 64 "
    "--batch_size 32 --precision fp32 --no-compile"
).split()


def test_train_from_flags_to_saved_weights(script, tmp_path):
    flags = (
        "--run_name",
        "r",
        "--n_epochs",
        2,
        "--regularizer",
        "l2grad",
        "--lmbda",
        0.001,
        "--first_regularized_epoch",
        1,
        "--save_preregularized_model",
        "--lr",
        0.01,
        *FAST,
    )
    completed = script("train.py", *flags)
    assert completed.returncode == 0, completed.stderr
    weights = torch.load(tmp_path / "r.pt", weights_only=True)
    before = torch.load(tmp_path / "r_preregul.pt", weights_only=True)
    utils.make_net("VGGSmall", 10, "cpu", 0.06).load_state_dict(weights)
    assert not torch.equal(weights["5.weight"], before["5.weight"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["settings"]["seed"] == 242 and record["settings"]["regularizer"] == "L2Grad"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [("train_L2Grad" in entry) for entry in record["history"]] == [False, True]
    assert record["final_accuracy"] == record["history"][-1]["test_accuracy"]  # both in float32
    assert sum("test loss" in line for line in completed.stdout.splitlines()) == 2

    again = script("train.py", *flags, "--save_file", "again.pt")
    assert again.returncode == 0, again.stderr
    repeated = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(torch.equal(weights[key], repeated[key]) for key in weights)

    (tmp_path / "r_preregul.pt").unlink()
    late = script("train.py", *flags, "--resume")
    assert late.returncode == 0 and "r_preregul.pt cannot be saved any more" in late.stdout


def test_combined_protocol_from_flags_to_saved_weights(script, tmp_path):
    completed = script(
        "combined_protocol.py",
        "--n_epochs",
        3,
        "--first_variance_epoch",
        1,
        "--first_gradient_epoch",
        2,
        "--lr",
        0.01,
        "--run_name",
        "c",
        *FAST,
    )
    assert completed.returncode == 0, completed.stderr
    history = json.loads((tmp_path / "c.json").read_text())["history"]
    penalties = [
        [key for key in entry if key.startswith("train_") and "Norm" in key] for entry in history
    ]
    assert penalties == [[], ["train_VarianceNorm"], ["train_VarianceNorm+L2Grad"]]
    assert (tmp_path / "c.pt").exists()


def test_options_reach_those_that_take_them(monkeypatch):
    started = {}
    monkeypatch.setattr(
        train,
        "validate_and_run",
        lambda parser, args, phases, *_: started.update(vars(args), phases=phases),
    )
    options = ["--target_bits", "3"]
    train.main(["--regularizer", "stepl2grad", *options, "--hold_step", "--track", "L2grad"])
    made = started["phases"][0].regularizer
    assert (made.name, made.target_bits, made.detach_step) == ("StepL2Grad", 3, True)
    assert started["track"] == ["L2Grad"]
    train.main(["--track", "StepNoise", *options])  # of what is tracked only
    assert started["target_bits"] == 3
    train.main(["--regularizer", "RangeNorm", "--fold_bn", "--track", "RangeNorm"])
    [tracked] = utils.make_tracked_regularizers(argparse.Namespace(**started))
    assert started["phases"][0].regularizer.inputs == ("folded_weights",)
    assert tracked.inputs == ("weights",)
    combined_protocol.main(["--phases", "0:none", "1:L1Grad@weights=1+StepL1Grad=2", *options])
    terms = started["phases"][1].regularizer.terms
    assert terms[0].only_weight_grads and terms[1].target_bits == 3
    cheaper = ["--penalty_every", "4", "--penalty_gradient", "difference", "--penalty_step", "0.1"]
    combined_protocol.main(["--phases", "0:VarianceNorm=1+L1Grad=1", *cheaper])
    config = train.make_config(argparse.Namespace(**started), 128, 10)
    assert (started["penalty_every"], config.difference_step) == (4, 0.1)
    train.main(["--regularizer", "Sharpness", "--rho", "0.2"])
    assert started["phases"][0].regularizer.rho == 0.2


@pytest.mark.slow
def test_begin_where_another_run_is(script, tmp_path):
    """Two epochs, then one of another regularizer: the same bits as one run in two phases."""
    common = (
        "--lr",
        0.01,
        "--scheduler",
        "multistep",
        "--gamma",
        0.5,
        "--milestones",
        "1,2",
        "--holdout",
        32,
        *FAST,
    )
    tracked = ("--track", "VarianceNorm", "StepNoise", "L2Grad")
    stem = script("train.py", "--run_name", "stem", "--n_epochs", 2, *common)
    assert stem.returncode == 0 and "held-out accuracy" in stem.stdout, stem.stderr
    late = (
        "--regularizer",
        "StepNoise",
        "--lmbda",
        2,
        "--n_epochs",
        3,
        "--lmbda_warmup",
        0.8,
        "--first_regularized_epoch",
        2,
    )
    branch = script("train.py", "--run_name", "branch", "--init_from", "stem.ckpt", *late, *common)
    uninterrupted = script("train.py", "--run_name", "uninterrupted", *late, *common, *tracked)
    assert branch.returncode == uninterrupted.returncode == 0, branch.stderr + uninterrupted.stderr
    first = torch.load(tmp_path / "branch.pt", weights_only=True)
    second = torch.load(tmp_path / "uninterrupted.pt", weights_only=True)
    assert all(torch.equal(first[key], second[key]) for key in first)
    history = json.loads((tmp_path / "uninterrupted.json").read_text())["history"]
    names = {"track_VarianceNorm", "track_StepNoise", "track_L2Grad"}
    assert all(entry.keys() >= names for entry in history)
    weights = [w for w in second.values() if w.dim() in (2, 4)]
    expected = reference.variance_norm(weights, 1, False).item()
    assert history[2]["track_VarianceNorm"] == pytest.approx(expected)
    assert json.loads((tmp_path / "branch.json").read_text())["history"][0]["epoch"] == 0

    other = script("train.py", "--run_name", "other", "--init_from", "stem.ckpt", *late, *FAST)
    assert other.returncode == 1 and "(--lr, --scheduler)" in other.stderr.splitlines()[-1]
    assert "Traceback" not in other.stderr

    for flags, message in (
        (("--n_epochs", 2), "nothing to train"),
        ((*late, "--first_regularized_epoch", 1), "cannot begin at epoch 1"),
        ((*late, "--milestones", "halfway"), "(--milestones, --n_epochs)"),
        ((*late, "--precision", "bf16"), "(--precision)"),
        ((*late, "--init_from", "stem.pt"), "stem.pt is not a checkpoint"),
    ):
        vain = script("train.py", "--run_name", "vain", "--init_from", "stem.ckpt", *common, *flags)
        assert vain.returncode == 1 and message in vain.stderr.splitlines()[-1]


def test_a_branch_has_no_part_of_an_epoch_before_it():
    args = argparse.Namespace(init_from="stem.ckpt", n_epochs=3, freeze_bn_from=None, qat_bits=None)
    phases = [Phase(1, VarianceNorm(1.0))]
    check_init_from(TrainProgress(epoch=1), phases, args, {})
    with pytest.raises(FileError, match="2 epochs begun: a regularizer cannot begin at epoch 1"):
        check_init_from(TrainProgress(epoch=1, batch=1), phases, args, {})


@pytest.mark.parametrize(
    ("before", "now", "is_the_same"),
    [(None, None, True), (1, 1, True), (None, 2, True), (3, None, True), (1, None, False),
     (None, 1, False), (1, 2, False), (2, 5, True)],
)  # fmt: skip
def test_a_branch_freezes_the_batch_norms_that_its_trunk_did(before, now, is_the_same):
    flags = {"init_from": "stem.ckpt", "n_epochs": 9, "qat_bits": None, "freeze_bn_from": now}
    refused = pytest.raises(FileError, match=f"2 epochs done, with --freeze_bn_from {before}")
    with nullcontext() if is_the_same else refused:
        check_init_from(
            TrainProgress(epoch=2), [], argparse.Namespace(**flags), {"freeze_bn_from": before}
        )


def test_held_out_images_are_neither_trained_nor_chosen_from_the_test_set(monkeypatch):
    args = train.make_parser().parse_args(["--dataset", "Synthetic", "--holdout", "100"])
    everything, held = synthetic("", args.seed), utils.load_dataset(args)
    assert torch.equal(held.test_images, everything.train_images[-100:])
    assert torch.equal(held.train_images, everything.train_images[:-100])
    args.holdout = 2000
    with pytest.raises(SetupError, match="--holdout 2000"):
        utils.load_dataset(args)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10)], "no batch norm after a conv"),
        (
            [
                nn.Conv2d(3, 3, 1),
                nn.BatchNorm2d(3, track_running_stats=False),
                nn.Flatten(),
                nn.Linear(3072, 10),
            ],
            "cannot fold a batch norm without",
        ),
    ],
)
@pytest.mark.parametrize("how", ["--regularizer RangeNorm --fold_bn", "--track Own"])
def test_a_network_whose_batch_norms_cannot_be_folded(
    how, layers, message, monkeypatch, capsys, tmp_path, registry
):
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x), []

    reference.define("Own", lambda self, folded_weights: folded_weights[0].sum())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.flags.MODELS, "Net", lambda num_classes: Net(*layers))
    flags = f"--run_name r --model Net --dataset Synthetic --device cpu {how}"
    with pytest.raises(SystemExit) as refused:
        train.main(flags.split())
    [line] = capsys.readouterr().err.splitlines()
    assert refused.value.code == 1 and f"{how.split()[1]} of folded weights: {message}" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "Foo"], "ConvNet"),
        (["--dataset", "MNIST"], "CIFAR10, CIFAR100, ImageFolder, Synthetic"),
        (["--criterion", "L1"], "CE"),
        (["--scheduler", "step"], "none, exponential, multistep, cosine"),
        (["--regularizer", "L2.5Grad"], "must be a whole number"),
        (["--milestones", "never"], "default, halfway, fixed"),
        (["--regularizer", "Foo"], "VarianceNorm"),
        (["--regularizer", "L0Grad"], "L0Grad"),
        (["--regularizer", "L99999999999999999999Grad"], "1,000,000"),
        (["--save_file", "folder/"], "'folder/'"),
        (["--lmbd", "0.1", "--regularizer", "L1Grad"], "--lmbd"),
        (["--run_name", ".pt"], "''"),
        (["--run_name", "two\nlines"], "two"),
        (["--run_name", "two\nlines", "--save_file", "one"], "two"),
        (["--run_name", "x" * 300], "longer than"),
        (["--lmbda", "-1"], "'-1'"),
        (["--lambda", "inf"], "'inf'"),
        (["--lr", "0"], "'0'"),
        (["--lr", "nan"], "'nan'"),
        (["--batch_size", "0"], "'0'"),
        (["--n_epochs", "0"], "'0'"),
        (["--n_epochs", "1.5"], "'1.5'"),
        (["--seed", "-3"], "'-3'"),
        (["--seed", str(2**64)], str(2**64)),
        (["--device", "abacus"], "abacus"),
        (["--first_regularized_epoch", "-1"], "'-1'"),
        (["--target_bits", "3.5"], "'3.5' is not a whole number"),
        (["--freeze_bn_from", "0"], "at least 1"),
        (["--save_file", "/proc/x/y"], "cannot write"),
        (["--init_weights", "no.pt"], "no.pt"),
        (["--init_weights", "/dev/null", "--init_from", "/dev/null"], "has weights already"),
        (["--train_subset", "0"], "'0'"),
        (["--holdout", "0"], "'0'"),
        (["--lmbda_warmup", "-1"], "'-1'"),
        (["--lmbda_warmup", "nan"], "'nan'"),
        (["--penalty_every", "0"], "'0'"),
        (["--penalty_step", "0"], "'0'"),
        (["--penalty_gradient", "central"], "exact, difference"),
        (["--regularizer", "Sharpness", "--rho", "0"], "rho is 0"),
        (["--track", "none"], "'none'"),
        (["--track", "L2Grad", "L0Grad"], "L0Grad: P must be"),
        (
            ["--regularizer", "StepNoise", "--target_bits", "1"],
            "target_bits: 1 bits: choose 2 to 16",
        ),
        (["--track", "StepNoise", "--target_bits", "1"], "target_bits: 1 bits: choose 2 to 16"),
        (["--init_from", "no.ckpt"], "no.ckpt"),
    ],
)
def test_bad_flags_of_train(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(train.main, flags, message, capsys)


# Flags without effect, with what the warning says of each.
UNUSED = [
    (["--milestones", "halfway"], "--milestones (needs --scheduler multistep)"),
    (["--gamma", "0.5"], "--gamma (needs --scheduler exponential or multistep)"),
    (["--watch_freq", "7"], "--watch_freq (needs --watch)"),
    (["--override"], "--allow_changed_settings (needs --resume or --init_from)"),
    (["--lmbda", "0.1"], "--lmbda (needs a --regularizer)"),
    (["--first_regularized_epoch", "2"], "--first_regularized_epoch (needs a --regularizer)"),
    (["--no_activation_gradients"], "--no_activation_gradients (needs --regularizer L<P>Grad)"),
    (["--lmbda_warmup", "2"], "--lmbda_warmup (needs a regularizer)"),
    (["--penalty_every", "4"], "--penalty_every (needs a regularizer)"),
    (
        ["--regularizer", "VarianceNorm", "--penalty_gradient", "difference"],
        "--penalty_gradient (needs a regularizer of gradients)",
    ),
    (["--regularizer", "Sharpness", "--penalty_gradient", "difference"], "--penalty_gradient"),
    (
        ["--regularizer", "L2Grad", "--penalty_step", "0.1"],
        "--penalty_step (needs --penalty_gradient difference)",
    ),
    (["--regularizer", "L2Grad", "--rho", "0.1"], "--rho (needs --regularizer Sharpness or Adapt"),
    (["--regularizer", "VarianceNorm", "--no_activation_gradients"], "--no_activation_gradients"),
    (["--save_preregularized_model"], "--save_preregularized_model (needs a regularizer)"),
    (["--target_bits", "3"], "--target_bits (needs --regularizer StepL1Grad or StepL2Grad"),
    (["--regularizer", "L2Grad", "--target_bits", "3"], "--target_bits"),
    (["--regularizer", "VarianceNorm", "--hold_step"], "--detach_step"),
    (["--track", "StepL2Grad", "--hold_step"], "--detach_step"),
    (["--track", "RangeNorm", "--fold_bn"], "--fold_bn (needs --regularizer KurtosisNorm or Range"),
    (["--image_size", "64"], "--image_size (needs --dataset ImageFolder)"),
    (["--workers", "4"], "--workers (needs --dataset ImageFolder)"),
    (["--cache_images", "0"], "--cache_images (needs --dataset ImageFolder)"),
]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Work in an empty folder; the settings and phases of runs that would start are put in here."""
    runs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda args, phases, out, stop: runs.append((args, phases)))
    return runs


@pytest.mark.parametrize(("flags", "message"), UNUSED)
def test_flags_without_effect_are_named_and_ignored(flags, message, started, capsys):
    train.main(flags)
    printed, [(args, _)] = capsys.readouterr().err, started
    assert printed.count("\n") == 1 and "ignored, without effect: " in printed
    assert message in printed
    flag = flags[-1] if flags[-1].startswith("--") else flags[-2]
    new_spelling = {"--override": "allow_changed_settings", "--hold_step": "detach_step"}
    name = new_spelling.get(flag, flag[2:])
    assert vars(args)[name] == train.make_parser().get_default(name)


def test_all_flags_without_effect_are_one_line_and_defaults_none(started, capsys):
    every = ["--lmbda", "0.5", "--first_regularized_epoch", "3", "--milestones", "6,8",
             "--target_bits", "3", "--watch_freq", "9"]  # fmt: skip
    train.main(every)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and all(flag in printed for flag in every[::2])
    train.main(["--lmbda", "0.01", "--first_regularized_epoch", "0", "--milestones", "default"])
    assert capsys.readouterr().err == "" and len(started) == 2


def test_a_loop_over_regularizers_may_give_every_flag_every_time(started, capsys):
    names = ["none", "L1Grad", "L2Grad", "VarianceNorm"]
    flags = ["--lmbda", "0.1", "--first_regularized_epoch", "5", "--no_activation_gradients"]
    for name in names:
        train.main(["--regularizer", name, *flags])
    assert [args.regularizer for args, _ in started] == names
    starts = [[p.start for p in phases if p.regularizer] for _, phases in started]
    assert starts == [[], [5], [5], [5]]
    only = [phases[-1].regularizer for _, phases in started[1:3]]
    assert all(regularizer.only_weight_grads for regularizer in only)


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (train.main, ["--regularizer", "L1Grad", "--first_regularized_epoch", "25"],
         "the last epoch is 24: --first_regularized_epoch 25"),
        (train.main, ["--scheduler", "multistep", "--milestones", "6,30"], "is 24: milestone 30"),
        (train.main, ["--scheduler", "multistep", "--n_epochs", "1"], "is 0: milestone 1"),
        (train.main, ["--freeze_bn_from", "25"], "the last epoch is 24: --freeze_bn_from 25"),
        (combined_protocol.main, ["--n_epochs", "80"], "--first_gradient_epoch 90"),
        (combined_protocol.main, ["--n_epochs", "60", "--phases", "0:none", "70:L1Grad=1"],
         "--phases 70"),
        (train.main, ["--regularizer", "L1Grad", "--n_epochs", "3", "--lmbda_warmup", "3.5"],
         "a phase ends after 3 epochs: the whole λ, at the end of --lmbda_warmup 3.5"),
        (combined_protocol.main, ["--phases", "0:none", "3:L1Grad=1", "5:L2Grad=1",
                                  "--lmbda_warmup", "3"], "a phase ends after 2 epochs: "),
    ],
)  # fmt: skip
def test_epochs_beyond_the_run_are_named(main, flags, message, started, capsys):
    main(flags)
    printed, [(args, phases)] = capsys.readouterr().err, started
    assert printed.count("\n") == 1 and "never reached" in printed and message in printed
    assert all(p.start < args.n_epochs for p in phases)


PUBLISHED = {
    "model": "ConvNet", "dataset": "CIFAR10", "n_epochs": 25, "lr": 0.1, "criterion": "CE",
    "scheduler": "none", "gamma": 0.99, "regularizer": "none", "lmbda": 0.01, "seed": 242,
    "batch_size": 128, "watch": False, "watch_freq": 1, "wandb_project": "RegulQuant",
    "save_preregularized_model": False,
}  # fmt: skip


def test_the_published_command_line_means_what_it_meant(started):
    train.main([])
    train.main(
        [
            "--MODEL".lower(),
            "convnet",
            "--dataset",
            "cifar10",
            "--criterion",
            "ce",
            "--scheduler",
            "EXPONENTIAL",
            "--regularizer",
            "none",
            "--lambda",
            "0.01",
        ]
    )
    train.main(["--regularizer", "None", "--scheduler", "None"])
    for args, _ in (started[0], started[2]):
        assert {name: vars(args)[name] for name in PUBLISHED} == PUBLISHED
    assert started[1][0].scheduler == "exponential" and started[1][0].model == "ConvNet"


def assert_refused(main, flags, message, capsys):
    """Exit code 2, one line that names the value, and nothing written or fetched."""
    with pytest.raises(SystemExit) as refused:
        main(flags)
    captured = capsys.readouterr()
    assert refused.value.code == 2 and captured.out == "" and not list(Path.cwd().iterdir())
    assert captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--phases", "0:Foo=1"], "Foo"),
        (["--phases", "0:L2Grad"], "L2Grad"),
        (["--phases", "0:L2Grad=x"], "L2Grad=x"),
        (["--phases", "0:L2Grad=-1"], "-1"),
        (["--phases", "0:L2Grad@biases=1"], "@biases"),
        (["--phases", "0:VarianceNorm@weights=1"], "VarianceNorm"),
        (["--phases", "x:none"], "x:none"),
        (["--phases", "0:none+L2Grad=1"], "none"),
        (["--phases", "5:none", "5:L1Grad=1"], "[5, 5]"),
        (["--P", "0"], "'0'"),
        (
            ["--phases", "0:StepNoise=1", "--target_bits", "1"],
            "target_bits: 1 bits: choose 2 to 16",
        ),
        (["--gradient_lmbda", "nan"], "nan"),
    ],
)
def test_bad_flags_of_combined_protocol(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(combined_protocol.main, flags, message, capsys)


# --- what a run prints and where it continues ------------------------------------------------


@pytest.mark.slow
def test_a_run_names_its_penalties_and_where_it_resumes(script, tmp_path):
    flags = ("--lr", 0.01, "--run_name", "new/r", *FAST)
    phases = ("0:VarianceNorm=1.5+L1Grad=0.001+L1Grad@weights=0.002", "3:none")
    first = script("combined_protocol.py", "--n_epochs", 1, "--phases", *phases, *flags)
    assert first.returncode == 0, first.stderr
    assert "VarianceNorm λ=1.5 + L1Grad λ=0.001 + L1Grad@weights λ=0.002" in first.stdout
    again = script("combined_protocol.py", "--n_epochs", 1, "--phases", *phases, *flags, "--resume")
    assert again.returncode == 0 and "nothing left to train" in again.stdout, again.stderr
    longer = script(  # no schedule depends on the length
        "combined_protocol.py", "--n_epochs", 2, "--phases", *phases, *flags, "--resume"
    )
    assert longer.returncode == 0 and "resuming at epoch 1, batch 0" in longer.stdout
    assert len(json.loads((tmp_path / "new" / "r.json").read_text())["history"]) == 2


def test_any_run_can_start_from_weights_alone(script, tmp_path):
    flags = ("--n_epochs", 1, "--lr", 1e-12, "--momentum", 0, *FAST)
    first = script("train.py", "--run_name", "a", "--seed", 7, *flags)
    record = json.loads((tmp_path / "a.json").read_text())
    record["settings"] |= {"holdout": 1, "train_subset": None}
    (tmp_path / "a.json").write_text(json.dumps(record))
    second = script("train.py", "--run_name", "b", "--seed", 8, "--init_weights", "a.pt", *flags)
    assert "a.pt was trained on 63 of the 64 images that --holdout tests on" in second.stderr
    assert first.returncode == second.returncode == 0, second.stderr
    a, b = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "ab"]
    assert torch.allclose(a["0.0.weight"], b["0.0.weight"])
    wrong = script("train.py", "--run_name", "c", "--init_from", "a.pt", *flags)
    assert wrong.returncode == 1 and "--init_weights" in wrong.stderr.splitlines()[-1]


def test_a_file_of_other_classes_is_fine_tuned_with_a_new_head(
    tiny_images, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Flat", reference.flat)
    torch.save(reference.flat(7).state_dict(), "w.pt")
    flags = "--run_name r --model Flat --dataset Tiny --n_epochs 1 --lr 1e-12 --init_weights w.pt"
    flags = [*flags.split(), "--no-compile", "--precision", "fp32"]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "w.pt has 7 classes, not 4: --new_head" in capsys.readouterr().err.splitlines()[-1]
    train.main([*flags, "--new_head"])
    assert "w.pt: weights without 2.weight, 2.bias, drawn anew" in capsys.readouterr().out
    before, after = (torch.load(f"{name}.pt", weights_only=True) for name in "wr")
    torch.testing.assert_close(before["1.weight"], after["1.weight"])
    assert after["2.weight"].shape == (4, 5)


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_a_training_that_diverged_says_so(limit, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "DIVERGED_LOSS_RATIO", limit)
    train.main(["--n_epochs", "1", "--lr", "0.01", "--device", "cpu", *map(str, FAST)])
    assert ("the training diverged" in capsys.readouterr().out) == (limit < 1)


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(
        progress.time, "monotonic", lambda: clock.append(clock[-1] + 20) or clock[-1]
    )
    small_fit([Phase(0, LPGrad(0.1, 2))], 5)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) < 15
    assert all("batch" in line and "L2Grad" in line and "s left" in line for line in lines)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"forward": lambda self, gradients: 0}, "MyNorm: `forward` takes 'gradients': "),
        ({"forward": lambda self, weights, p=2: 0}, "`forward` takes 'p': .* weights, w_grads,"),
        ({"inputs": ("gradients",)}, "`forward` takes 'gradients': .* weights, w_grads,"),
        ({"inputs": "weights"}, "`forward` takes 'weights': its inputs are a tuple"),
        ({"inputs": (), "__init__": lambda self: None}, "argument"),
    ],
)
def test_a_class_that_is_no_regularizer_is_refused_when_it_is_made(attributes, message, registry):
    type("MyNorm", (Regularizer,), {"forward": lambda self, weights: 0, **attributes})
    with pytest.raises(ValueError, match=message):
        make_regularizer("mynorm", 1.0)


def test_an_input_that_there_is_not_is_named_in_one_line(registry, capsys):
    type("MyNorm", (Regularizer,), {"forward": lambda self, gradients: 0})
    with pytest.raises(SystemExit) as end:
        train.main(["--run_name", "r", "--regularizer", "MyNorm"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "'gradients'" in error and "detached_w_grads" in error


@pytest.mark.parametrize(("value", "shape"), [(torch.ones(3), r"\(3,\)"), (2.0, "float")])
def test_a_penalty_that_is_no_scalar_is_named(value, shape, problem):
    attributes = {"forward": lambda self, weights: value}
    odd = type("Odd", (Regularizer,), attributes, register=False)(1.0)
    with pytest.raises(PenaltyError, match=f"Odd returned {shape}"):
        compute_gradients(reference.SmoothNet().double(), CE, odd, *problem)


def test_the_plan_names_the_warmup(registry, tiny_images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Flat", reference.flat)
    flags = "--model Flat --dataset Tiny --n_epochs 1 --no-compile --device cpu --run_name r"
    train.main([*flags.split(), *"--regularizer RangeNorm --lmbda_warmup 0.5".split()])
    assert "λ rises from 0 over the first 0.5 epochs of a phase" in capsys.readouterr().out


class Layouts(nn.Module):
    """Weights whose gradients are laid out in memory otherwise than they are themselves."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.standardized = nn.Conv2d(3, 8, 3, bias=False)
        self.normalized = parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.position = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.factors = nn.Parameter(torch.rand(8))  # the gradient of a sum is one number
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        w = self.standardized.weight
        x = F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True))
        x = self.normalized(x).relu() + self.position
        return self.head(x.mean((2, 3)) * self.factors.sum())


@pytest.mark.parametrize("memory_format", hardware.MEMORY_FORMATS)
@pytest.mark.parametrize("lmbda", [None, 0.1])
def test_a_step_is_that_of_plain_sgd_however_gradients_are_laid_out(memory_format, lmbda):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(10, (6,))
    net = moved(Layouts().double(), "cpu", hardware.MEMORY_FORMATS[memory_format])
    plain = copy.deepcopy(net)
    fused = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=True)
    state = TrainState(net, fused, utils.make_scheduler("none", fused, 1.0, "default", 1))
    sgd = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=False)
    params, weights = [*plain.parameters()], [plain.standardized.weight, plain.head.weight]
    for _ in range(3):
        regularizer = lmbda and LPGrad(lmbda, 2, only_weight_grads=True)
        compute_gradients(net, nn.CrossEntropyLoss(), regularizer, x, y, torch.float64)
        state.step()
        loss = F.cross_entropy(plain(x), y)
        if lmbda:
            w_grads = torch.autograd.grad(loss, weights, create_graph=True)
            loss = loss + lmbda * sum(g.norm() for g in w_grads)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        sgd.step()
    for p, expected in zip(net.parameters(), params, strict=True):
        torch.testing.assert_close(p, expected)
