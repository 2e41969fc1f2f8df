"""Processes on loopback: what N of them compute is what one computes."""

import os
import socket
from functools import partial

import torch
import torch.multiprocessing as mp
from torch import nn

import data
import distributed
import fused
import train
from regularizers import CombinedReg, make_regularizer


class Net(nn.Module):
    """A small net of fused layers, and a batch norm between without them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = fused.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norm1 = fused.BatchNormReLU(5)
        self.conv2 = fused.Conv2d(5, 6, 3, stride=2, padding=1)
        self.norm2 = fused.BatchNormReLU(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        a1 = self.norm1(self.conv1(x))
        a2 = self.norm2(self.conv2(a1))
        return self.linear(a2.mean(dim=(2, 3))), [a1, a2]


def combined():
    return CombinedReg(
        CombinedReg(make_regularizer("L2Grad", 0.3), make_regularizer("VarianceNorm", 2.0)),
        CombinedReg(make_regularizer("StepNoise", 1.0), make_regularizer("L1Grad", 0.02)),
    )


REGULARIZERS = {
    "none": lambda: None,
    "combined": combined,
    **{name: partial(make_regularizer, name, 0.5) for name in (
        "L1Grad", "L2Grad", "L3Grad", "LinfGrad", "VarianceNorm", "InverseStdDevNorm",
        "KurtosisNorm", "RangeNorm", "StepL1Grad", "StepL2Grad", "StepNoise",
    )},
    "L2Grad, weights": partial(make_regularizer, "L2Grad", 0.5, only_weight_grads=True),
}


class Doubles:
    """A loader whose images are float64."""

    def __init__(self, **options):
        generator = torch.Generator().manual_seed(3)
        images = torch.randint(256, (37, 3, 6, 6), generator=generator, dtype=torch.uint8)
        labels = torch.randint(4, (37,), generator=generator)
        self.loader = data.Loader(images, labels, 10, (0.5,) * 3, (0.25,) * 3, **options)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def batches(self, *arguments):
        for x, y in self.loader.batches(*arguments):
            yield x.double(), y


def trained(name, sync=True):
    """Train two epochs in float64, the last batch of each smaller; return all that results."""
    torch.manual_seed(0)
    net, criterion, regularizer = Net().double(), nn.CrossEntropyLoss(), REGULARIZERS[name]()
    for m in net.modules():
        m.sync = sync
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    train_loader = Doubles(seed=1, augment=True, shuffle=True, **ranks)
    history = train.fit(net, criterion, optimizer, scheduler, train_loader, Doubles(cache=True),
                        [train.Phase(0, regularizer, warmup=0.5)], 2, dtype=torch.float64)
    numbers = [[value for key, value in entry.items() if "second" not in key] for entry in history]
    return {"numbers": torch.tensor(numbers, dtype=torch.float64), **net.state_dict()}


def as_rank(rank, n, port, work, answers):
    """Be that rank of n."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.processes("cpu"):
        answers.put((rank, work()))
        answers.close()
        answers.join_thread()
        distributed.largest(0)  # nobody leaves before all have answered


def on(n, work):
    """Return what work() returns on each of n ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=as_rank, args=(rank, n, port, work, answers), daemon=True)
                 for rank in range(n)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [found[rank] for rank in range(n)]


def as_numpy(results):
    """Return results without tensors, which would be shared memory in a queue."""
    return {name: {key: t.numpy() for key, t in result.items()} for name, result in results.items()}


def test_n_processes_train_what_one_does():
    def work():
        return as_numpy({name: trained(name) for name in REGULARIZERS})

    (expected,) = on(1, work)
    for n in (2, 4):
        for rank, found in enumerate(on(n, work)):
            for name, result in expected.items():
                for key, value in result.items():
                    torch.testing.assert_close(
                        torch.from_numpy(found[name][key]), torch.from_numpy(value), rtol=1e-9,
                        atol=1e-10, msg=lambda text, at=(n, rank, name, key): f"{at}: {text}",
                    )
