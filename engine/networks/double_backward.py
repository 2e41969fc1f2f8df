"""Layers that are cheap to differentiate twice, and refuse to be differentiated three times.

Autograd reaches the second derivative of a convolution or batch norm through dozens of element-wise
passes. Here (convolution.py, fast_batch_norm.py) each is one `autograd.Function` whose backward is
another one with a hand-derived backward, so that every order is ordinary convolution kernels, one
reduction and one element-wise pass.
"""

import functools
from collections.abc import Callable

import torch


def forbid_third_derivative(backward: Callable) -> Callable:
    """Decorate the backward of a backward: it raises RuntimeError where it would be recorded."""

    @functools.wraps(backward)
    def call(ctx, *grads):
        # gradients are recorded only with create_graph=True, in the second backward pass.
        # PyTorch's own once_differentiable lets some wrong third derivatives through
        if torch.is_grad_enabled():
            raise RuntimeError("these layers have no third derivative: leave out create_graph=True")
        return backward(ctx, *grads)

    return call
