#!/usr/bin/env bash
# PyTorch's fused SGD and Adam on a CPU give weights the gradients of other weights, where the two are laid out differently in memory.
#
# One would guess: `fused=True` changes the speed of `torch.optim.SGD` and its last bits; a gradient has its parameter's shape, and which element
# belongs to which is a matter of indices, not of strides.
# What happens: the fused kernels for a CPU take the n-th number in memory of the gradient for the n-th of the parameter. `loss.backward()` copies gradients into the
# parameter's layout; `torch.autograd.grad`, which gradient penalties, meta-learning and per-sample gradients need, does not. A channels-last convolution
# with weight standardization gets a contiguous gradient: assigned to `.grad`, fused SGD moves the weights in directions that have
# nothing to do with it: the difference from the plain step is √2 times the step. Nothing raises or warns.
# Adam(fused=True) does the same; fused=False and foreach=True are right. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 torch==2.14.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn import functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
images = torch.randn(8, 16, 10, 10)
start = torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last)


def step(optimizer, uses_backward=False, **options):
    """Return the change of a standardized convolution's weights in one step."""
    weight = torch.nn.Parameter(start.clone())
    rows = weight.reshape(1, 32, -1)  # a row for each output channel, as NFNets standardize weights
    standardized = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape(weight.shape)
    loss = F.conv2d(images, standardized).square().mean()
    if uses_backward:
        loss.backward()
    else:
        [weight.grad] = torch.autograd.grad(loss, [weight])
    same = weight.grad.stride() == weight.stride()
    optimizer([weight], lr=0.1, **options).step()
    return weight.detach() - start, same


for optimizer in torch.optim.SGD, torch.optim.Adam:
    plain, _ = step(optimizer, fused=False)
    foreach, _ = step(optimizer, foreach=True)
    assert torch.allclose(foreach, plain, atol=1e-6)
    for uses_backward in True, False:
        fused, same = step(optimizer, uses_backward, fused=True)
        away = ((fused - plain).norm() / plain.norm()).item()
        origin = "loss.backward()    " if uses_backward else "torch.autograd.grad"
        print(f"{optimizer.__name__:4} fused, gradient of {origin} (parameter's layout: {same}): {away:.2g} of the step away")
        if uses_backward:
            assert same and away < 1e-4
        else:
            assert not same and away > 1.3, "the fused step is right now"
PYTHON
echo "as described"
