"""What a network may do inside a pass, or between two of them, that could make them differ."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from engine.networks.fast_layers import use_fast_layers
from engine.step.gradients import compute_gradients
from engine.step.trial import check_penalty
from engine.system.errors import NetworkError, PenaltyError
from regularizers import LPGrad, Regularizer, Sharpness, StepNoise

CE = nn.CrossEntropyLoss()


def problem():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.arange(6) % 4


class Small(nn.Module):
    """Two convolutions, of which tests override what comes between them and the classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.act, self.relu = nn.SiLU(), nn.ReLU()
        self.classifier = nn.Linear(4, 4)

    def middle(self, x):
        return self.act(self.conv2(self.act(self.conv1(x))))

    def forward(self, x):
        return self.classifier(self.middle(x).mean((2, 3)))


def gradients_of(net_class, regularizer, **options):
    """∇L + ∇R as one vector, and R, of a step that begins from the same seeds each time."""
    torch.manual_seed(0)
    random.seed(0)
    net = use_fast_layers(net_class().double())
    _, penalty, _ = compute_gradients(net, CE, regularizer, *problem(), torch.float64, **options)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), penalty


class Checkpointed(Small):
    def middle(self, x):
        return checkpoint(super().middle, x, use_reentrant=False)


class CheckpointedAttention(Small):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def middle(self, x):
        t = self.conv1(x).flatten(2).mT
        t = checkpoint(
            lambda t: self.attention(t, t, t, need_weights=False)[0], t, use_reentrant=False
        )
        return t.mT[..., None]


@pytest.mark.parametrize(
    ("regularizer", "options"),
    [
        (LPGrad(0.3, 2), {}),
        (Sharpness(1.0), {}),
        (StepNoise(1.0), {}),
        (LPGrad(0.3, 2, only_weight_grads=True), {"difference_step": 1e-3}),
    ],
)
def test_a_checkpointed_part_runs_again_with_the_parameters_of_its_pass(regularizer, options):
    plain, _ = gradients_of(Small, regularizer, **options)
    checkpointed, _ = gradients_of(Checkpointed, regularizer, **options)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


def test_moved_activations_of_a_checkpointed_part_are_refused():
    message = "in its backward pass, as torch.utils.checkpoint does"
    with pytest.raises(NetworkError, match=message):
        gradients_of(Checkpointed, LPGrad(0.3, 2), difference_step=1e-3)
    with pytest.raises(NetworkError, match=message):  # and before the training
        check_penalty(Checkpointed(), LPGrad(0.3, 2), (3, 6, 6), difference_step=1e-3)


def test_checkpointed_attention_is_differentiated_twice():
    gradient, penalty = gradients_of(CheckpointedAttention, LPGrad(0.3, 2))
    assert gradient.isfinite().all() and penalty > 0


class Scaled(Small):
    """Divides by a running scale, which it moves before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def middle(self, x):
        x = super().middle(x)
        self.scale.mul_(0.5).add_(0.5 * x.detach().abs().mean())
        return x / self.scale.clone()


class RandomInPython(Small):
    def middle(self, x):
        return super().middle(x) * random.random()


@pytest.mark.parametrize("net_class", [Scaled, RandomInPython])
def test_the_second_pass_begins_as_the_first_one_did(net_class, registry):
    class NoChange(Regularizer):
        """L(W + 0) − L(W)."""

        def forward(self, weights, loss_change):
            return loss_change([0 * w for w in weights])

    assert gradients_of(net_class, NoChange(1.0))[1] == 0
    after_two_passes = random.random()
    gradients_of(net_class, None)
    assert random.random() == after_two_passes


def test_the_change_of_the_loss_may_be_a_constant_and_has_one_derivative(registry):
    class Factor(Regularizer):
        """The change of the loss as a factor, a constant one where it is `detached`."""

        def __init__(self, detached):
            super().__init__(1.0)
            self.detached = detached

        def forward(self, weights, loss_change):
            with torch.set_grad_enabled(not self.detached):
                change = loss_change([0.1 * w for w in weights])
            return change.detach() * sum(w.square().sum() for w in weights) + 0 * change

    class Nested(Regularizer):
        def forward(self, weights, loss_change):
            deltas = [0.1 * w for w in weights]
            return grad(loss_change(deltas), deltas, create_graph=True)[0].norm()

    torch.testing.assert_close(
        gradients_of(Small, Factor(True)), gradients_of(Small, Factor(False))
    )
    with pytest.raises(PenaltyError, match="loss_change has one derivative"):
        gradients_of(Small, Nested(1.0))


# --- what is written into, or is looked at ---------------------------------------------------


@pytest.fixture
def last_activation(registry):
    class LastActivation(Regularizer):
        """‖∂L/∂A‖₂ of the last activation."""

        def forward(self, a_grads):
            return a_grads[-1].norm()

    return LastActivation(1.0)


class DropsInPlace(Small):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5, inplace=True)

    def middle(self, x):
        return self.dropout(super().middle(x))


class WritesInPlace(Small):
    def middle(self, x):
        x = super().middle(x)
        x *= 2
        return x


def test_gradients_of_activations_are_those_before_dropout_in_place(last_activation):
    torch.manual_seed(0)
    net, recorded = DropsInPlace().double(), []
    net.act.register_forward_hook(lambda m, args, y: (recorded.append(y), y.clone())[1])
    x, y = problem()
    expected = grad(CE(net(x), y), recorded[-1:])[0].norm()
    torch.testing.assert_close(gradients_of(DropsInPlace, last_activation)[1], expected)


def test_an_activation_that_is_written_into_is_refused(last_activation):
    with pytest.raises(
        NetworkError,
        match=r"writes into the output .* number 1 .* y \*= 2 or a module with inplace",
    ):
        gradients_of(WritesInPlace, last_activation)
    gradients_of(WritesInPlace, LPGrad(0.1, 2, only_weight_grads=True))


class Rectified(Small):
    use_tanh = False

    def middle(self, x):
        z = self.norm(self.conv1(x))
        return torch.tanh(z) if self.use_tanh else self.relu(z)


class InBlock(Small):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.conv1, self.norm)

    def middle(self, x):
        return self.relu(self.block(x))


def add_half(module, args, y):
    return y + 0.5


@pytest.mark.parametrize(
    "add_hook",
    [
        lambda net, seen: net.norm.register_forward_hook(add_half),
        lambda net, seen: net.norm.register_forward_hook(lambda m, args, y: seen.append(y)),
        lambda net, seen: net.relu.register_forward_pre_hook(lambda m, args: (args[0] + 0.5,)),
        lambda net, seen: net.relu.register_forward_hook(lambda m, args, y: seen.append(args[0])),
        lambda net, seen: net.norm.register_full_backward_hook(
            lambda m, gx, gy: seen.append(gy[0])
        ),
    ],
)
def test_hooks_between_a_norm_and_its_rectifier_see_what_they_would_see(add_hook):
    torch.manual_seed(0)
    plain = Rectified().double()
    fast = use_fast_layers(copy.deepcopy(plain))
    x, y = problem()
    results = []
    for net in (plain, fast):
        seen = []
        handle = add_hook(net, seen)
        logits = net(x)
        grads = grad(CE(logits, y), [*net.conv1.parameters()])
        results.append([logits, *grads, *seen])
        handle.remove()
    torch.testing.assert_close(*results)
    assert torch.equal(fast.norm(x.new_ones(2, 4, 3, 3)), F.relu(fast.norm(x.new_ones(2, 4, 3, 3))))


def test_a_hook_of_a_container_may_hand_on_another_tensor():
    torch.manual_seed(0)
    net = use_fast_layers(InBlock().double())
    net.block.register_full_backward_hook(lambda net, gx, gy: None)
    compute_gradients(net, CE, None, *problem())


def test_a_network_that_no_longer_rectifies_is_refused():
    torch.manual_seed(0)
    net = use_fast_layers(Rectified().double())
    compute_gradients(net, CE, None, *problem())
    net.use_tanh = True
    with pytest.raises(NetworkError, match="Rectified: norm was not read by relu alone"):
        compute_gradients(net, CE, None, *problem())
    net.use_tanh = False
    compute_gradients(net, CE, None, *problem())


class TrainsWithoutReturning(Rectified):
    def train(self, mode=True):
        super().train(mode)


def test_a_train_that_does_not_return_the_network_is_no_obstacle():
    net = use_fast_layers(TrainsWithoutReturning())
    assert type(net.norm).__name__ == "BatchNormBeforeRectifier"
