"""How long an epoch of a study takes on this machine, from a few steps of training."""

import argparse
import statistics
import time

import torch
from torch import nn

import data
import utils
from engine.step.gradients import compute_gradients
from engine.system import hardware

N_STEPS = 10  # that are timed, after one that compiles and one that fills the allocator
PIXELS = 32  # of CIFAR's images


def measure_epoch_seconds(args: argparse.Namespace, n_images: int) -> float:
    """Return the seconds of an epoch without a penalty, of `n_images`; `args` are of train.py.

    They are those of steps on random images, without the test after the epoch; a penalty costs what
    the grid says. Raises NetworkError.
    """
    takes_size = data.accepts(args.dataset, "image_size")
    shape = (3, *2 * (args.image_size if takes_size else PIXELS,))
    device = args.device
    hardware.tune_glibc_malloc()
    utils.choose_kernels(args)
    net = utils.make_net(args.model, 10, device, args.width, image_shape=shape)
    x = torch.randn(args.batch_size, *shape).to(device)
    y = torch.randint(10, (args.batch_size,), device=device)
    dtype = hardware.resolve_precision(args.precision, device)
    criterion = nn.CrossEntropyLoss()
    seconds = []
    for _ in range(2 + N_STEPS):
        began = time.perf_counter()
        loss, _, _ = compute_gradients(net, criterion, None, x, y, dtype)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:]) * n_images / args.batch_size
