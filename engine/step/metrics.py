"""What is measured in training: one row a batch, and its means over an epoch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.networks.layers import trainable_parameters
from engine.system.errors import NotFiniteError


def batch_metrics_row(
    net: nn.Module, n_images: int, loss: Tensor, penalty: Tensor, n_correct: Tensor
) -> Tensor:
    """Return one batch's row (4 + number of trainable parameters,), without waiting for the device.

    Columns: batch size, loss, penalty, number correct, the norm of each parameter's gradient.
    """
    norms = torch._foreach_norm([p.grad for p in trainable_parameters(net).values()])
    size = torch.full_like(loss, n_images)
    return torch.stack([size, loss, penalty, n_correct.to(loss.dtype), *norms])


def epoch_means(
    net: nn.Module, regularizer: nn.Module | None, epoch: int, rows: Sequence[Tensor]
) -> dict[str, float]:
    """Return the means over an epoch's rows: "loss", "accuracy" and, under its name, the penalty.

    Raises NotFiniteError that names the batch and term where a number is not finite. Where it is
    the penalty, the loss, which comes before it, is finite.
    """
    table = torch.stack(list(rows)).cpu().double()
    if not table.isfinite().all():
        batch, column = (~table.isfinite()).nonzero()[0].tolist()
        terms = ["", "loss", f"penalty {regularizer.name}" if regularizer else "penalty", ""]
        terms += [f"gradient of {name}" for name in trainable_parameters(net)]
        advice = "a smaller learning rate may help"
        if regularizer:
            advice = "a smaller learning rate or λ, or a penalty that begins later, may help"
        if column == 2 and table[batch, column].isnan():
            advice = "the loss is finite: the penalty itself has no value, as 0/0 has none"
        raise NotFiniteError(
            f"epoch {epoch}, batch {batch}: the {terms[column]} is {table[batch, column]}; {advice}"
        )
    n = table[:, 0]
    means = {"loss": (n * table[:, 1]).sum() / n.sum(), "accuracy": table[:, 3].sum() / n.sum()}
    if regularizer:
        means[regularizer.name] = (n * table[:, 2]).sum() / n.sum()
    return {key: value.item() for key, value in means.items()}
