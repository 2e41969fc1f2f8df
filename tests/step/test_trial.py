"""What is tried before a training: regularizers of one's own, on two images."""

import json
from dataclasses import replace

import pytest
import reference
import torch
from torch import nn

import data
import models
import train
from data import synthetic
from engine.images.loader import Loader
from engine.step.evaluation import evaluate
from engine.step.gradients import compute_gradients
from engine.step.trial import check_penalty
from engine.system.errors import PenaltyError
from regularizers import (
    REGULARIZERS,
    CombinedReg,
    RangeNorm,
    StepNoise,
    VarianceNorm,
    accepted_options,
    make_regularizer,
)

CE = nn.CrossEntropyLoss()


def in_its_own_derivative(self, weights):
    total = sum(w.pow(4).sum() for w in weights)
    return sum(g.square().sum() for g in torch.autograd.grad(total, weights, create_graph=True))


def of_gradients_derivatives(self, w_grads, a_grads):
    total = w_grads[0].pow(3).sum() + a_grads[0].pow(3).sum()
    first = torch.autograd.grad(total, [w_grads[0], a_grads[0]], create_graph=True)
    return sum(g.sum() for g in first)


def of_folded_derivatives(self, folded_weights):
    total = folded_weights[0].pow(3).sum()
    return torch.autograd.grad(total, folded_weights[0], create_graph=True)[0].sum()


@pytest.mark.parametrize(
    "forward", [in_its_own_derivative, of_gradients_derivatives, of_folded_derivatives]
)
def test_a_penalty_may_differentiate_in_evaluation_as_in_training(forward, registry):
    net, made = reference.SmoothNet(num_classes=10), reference.define("Own", forward)(0.5)
    check_penalty(net, made, (3, 8, 8))
    images = synthetic().train_images[:8, :, :8, :8], synthetic().train_labels[:8]
    loader = Loader(*images, 4, (0.5,) * 3, (0.5,) * 3)
    [(x, y), *_] = loader.batches(0)
    _, trained, _ = compute_gradients(net.eval(), CE, made, x, y)
    first = Loader(*(each[:4] for each in images), 4, (0.5,) * 3, (0.5,) * 3)
    assert evaluate(net, CE, first, regularizer=made)["Own"] == pytest.approx(trained.item())
    assert evaluate(net, CE, loader, regularizer=made)["Own"] > 0


def test_an_evaluated_penalty_has_no_graph_of_the_network(registry):
    """Its memory would be that of a training step."""
    seen = []

    def forward(self, weights, loss_change):
        seen.append(loss_change([0.1 * w for w in weights]))
        return seen[-1]

    images = synthetic().train_images[:8, :, :8, :8], synthetic().train_labels[:8]
    net, made = reference.SmoothNet(num_classes=10), reference.define("Own", forward)(1.0)
    evaluate(net, CE, Loader(*images, 8, (0.5,) * 3, (0.5,) * 3), regularizer=made)
    assert not seen[0].requires_grad and seen[0] != 0


class KeepsUntilTrained(reference.SmoothNet):
    """It computes a tensor once in evaluation mode, as timm's LeViT its attention's biases."""

    kept = None

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x):
        if self.training or self.kept is None:
            self.kept = self.conv1.weight.mean()
        logits, activations = super().forward(x)
        return logits * (1 + self.kept), activations


def test_what_a_network_keeps_in_evaluation_mode_is_of_one_batch():
    images = synthetic().train_images[:8, :, :8, :8], synthetic().train_labels[:8]
    net, penalty = KeepsUntilTrained(num_classes=10), make_regularizer("L2Grad", 1.0)
    whole, *halves = (
        evaluate(net, CE, Loader(*(each[i:j] for each in images), 4, (0.5,) * 3, (0.5,) * 3),
                 regularizer=penalty)["L2Grad"]
        for i, j in ((0, 8), (0, 4), (4, 8))
    )  # fmt: skip
    assert whole == pytest.approx(sum(halves) / 2) and not net.training


BAD = {
    "cannot be found": (lambda self, weights: weights[100].sum(), "Own: IndexError: list index"),
    "complex": (lambda self, weights: weights[0].sum() * 1j, "Own returned a complex number: it"),
    "in place": (lambda self, weights: weights[0].mul_(2).sum(), "Own: a leaf Variable that"),
    "under no_grad": (
        lambda self, weights: torch.no_grad()(weights[0].mul_)(1) is None or weights[1].sum(),
        "it changed its input weights",
    ),
    "no derivative": (
        lambda self, weights: (y := weights[0].exp()).sum() + 0 * y.mul_(2).sum(),
        "Own cannot be differentiated: one of the variables",
    ),
    "a leaf of its own": (lambda self, weights: torch.ones((), requires_grad=True), "depend on"),
    "detached": (lambda self, weights: weights[0].detach().sum(), "Own does not depend on its"),
}


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        *(("--regularizer", name) for name in BAD),
        *(("--track", name) for name in list(BAD)[:4]),  # others can be measured
    ],
)
def test_what_is_no_penalty_is_refused_before_training(
    flag, name, registry, tiny_images, capsys, tmp_path, monkeypatch
):
    forward, message = BAD[name]
    reference.define("Own", forward)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "Flat", reference.flat)
    with pytest.raises(SystemExit) as refused:
        train.main(["--run_name", "r", "--model", "Flat", "--dataset", "Tiny", flag, "Own"])
    [line] = capsys.readouterr().err.splitlines()
    assert refused.value.code == 1 and "error: Own" in line and message in line
    assert not list(tmp_path.iterdir())


def test_a_penalty_that_reaches_none_of_its_inputs_is_a_constant(problem, registry):
    made = reference.define("Own", BAD["a leaf of its own"][0])(1.0)
    with pytest.raises(PenaltyError, match="Own does not depend on its inputs"):
        compute_gradients(reference.SmoothNet().double(), CE, made, *problem)


def test_what_is_only_tracked_may_have_no_derivative(registry):
    made = reference.define("Zeros", lambda self, weights: (weights[0] == 0).sum())(1.0)
    check_penalty(reference.SmoothNet(), made, (3, 8, 8), is_minimized=False)
    with pytest.raises(PenaltyError, match="Zeros does not depend on its inputs"):
        check_penalty(reference.SmoothNet(), made, (3, 8, 8))


def average(self, weights):
    self.mean.lerp_(weights[0].detach().mean(), 0.1)
    return (weights[0] - self.mean).square().sum()


def count(self, weights):
    self.calls += 1
    return weights[0].sum() / self.calls


def collect(self, weights):
    self.seen.append(weights[0].detach())
    return weights[0].sum()


@pytest.mark.parametrize(
    ("forward", "changed"), [(average, "mean"), (count, "calls"), (collect, "seen")]
)
def test_a_regularizer_that_keeps_something_is_refused(forward, changed, registry):
    made = reference.define("Own", forward, calls=0)(1.0)
    made.register_buffer("mean", torch.zeros(()))
    made.seen, made.weights = [], [1.0]
    with pytest.raises(
        PenaltyError, match=f"Own: .* pure function .* it changed {changed}; constants"
    ):
        check_penalty(reference.SmoothNet(), made, (3, 8, 8))
    combined = CombinedReg(VarianceNorm(1.0), made)
    with pytest.raises(PenaltyError, match=rf"it changed terms\.1\.{changed}; "):
        check_penalty(reference.SmoothNet(), combined, (3, 8, 8))


@pytest.mark.parametrize("options", [{}, {"detach_step": True}, {"fold_bn": True}])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_to_try_a_penalty_changes_nothing(name, options):
    name = name.replace("<P>", "3")
    accepted = accepted_options(name, options)
    made = CombinedReg(make_regularizer(name, 0.1, **accepted), StepNoise(0.1))
    net, untouched = (reference.SmoothNet(num_classes=4) for _ in range(2))
    untouched.load_state_dict(net.state_dict())
    torch.manual_seed(1)
    check_penalty(net, made, (3, 6, 6))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    torch.testing.assert_close(net.state_dict(), untouched.state_dict(), rtol=0, atol=0)
    assert net.training and all(p.grad is None for p in net.parameters())


def test_tracked_folded_weights_are_tried_on_images_of_the_data(registry, tmp_path, monkeypatch):
    """Gray ones, of 8 × 8 pixels."""
    monkeypatch.chdir(tmp_path)
    reference.define("Own", lambda self, folded_weights: folded_weights[0].sum())
    whole, small = synthetic(), (slice(64), slice(1), slice(8), slice(8))
    gray = replace(
        whole,
        train_images=whole.train_images[small].clone(),
        train_labels=whole.train_labels[:64],
        test_images=whole.test_images[small].clone(),
        test_labels=whole.test_labels[:64],
        mean=(0.5,),
        std=(0.5,),
    )
    monkeypatch.setitem(data.DATASETS, "Gray", lambda data_dir, seed: gray)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10)
    monkeypatch.setitem(models.MODELS, "Net", lambda num_classes: nn.Sequential(*layers))
    flags = "--model Net --dataset Gray --n_epochs 1 --no-compile --device cpu --run_name r"
    train.main([*flags.split(), "--track", "Own", "--batch_size", "32"])
    assert "track_Own" in json.loads((tmp_path / "r.json").read_text())["history"][0]


def test_a_penalty_of_weights_is_tried_alone():
    """The network need not run: this one could not."""
    check_penalty(nn.Sequential(nn.Linear(3, 4)), RangeNorm(1.0), (3, 6, 6))


def test_folded_weights_that_a_penalty_changes_are_named(registry):
    def forward(self, folded_weights):
        with torch.no_grad():
            folded_weights[0].mul_(2)
        return folded_weights[1].sum()

    with pytest.raises(PenaltyError, match="it changed its input folded_weights;"):
        check_penalty(reference.SmoothNet(), reference.define("Own", forward)(1.0), (3, 8, 8))
