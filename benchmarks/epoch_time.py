"""Time whole epochs against nothing but their steps: what loader, logging and the loop cost.

The epoch is `train.run_epoch` on random images in memory; its steps are as many steps on one fixed
batch. They alternate; the ratio is the median over the rounds. The last line is a JSON object.

    python benchmarks/epoch_time.py [--rounds 5] [--batches 40] [--regularizer none]
"""

import argparse
import json
import statistics

import _root  # noqa: F401
import torch
from step_time import milliseconds
from torch import nn

import train
import utils
from engine.images.loader import Loader
from engine.networks.compiling import set_compile
from engine.networks.winograd import set_winograd
from engine.step.gradients import compute_gradients
from engine.system import hardware
from engine.training import train_state
from regularizers import make_regularizer

BATCH = 128


def make_work(regularizer: str, batches: int, device: str) -> tuple:
    """Return two functions: one trains an epoch, the other does as many steps."""
    torch.manual_seed(0)
    images = torch.randint(256, (batches * BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (len(images),))
    loader = Loader(
        images,
        labels,
        BATCH,
        (0.5,) * 3,
        (0.25,) * 3,
        augment=True,
        shuffle=True,
        device=device,
        memory_format=torch.channels_last,
    )
    net, criterion = utils.make_net("ConvNet", 10, device).train(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=5e-4, fused=True)
    reg, dtype = make_regularizer(regularizer, 0.01), hardware.resolve_precision("auto", device)
    x, y = next(iter(loader.batches(0)))

    def epoch() -> None:
        state = train_state.TrainState(net, optimizer, None)
        config = train.FitConfig(1, criterion, dtype)
        for _ in train.run_epoch(state, loader, train.Phase(0, reg), config):
            pass
        train.summarize(state, reg)

    def steps() -> None:
        for _ in range(batches):
            compute_gradients(net, criterion, reg, x, y, dtype)
            optimizer.step()

    return epoch, steps


def main() -> None:
    """Alternate epochs and steps; print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--regularizer", default="none")
    parser.add_argument("--device", default=hardware.default_device())
    args = parser.parse_args()
    hardware.tune_glibc_malloc()
    set_compile(True, args.device)
    set_winograd(True, args.device)
    epoch, steps = make_work(args.regularizer, args.batches, args.device)
    steps()  # compiles
    pairs = [(milliseconds(epoch), milliseconds(steps)) for _ in range(args.rounds)]
    for in_epoch, in_steps in pairs:
        print(f"epoch {in_epoch:.0f} ms, its {args.batches} steps {in_steps:.0f} ms")
    ratio = statistics.median(a / b for a, b in pairs)
    print(json.dumps({"epoch_ratio": round(ratio, 3), "regularizer": args.regularizer}))


if __name__ == "__main__":
    main()
