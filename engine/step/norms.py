"""Lp norms that neither overflow nor underflow, of one tensor or of a whole batch's."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.system import distributed

_n_images: int | None = None  # this rank's, of the batch whose penalty is evaluated just now


def lp_norm(g: Tensor, P: float) -> Tensor:
    """Return ‖g‖_p (scalar) of the flattened tensor, in float32 at least; P ≥ 1 or math.inf.

    For 2 < P < ∞, |g|^P would leave the range of float32 for ordinary gradients; the norm is
    homogeneous, so it is taken of g / max|g| (a constant factor: the derivative is the same).
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    if P == math.inf:  # its derivative is shared out evenly to equal maxima, as vector_norm's is
        return g.abs().amax().to(dtype)
    if P <= 2:
        return torch.linalg.vector_norm(g, P, dtype=dtype)
    g = g.to(dtype)
    scale = g.detach().abs().max().clamp(min=torch.finfo(dtype).tiny)
    return scale * torch.linalg.vector_norm(g / scale, P)


def lp_norms(tensors: Sequence[Tensor], P: float) -> Sequence[Tensor]:
    """Return `lp_norm` of each tensor; P = 1 and 2 of all in few launches, where they cost time."""
    if P not in (1, 2) or not tensors:
        return [lp_norm(t, P) for t in tensors]
    return _LpNorms.apply(P, *tensors)


class _LpNorms(torch.autograd.Function):
    """‖t‖₁ or ‖t‖₂ of each tensor, with the derivatives of `torch.linalg.vector_norm`."""

    @staticmethod
    def forward(ctx, P, *tensors):
        dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
        norms = torch._foreach_norm(tensors, P, dtype=dtype)
        ctx.P = P
        ctx.save_for_backward(*tensors, *norms)
        return tuple(norms)

    @staticmethod
    def backward(ctx, *cotangents):
        n = len(cotangents)
        tensors, norms = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if ctx.P == 1:
            units = torch._foreach_sign(tensors)
        else:  # t/‖t‖, 0 where that is 0/0
            divisors = torch.stack(norms)
            divisors = torch.where(divisors == 0, math.inf, divisors).unbind()
            units = [t / divisor for t, divisor in zip(tensors, divisors, strict=True)]
        # in place: a second tensor of each would be the peak of a step's memory
        return None, *(unit.mul_(c) for c, unit in zip(cotangents, units, strict=True))


@contextmanager
def batch_of(n_images: int) -> Iterator[None]:
    """Context manager in which activations are of a batch of which this rank has n_images."""
    global _n_images
    _n_images = n_images
    try:
        yield
    finally:
        _n_images = None


def per_image_lp_norms(a_grads: Sequence[Tensor], P: float) -> list[Tensor]:
    """Return B^(−1/p) · ‖g‖_p (scalars) of each g, a power mean over the batch's B images.

    B is known where a step evaluates a penalty, be g (B, …), of windows (B·n, …) or (tokens, B, …);
    elsewhere it is the length of g. In a run of several processes these are norms of the whole
    batch, made of the norms of each rank's share: no activations are sent.
    """
    shares = distributed.local_shares(a_grads)
    n_each = (len(g) if _n_images is None else _n_images for g in shares)
    sizes = [distributed.global_batch_size(n) for n in n_each]
    norms = whole_batch_norms(shares, P)
    return torch._foreach_mul(norms, [size ** (-1 / P) for size in sizes]) if norms else []


def whole_batch_norms(shares: Sequence[Tensor], P: float) -> Sequence[Tensor]:
    """Return ‖t‖_p (scalars) of tensors t (B, …) of which each rank has its share of the images."""
    norms = lp_norms(shares, P)
    if norms and distributed.is_sharded():  # the norm of the whole is the norm of the shares' norms
        columns = distributed.gather(torch.stack(norms)).unbind(dim=1)
        norms = [lp_norm(column, P) for column in columns]
    return norms
