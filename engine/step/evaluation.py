"""The one evaluation: loss, accuracy and penalty over a data set, in evaluation mode."""

import torch
from torch import nn

from engine.images.loader import Loader
from engine.networks.batch_norm import folded_weights
from engine.step.batch_loss import BatchLoss, StartingState
from engine.step.penalty_inputs import detached_leaves, evaluate_penalty, needs_gradients
from engine.system import distributed
from engine.system.hardware import seed_rng, with_float64


def evaluate(
    net: nn.Module,
    criterion: nn.Module,
    loader: Loader,
    dtype: torch.dtype = torch.float32,
    regularizer: nn.Module | None = None,
) -> dict[str, float]:
    """Return the mean "loss", the "accuracy" and, under its name, the mean penalty over the loader.

    `dtype` is that of the convolutions. A penalty of gradients costs one first-order pass a batch.
    Random numbers that a regularizer draws are a pure function of the batch. With N processes each
    takes every N-th batch.
    """
    net.eval()
    inputs = regularizer.inputs if regularizer else ()
    with torch.no_grad():
        folded = detached_leaves(folded_weights(net)) if "folded_weights" in inputs else []
    totals = torch.zeros(3, dtype=torch.float64, device=with_float64(loader.labels.device))
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    for i, (x, y) in enumerate(loader.batches(0, start=rank, every=world_size)):
        seed_rng(rank + i * world_size, x.device)
        start = StartingState.of(net, x.device) if "loss_change" in inputs else None
        batch = BatchLoss(net, criterion, x, y, dtype, start)
        if needs_gradients(regularizer):
            # what a network keeps until it is trained again, as timm's LeViT does, has this
            # batch's graph behind it
            net.train().eval()
            result = batch.first_order(inputs)
        else:
            result = batch.forward_only()
        penalty = torch.zeros_like(result.loss)
        if regularizer:
            copies = {name: detached_leaves(ts) for name, ts in result.tensors.items()}
            with torch.no_grad():
                penalty = evaluate_penalty(
                    regularizer, batch, result.loss, result.grads, copies, folded
                )
        sums = torch.stack([len(x) * result.loss, result.n_correct, len(x) * penalty])
        totals += sums.to(totals.device)
    means = (distributed.all_reduce_sum(totals) / loader.n_images).tolist()
    names = ["loss", "accuracy", *([regularizer.name] if regularizer else [])]
    return dict(zip(names, means, strict=False))
