"""Small nets, and the slow and obvious versions that the fast code is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks.fast_batch_norm import BatchNorm2d
from engine.networks.graph import operations, with_inputs
from engine.quantization.grids import OnGrid
from regularizers import Regularizer


class SmoothNet(nn.Module):
    """Two convolutions, batch norm and Softplus: a small net whose derivatives have no kinks."""

    def __init__(self, channels: int = 3, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.linear, self.softplus = nn.Linear(4, num_classes), nn.Softplus()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        a1 = self.softplus(self.norm1(self.conv1(x)))
        a2 = self.softplus(self.conv2(a1))
        return self.linear(a2.mean(dim=(2, 3))), [a1, a2]


class DropoutNet(SmoothNet):
    """A net that draws from torch's global stream."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return super().forward(F.dropout(x, 0.2, self.training))


class RectifyingNorm(BatchNorm2d):
    """One of our batch norms that does the work of a ReLU after it as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, "relu")


class Reordered(nn.Module):
    """Its batch norm is defined after a convolution, and runs before it."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.classifier = nn.Linear(3, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.classifier(self.features(x).mean(dim=(2, 3))), []


class Viewed(nn.Module):
    """It views a map of several pixels, as much code of other people does; images are 8×8."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).view(x.size(0), -1))


class WithActivations(nn.Module):
    """A network of logits alone that returns, too, what each activation module gave, in order."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.activations = net, []
        for m in net.modules():
            if type(m).__module__ == "torch.nn.modules.activation":
                m.register_forward_hook(lambda m, args, y: self.activations.append(y))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.activations.clear()
        return self.net(x), list(self.activations)


class Stranger(nn.Module):
    """A ResNet as anybody writes one: functional ReLUs and sums, nothing of this project."""

    def __init__(self, num_classes: int = 10, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.down = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.bn3, self.bn_down = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(2 * width)
        self.dropout, self.act = nn.Dropout(0.25), nn.SiLU()
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.act(x + self.bn2(self.conv2(x)))
        y = self.bn3(self.conv3(x))
        y += self.bn_down(self.down(x))
        x = F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1)
        return self.fc(self.dropout(x))


def penalized_weights(net: nn.Module) -> list[Tensor]:
    return [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def folded_weights(net: SmoothNet) -> list[Tensor]:
    """The weights of a SmoothNet with its batch norm folded in, channel by channel."""
    first, *others = penalized_weights(net)
    norm = net.norm1
    channels = [
        first[c] * norm.weight[c] / (norm.running_var[c].clone() + norm.eps) ** 0.5
        for c in range(len(first))
    ]
    return [torch.stack(channels), *others]


def lp_grad(w_grads: list[Tensor], a_grads: list[Tensor], lmbda: float, P: int) -> Tensor:
    """λ · ( Σ ‖∂L/∂W‖_p + Σ B^(−1/p) ‖∂L/∂A‖_p ), element by element."""
    total = torch.zeros((), dtype=w_grads[0].dtype)
    for g in w_grads:
        total = total + (g.abs() ** P).sum() ** (1 / P)
    for g in a_grads:
        total = total + g.shape[0] ** (-1 / P) * (g.abs() ** P).sum() ** (1 / P)
    return lmbda * total


def variance(w: Tensor) -> Tensor:
    """mean((W − mean W)²)."""
    return ((w - w.sum() / w.numel()) ** 2).sum() / w.numel()


def variance_norm(weights: list[Tensor], lmbda: float, std_dev: bool) -> Tensor:
    total = torch.stack([variance(w) for w in weights]).sum()
    return lmbda * (total**0.5 if std_dev else total)


def inverse_variance_norm(weights: list[Tensor], lmbda: float, std_dev: bool) -> Tensor:
    mean = torch.stack([1 / variance(w) for w in weights]).mean()
    return lmbda * (mean**0.5 if std_dev else mean)


def kurtosis_norm(weights: list[Tensor], lmbda: float) -> Tensor:
    """λ · mean_l (E[z⁴] − 1.8)² with z = (W − mean W) / std W."""
    terms = []
    for w in weights:
        z = (w - w.mean()) / variance(w) ** 0.5
        terms.append(((z**4).mean() - 1.8) ** 2)
    return lmbda * torch.stack(terms).mean()


def step(w: Tensor, n_bits: int) -> Tensor:
    """s = 2 max|W| / (2^b − 1)."""
    return 2 * w.abs().flatten().sort().values[-1] / (2**n_bits - 1)


def step_l1_grad(weights: list[Tensor], w_grads: list[Tensor], lmbda: float, n_bits: int) -> Tensor:
    terms = [step(w, n_bits) / 2 * g.abs().sum() for w, g in zip(weights, w_grads, strict=True)]
    return lmbda * torch.stack(terms).sum()


def step_l2_grad(weights: list[Tensor], w_grads: list[Tensor], lmbda: float, n_bits: int) -> Tensor:
    terms = [
        step(w, n_bits) ** 2 / 12 * (g**2).sum() for w, g in zip(weights, w_grads, strict=True)
    ]
    return lmbda * torch.stack(terms).sum() ** 0.5


def backward_twice(net, criterion, penalty_of, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Leave ∇L + ∇R in .grad by backward with create_graph, then backward of the penalty.

    penalty_of(weights, w_grads, a_grads) -> R. Returns L and R.
    """
    net.zero_grad()
    logits, activations = net(x)
    for a in activations:
        a.retain_grad()
    loss = criterion(logits, y)
    loss.backward(create_graph=True)
    weights = penalized_weights(net)
    penalty = penalty_of(weights, [w.grad for w in weights], [a.grad for a in activations])
    before = [p.grad.detach().clone() for p in net.parameters()]
    net.zero_grad()
    penalty.backward()
    after = [
        torch.zeros_like(g) if p.grad is None else p.grad
        for p, g in zip(net.parameters(), before, strict=True)
    ]
    net.zero_grad()  # ends the reference cycle of .grad and its graph
    for p, first, second in zip(net.parameters(), before, after, strict=True):
        p.grad = first + second.detach()
    return loss.detach(), penalty.detach()


def sharpness_step(weights: list[Tensor], grads: list[Tensor], rho: float, adaptive: bool):
    """ε = ρ·T²g/‖Tg‖₂ of all layers as one vector, T = |W| + 0.01 if adaptive, else 1."""
    w, g = (torch.cat([t.flatten() for t in ts]) for ts in (weights, grads))
    t = w.abs() + 0.01 if adaptive else torch.ones_like(w)
    return rho * t**2 * g / ((t * g) ** 2).sum() ** 0.5


def dampening(weights: list[Tensor], lmbda: float, n_bits: int) -> float:
    """λ Σ (Q(w) − clip(w))², weight by weight; the grid ends at −2^(b−1) and 2^(b−1) − 1 steps."""
    total = 0.0
    for w in weights:
        s = step(w, n_bits).item()
        low, high = -(2 ** (n_bits - 1)) * s, (2 ** (n_bits - 1) - 1) * s
        for value in w.flatten().tolist():
            clipped = min(max(value, low), high)
            total += (round(clipped / s) * s - clipped) ** 2
    return lmbda * total


def integer_layer(
    codes: Tensor, zero_point: int, w: Tensor, bias: Tensor, padding: int = 0, stride: int = 1
) -> Tensor:
    """Σ w·(codes − zero_point) + bias of a convolution in 64-bit integers, pixel by pixel."""
    x = F.pad(codes.long() - zero_point, (padding,) * 4)
    size = w.shape[-1]
    rows = [
        torch.stack(
            [
                (x[:, None, :, i : i + size, j : j + size] * w.long()).sum(dim=(2, 3, 4))
                for j in range(0, x.shape[3] - size + 1, stride)
            ],
            dim=-1,
        )
        for i in range(0, x.shape[2] - size + 1, stride)
    ]
    return torch.stack(rows, dim=-2) + bias.long().view(-1, 1, 1)


def go_through(training, after_batch=None, after_epoch=None):
    """Train on, calling what is given with the progress; return the history, as far as it goes."""
    history = []
    for progress in training:
        history = progress.history
        if callback := after_batch if progress.batch else after_epoch:
            callback(progress)
    return history


# --- quantized networks, without the quantizers of quant_utils -------------------------------


def uniform_parts(w: Tensor, n_bits: int, per_channel: bool = False) -> tuple[OnGrid]:
    """The nearest points of the symmetric grid of the step 2m / (2^n_bits − 1)."""
    m = w.abs().amax(dim=tuple(range(1, w.dim())), keepdim=True) if per_channel else w.abs().max()
    scale = torch.where(m > 0, 2 * m / (2**n_bits - 1), 1)
    codes = (w / scale).round().clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
    return (OnGrid(codes, scale),)


def two_parts(w: Tensor, n_bits: int, per_channel: bool = False) -> tuple[OnGrid, OnGrid]:
    """A fine grid for the values up to a third of the largest, and a coarse one beyond."""
    is_small = w.abs() < w.abs().max() / 3
    [fine] = uniform_parts(w * is_small, n_bits, per_channel)
    [coarse] = uniform_parts(w * ~is_small, n_bits, per_channel)
    return fine, coarse


def input_ranges(graph, x: Tensor, sums: bool = True) -> dict[str, tuple[float, float]]:
    """The least and the largest value of the input of each operation, by name."""
    ranges = {}

    def watching(name):
        def watch(value: Tensor) -> Tensor:
            ranges[name] = value.min().item(), value.max().item()
            return value

        return watch

    quantized = [each for each in operations(graph) if sums or not each.is_sum]
    with torch.no_grad():
        with_inputs(graph, {name: watching(name) for each in quantized for name in each.inputs})(x)
    return ranges


def flat(num_classes):
    """Two linear layers for images of 3 × 8 × 8."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, num_classes))


def define(class_name, forward, **attributes):
    """A regularizer of one's own, a choice of the scripts until the `registry` is restored."""
    return type(class_name, (Regularizer,), {"forward": forward, **attributes})
