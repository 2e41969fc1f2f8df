"""The one evaluation: loss, accuracy and penalty over a data set, in evaluation mode."""

from functools import partial

import torch
from torch import nn

from engine.images.loader import Loader
from engine.networks.batch_norm import folded_weights
from engine.networks.layers import penalized_weights
from engine.networks.outputs import run_network
from engine.step.gradients import BatchLoss, needs_gradients
from engine.system import distributed
from engine.system.hardware import autocast, get_rng_state, seed_rng, with_float64


def evaluate(
    net: nn.Module,
    criterion: nn.Module,
    loader: Loader,
    dtype: torch.dtype = torch.float32,
    regularizer: nn.Module | None = None,
) -> dict[str, float]:
    """Return the mean "loss", the "accuracy" and, under its name, the mean penalty over the loader.

    `dtype` is that of the convolutions. A penalty of gradients costs one first-order pass a batch;
    no second-order graph is made. Random numbers that a regularizer draws are a pure function of
    the batch. With N processes each takes every N-th batch.
    """
    net.eval()
    inputs = regularizer.inputs if regularizer else ()
    with torch.no_grad():
        folded = folded_weights(net) if "folded_weights" in inputs else []
    totals = torch.zeros(3, dtype=torch.float64, device=with_float64(loader.labels.device))
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    for i, (x, y) in enumerate(loader.batches(0, start=rank, step=world_size)):
        seed_rng(rank + i * world_size, x.device)
        rng_state = get_rng_state(x.device) if "loss_change" in inputs else None
        batch = BatchLoss(net, criterion, x, y, dtype, rng_state)
        if needs_gradients(regularizer):
            result = batch.first_order(inputs)
            loss, n_correct = result.loss, result.n_correct
            tensors = {**result.tensors, "detached_w_grads": result.w_grads}
        else:
            with torch.inference_mode(), autocast(x.device, dtype):
                logits, _ = run_network(net, x)
                loss, n_correct = criterion(logits, y), (logits.argmax(dim=1) == y).sum()
            tensors = {"weights": penalized_weights(net)}
        penalty = torch.zeros_like(loss)
        if regularizer:
            change = partial(batch.change, loss, ())
            available = {**tensors, "loss_change": change, "folded_weights": folded}
            with torch.no_grad():
                penalty = regularizer(*(available[name] for name in inputs))
        totals += torch.stack([len(x) * loss, n_correct, len(x) * penalty]).to(totals.device)
    means = (distributed.all_reduce_sum(totals) / loader.n_images).tolist()
    names = ["loss", "accuracy", *([regularizer.name] if regularizer else [])]
    return dict(zip(names, means, strict=False))
