"""How far bfloat16 convolutions turn the gradients of the loss and of the penalties.

Prints the cosine between the bfloat16 gradient and the float32 one, over all parameters, on batches
of 128 training images: the median and the least over the batches. For a fresh network and, with
--weights, for a trained one. The last line is one JSON object.
"""

import argparse
import json
import statistics
from itertools import islice
from pathlib import Path

import _root  # noqa: F401
import torch
from torch import nn

import data
import flags
import utils
from engine.images.loader import Loader
from engine.step.gradients import compute_gradients
from engine.system import cli
from engine.system.io import load_weights
from regularizers import make_regularizer

PENALTIES = ("none", "L1Grad", "L2Grad")


def gradient(
    net: nn.Module, penalty: str, x, y, dtype: torch.dtype, difference_step: float | None = None
) -> torch.Tensor:
    """Return ∇R, or ∇L for "none", as one vector; by a difference where its step is given."""
    criterion, vectors = nn.CrossEntropyLoss(), []
    for regularizer in dict.fromkeys((make_regularizer(penalty, 1.0), None)):
        compute_gradients(net, criterion, regularizer, x, y, dtype, difference_step=difference_step)
        vectors.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    return vectors[0] - (vectors[1] if len(vectors) > 1 else 0)


def train_loader(dataset: data.ImageDataset, args: argparse.Namespace) -> Loader:
    """Return the loader of the training images, as a training draws them."""
    return Loader(
        dataset.train_images,
        dataset.train_labels,
        args.batch_size,
        dataset.mean,
        dataset.std,
        seed=args.seed,
        augment=True,
        shuffle=True,
        device=args.device,
        memory_format=torch.channels_last,
    )


def first_batches(
    dataset: data.ImageDataset, args: argparse.Namespace
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first --batches batches of the first epoch: images and labels."""
    return list(islice(train_loader(dataset, args).batches(0), args.batches))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    return torch.cosine_similarity(a, b, dim=0).item()


def main() -> None:
    """Print a table and one JSON line."""
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a .pt file of a trained network")
    parser.add_argument(
        "--batches", type=cli.bounded_number(int, at_least=1), default=8, help="how many"
    )
    parser.add_flags(flags.DATA)
    args = parser.parse_args()
    dataset = data.load(args.dataset, args.data_dir, args.seed)
    batches = first_batches(dataset, args)
    result = {}
    for state in ("fresh", "trained") if args.weights else ("fresh",):
        torch.manual_seed(args.seed)
        net = utils.make_net("ConvNet", dataset.num_classes, args.device)
        if state == "trained":
            load_weights(net, args.weights)
        for penalty in PENALTIES:
            cosines = [
                cosine(
                    gradient(net, penalty, x, y, torch.bfloat16).double(),
                    gradient(net, penalty, x, y, torch.float32).double(),
                )
                for x, y in batches
            ]
            name = f"{state}_{'loss' if penalty == 'none' else penalty}"
            result[name] = round(statistics.median(cosines), 5)
            print(f"{name:20s} median {result[name]:.5f}  least {min(cosines):.5f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
