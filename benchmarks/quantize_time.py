"""Time per-channel PWLQ at 4 bits of all convolution weights of a ResNet-50, random ones.

The reference is a plain loop over channels: gradient descent on the expected error from half the
range (step 0.1, at most 100 steps, until a step is below 1e-3), the derivative written out with
SciPy's normal distribution. Ours is the best of a few rounds with one thread and with all of them
(which on a busy machine wait for each other); the loop, which has one thread, runs once. The last
line is one JSON object: `speedup`, `max_breakpoint_difference` (in σ) and `error_ratio`.

    python benchmarks/quantize_time.py
"""

import json
import time

import _root  # noqa: F401
import numpy as np
import torch
from scipy.stats import norm
from torch import nn
from torchvision.models import resnet50

import quant_utils as qu

N_BITS, ROUNDS = 4, 6


def expected_error_slope(p: float, m: float) -> float:
    """Return the derivative of [F(p) − F(−p)]·p² + 2·[F(m) − F(p)]·(m − p)²."""
    f, cdf = norm.pdf(p), norm.cdf(p)
    centre = 2 * f * p**2 + 2 * (cdf - norm.cdf(-p)) * p
    tails = -2 * f * (m - p) ** 2 - 4 * (norm.cdf(m) - cdf) * (m - p)
    return centre + tails


def reference_breakpoint(m: float) -> float:
    """Return p by gradient descent on the expected error; m and p in σ."""
    p = m / 2
    for _ in range(100):
        change = 0.1 * expected_error_slope(p, m)
        p -= change
        if abs(change) < 1e-3:
            break
    return p


def reference_quantize(w: np.ndarray) -> tuple[np.ndarray, float]:
    """Quantize one channel in three pieces; return it and its breakpoint in σ."""
    m, std, n = np.abs(w).max(), w.std(), 2 ** (N_BITS - 1)
    p = reference_breakpoint(m / std)
    edge = p * std
    centre, tail = 2 * edge / (2 * n - 1), (m - edge) / (n - 1)
    in_centre = np.clip(np.round(w / centre), -n, n - 1) * centre
    above = np.clip(np.round((w - edge) / tail), 0, n - 1) * tail + edge
    below = np.clip(np.round((w + m) / tail), 0, n - 1) * tail - m
    return np.where(np.abs(w) < edge, in_centre, np.where(w > 0, above, below)), p


def breakpoints(w: torch.Tensor) -> torch.Tensor:
    """Return the breakpoint of every channel, in σ."""
    rows = qu.to_2d(w, per_channel=True)
    m = qu.abs_max(rows)
    p = qu.breakpoint_from_distribution(
        rows, m, qu.DISTRIBUTIONS["norm"], approximate=False, overlapping=False
    )
    return p.flatten().double() / rows.double().std(dim=1, correction=0)


def time_ours(weights: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """Return the quantized weights and the seconds of the fastest round."""
    seconds = []
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            quantized = [qu.pwlq(w, N_BITS, per_channel=True) for w in weights]
            seconds.append(time.perf_counter() - began)
        shown = ", ".join(f"{s:.3f}" for s in seconds[-ROUNDS:])
        print(f"vectorized, {threads} thread(s): {shown} s")
    return quantized, min(seconds)


def time_reference(weights: list[torch.Tensor]) -> tuple[list[list], float]:
    """Return what the loop makes of each channel of each weight, and its seconds."""
    began = time.perf_counter()
    layers = [[reference_quantize(channel) for channel in w.numpy()] for w in weights]
    seconds = time.perf_counter() - began
    print(f"loop: {seconds:.2f} s")
    return layers, seconds


def reference_error(layers: list[list], weights: list[torch.Tensor]) -> float:
    """Return Σ(w_q − w)² of the loop over all weights."""
    return sum(
        np.square(q - w, dtype=np.float64).sum()
        for layer, weight in zip(layers, weights, strict=True)
        for (q, _), w in zip(layer, weight.numpy(), strict=True)
    )


def max_breakpoint_difference(layers: list[list], weights: list[torch.Tensor]) -> float:
    """Return by how much the two breakpoints of a channel differ at most, in σ."""
    return max(
        (breakpoints(w) - torch.tensor([p for _, p in layer])).abs().max().item()
        for layer, w in zip(layers, weights, strict=True)
    )


def main() -> None:
    """Print the two times and how the results compare."""
    torch.manual_seed(0)
    convs = [m for m in resnet50(weights=None).modules() if isinstance(m, nn.Conv2d)]
    weights = [conv.weight.detach() for conv in convs]
    n_channels, n_weights = sum(map(len, weights)), sum(w.numel() for w in weights)
    print(
        f"{len(weights)} layers, {n_channels:,} channels, {n_weights:,} weights; "
        f"torch {torch.__version__}"
    )
    ours, seconds = time_ours(weights)
    layers, reference_seconds = time_reference(weights)
    error = sum((q - w).double().square().sum().item() for q, w in zip(ours, weights, strict=True))
    record = {
        "speedup": reference_seconds / seconds,
        "max_breakpoint_difference": max_breakpoint_difference(layers, weights),
        "error_ratio": error / reference_error(layers, weights),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
