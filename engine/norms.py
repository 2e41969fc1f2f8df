"""Lp norms that neither overflow nor underflow, of one tensor or of a whole batch's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine import distributed


def lp_norm(g: Tensor, P: float) -> Tensor:
    """Return ‖g‖_p (scalar) of the flattened tensor, in float32 at least; P ≥ 1 or math.inf.

    For 2 < P < ∞, |g|^P would leave the range of float32 for ordinary gradients; the norm is
    homogeneous, so it is taken of g / max|g| (a constant factor: the derivative is the same).
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    if P == math.inf:  # vector_norm has this derivative, too, in more passes over g
        size = g.detach().abs()
        return g[size == size.amax()].abs().mean().to(dtype)
    if P <= 2:
        return torch.linalg.vector_norm(g, P, dtype=dtype)
    g = g.to(dtype)
    scale = g.detach().abs().max().clamp(min=torch.finfo(dtype).tiny)
    return scale * torch.linalg.vector_norm(g / scale, P)


def per_image_lp_norms(a_grads: Sequence[Tensor], P: float) -> list[Tensor]:
    """Return B^(−1/p) · ‖g‖_p (scalars) of each g (B, …): a power mean over the B images.

    In a run of several processes these are norms of the whole batch, made of the norms of each
    rank's share: no activations are sent.
    """
    shares = distributed.local_shares(a_grads)
    sizes = [distributed.global_batch_size(len(g)) for g in shares]
    norms = whole_batch_norms(shares, P)
    return [size ** (-1 / P) * norm for size, norm in zip(sizes, norms, strict=True)]


def whole_batch_norms(shares: Sequence[Tensor], P: float) -> Sequence[Tensor]:
    """Return ‖t‖_p (scalars) of tensors t (B, …) of which each rank has its share of the images."""
    norms = [lp_norm(t, P) for t in shares]
    if norms and distributed.is_sharded():  # the norm of the whole is the norm of the shares' norms
        columns = distributed.gather(torch.stack(norms)).unbind(dim=1)
        norms = [lp_norm(column, P) for column in columns]
    return norms
