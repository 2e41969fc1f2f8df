"""Convolution that is cheap to differentiate twice, and refuses to be differentiated three times.

Autograd reaches the second derivative of a convolution or batch norm through dozens of element-wise
passes. Here, and in fast_batch_norm.py, each is one `autograd.Function` whose backward is another
one with a hand-derived backward, so that every order is ordinary convolution kernels, one reduction
and one element-wise pass. Under `torch.autocast` convolution takes autocast's dtype.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks import winograd

IMAGE_CHANNELS = 4  # a convolution of no more channels is one of images


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


class _Conv(torch.autograd.Function):
    """y = conv(x, w); `geometry` is (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(ctx, x, w, geometry):
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _convolve(x, w, geometry)

    @staticmethod
    def backward(ctx, gy):
        x, w = ctx.saved_tensors
        # a Function of its own: it is this adjoint that the penalty's derivative differentiates
        return *_ConvAdjoint.apply(gy, x, w, ctx.geometry, ctx.needs_input_grad[:2]), None


class _ConvAdjoint(torch.autograd.Function):
    """(gx, gw), the adjoints of y = conv(x, w) at gy; bilinear in (gy, w) and (gy, x)."""

    @staticmethod
    def forward(ctx, gy, x, w, geometry, output_mask):
        # a cotangent that is None costs no convolution, one of zeros would
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        return _conv_adjoint(gy, x, w, geometry, output_mask)

    @staticmethod
    @forbid_third_derivative
    def backward(ctx, ggx, ggw):
        """Return the cotangents of gy, x and w, given those of (gx, gw): (ggx, ggw).

        By bilinearity ∂gy = conv(ggx, w) + conv(x, ggw); ∂x is the input adjoint of gy with kernel
        ggw, and ∂w the weight adjoint of gy with input ggx.
        """
        gy, x, w = ctx.saved_tensors
        for_gy, for_x, for_w, *_ = ctx.needs_input_grad
        ggy = gx = gw = None
        if for_gy:
            # ggx is None where x is images, ggw where no penalty takes the weight's gradient
            pairs = [(a, b) for a, b in ((ggx, w), (x, ggw)) if a is not None and b is not None]
            terms = [_convolve(a, b, ctx.geometry) for a, b in pairs]
            ggy = functools.reduce(Tensor.add_, terms) if terms else None  # in place: one pass less
        if for_x and ggw is not None:
            gx, _ = _conv_adjoint(gy, x, ggw, ctx.geometry, (True, False))
        if for_w and ggx is not None:
            _, gw = _conv_adjoint(gy, ggx, w, ctx.geometry, (False, True))
        return ggy, gx, gw, None, None


def _convolve(x, w, geometry):
    if winograd.is_faster(x, w, geometry):
        return winograd.conv2d(x, w)
    return F.conv2d(x, w, None, *geometry)


def _conv_adjoint(gy, x, w, geometry, output_mask):
    """Return (gx, gw) of conv(x, w) at gy, None where not wanted."""
    for_x, for_w = output_mask
    gx = gw = None
    if for_x and winograd.is_faster(x, w, geometry):
        gx, for_x = winograd.input_adjoint(gy, w), False
    if for_w and winograd.weight_adjoint_is_faster(x, w, geometry):
        gw, for_w = winograd.weight_adjoint(gy, x), False
    if for_x or for_w:
        # one call for both, so that a backend can share what they have in common
        stride, padding, dilation, groups = geometry
        rest = torch.ops.aten.convolution_backward(
            gy, x, w, None, stride, padding, dilation, False, (0, 0), groups, (for_x, for_w, False)
        )
        gx, gw = rest[0] if for_x else gx, rest[1] if for_w else gw
    return gx, gw


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
) -> Tensor:
    """Convolve x (N, C, H, W) with weight (O, C/groups, K, K), as `F.conv2d` does.

    `stride`, `padding` and `dilation` are an int or a pair. Under autocast everything is cast to
    its dtype, but images (at most 4 channels) are convolved in float32.
    """
    pair = nn.modules.utils._pair
    stride, padding = pair(stride), pair(padding)
    if x.device.type == "cpu" and is_strided_pointwise(weight, stride, padding):
        # (N, C, H', W'): the pixels that it reads; see there why
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    out = x.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        out = torch.get_autocast_dtype(x.device.type)
        # float32 of images costs next to nothing, and rounding them would be a good part of all the
        # rounding in the gradients
        dtype = torch.float32 if x.shape[1] <= IMAGE_CHANNELS else out
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
    with torch.autocast(x.device.type, enabled=False):  # the casts are made
        y = _Conv.apply(x, weight, (stride, padding, pair(dilation), groups))
    return (y if bias is None else y + bias[:, None, None]).to(out)


class Geometry(NamedTuple):
    """How a convolution moves over its input: a number for each of its dimensions, and groups."""

    stride: list[int]
    before: list[int]  # zeros before the input
    after: list[int]
    dilation: list[int]
    groups: int


def read_geometry(arguments: Sequence, kernel: Sequence[int]) -> Geometry:
    """Read what a call of a convolution has after its tensors; what it leaves out is PyTorch's."""
    defaults = ([1], [0], [1], 1)
    stride, padding, dilation, groups = (*arguments, *defaults[len(arguments) :])
    stride, dilation = (repeated(each, len(kernel)) for each in (stride, dilation))
    return Geometry(stride, *padding_widths(padding, kernel, dilation), dilation, groups)


def repeated(values: Sequence[int], n: int) -> list[int]:
    """Return a number for each of n dimensions."""
    return [*values] * (n // len(values))


def padding_widths(
    padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the zeros before and after the input in each of its dimensions."""
    if padding == "same":  # one more at the end where the sum is odd, as PyTorch pads
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [total // 2 for total in totals], [total - total // 2 for total in totals]
    padding = [0] if padding == "valid" else padding
    widths = repeated(padding, len(kernel))
    return widths, widths


def is_strided_pointwise(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Tell whether a convolution is 1×1, unpadded and strided: it reads every s-th pixel only.

    Then convolving x[:, :, ::s, ::s] with stride 1 is exactly the same. On CPUs that is what is
    done: PyTorch 2.14.1 writes beyond its memory in the weight adjoint of such a convolution of
    stride 2, float32, channels-last, at most 8 channels in and 16 out, images of 50 or more even
    rows, which has ended the process on some machines, and not on all, nor each time.
    """
    return weight.shape[2:] == (1, 1) and tuple(stride) != (1, 1) and tuple(padding) == (0, 0)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` through `conv2d`; PyTorch's own path where that does not apply."""

    def forward(self, input: Tensor) -> Tensor:
        """Map the input (N, C, H, W) to (N, O, H', W')."""
        if input.dim() != 4 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(input)
        return conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
