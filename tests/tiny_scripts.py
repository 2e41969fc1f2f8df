"""The scripts with a tiny network and data set: `python tiny_scripts.py train.py --flag …`."""

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import reference  # noqa: E402

import combined_protocol  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import quant_inference  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402
from engine.networks import fast_layers  # noqa: E402
from engine.system import wandb_logger  # noqa: E402

MODULES = {
    "train.py": train,
    "combined_protocol.py": combined_protocol,
    "quant_inference.py": quant_inference,
    "study.py": study,
}
SCRIPTS = {name: module.main for name, module in MODULES.items()}


class Tiny(reference.SmoothNet):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes)


class ForeignNorm(nn.BatchNorm2d):
    pass


class Foreign(Tiny):
    """Its batch norm is of a kind that is not put under our control."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm1 = ForeignNorm(3)


class TinyFused(nn.Module):
    """The same of fast layers, whose batch norms synchronize."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(5), nn.ReLU()
        self.conv2 = nn.Conv2d(5, 6, 3, stride=2, padding=1)
        self.norm2, self.relu2 = nn.BatchNorm2d(6), nn.ReLU()
        self.linear = nn.Linear(6, num_classes)
        fast_layers.use_fast_layers(self)

    def forward(self, x):
        a1 = self.relu1(self.norm1(self.conv1(x)))
        a2 = self.relu2(self.norm2(self.conv2(a1)))
        return self.linear(a2.mean(dim=(2, 3))), [a1, a2]


dataset = data.synthetic()
TINY = data.ImageDataset(
    dataset.train_images[:160, :, :8, :8].clone(),
    dataset.train_labels[:160],
    dataset.test_images[:64, :, :8, :8].clone(),
    dataset.test_labels[:64],
)
models.MODELS |= {"Tiny": Tiny, "TinyFused": TinyFused, "Foreign": Foreign}
data.DATASETS["Tiny"] = lambda data_dir, seed: TINY
FLAGS = [
    "--model",
    "Tiny",
    "--dataset",
    "Tiny",
    "--batch_size",
    "32",
    "--precision",
    "fp32",
    "--no-compile",
    "--device",
    "cpu",
    "--lr",
    "0.01",
    "--run_name",
    "r",
]


def break_write(number: int, mode: str) -> None:
    """Break the number-th call that writes.

    Modes: it fails as on a full disk ("fail"), it and all later ones do as in a folder that became
    "read-only", or the process dies ("die").
    """
    n_calls = 0

    def breaking(call, kind=OSError):
        def broken(*arguments, **options):
            nonlocal n_calls
            n_calls += 1
            if n_calls == number:
                os.write(2, b"the write breaks\n")
            if n_calls == number and mode == "fail":
                raise kind(28, "No space left on device")
            if n_calls >= number and mode == "read-only":
                raise kind(30, "Read-only file system")
            if n_calls == number and mode == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return broken

    os.replace, os.fsync = breaking(os.replace), breaking(os.fsync)
    torch.save = breaking(torch.save, RuntimeError)  # what torch raises then
    Path.write_bytes = breaking(Path.write_bytes)


def turn_clock(hours: float) -> None:
    """Let the time of day jump by so many hours whenever it is asked for."""
    now, n_calls = time.time, itertools.count(1)
    time.time = lambda: now() + 3600 * hours * next(n_calls)


def run(script: str, argv: list[str]) -> int:
    """Return the exit code that the interpreter would end with."""
    try:
        SCRIPTS[script](argv)
    except SystemExit as end:
        return end.code or 0
    except KeyboardInterrupt:  # before the script takes the signals over
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_logged(
    script: str, argv: list[str], cwd: Path, inject: Callable[[], None] | None = None
) -> int:
    """Run the script in the folder, its output in `log`; `inject` is called before it."""
    os.chdir(cwd)
    os.environ |= {"WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    log = os.open("log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [script, *argv]
    if inject:
        inject()
    return run(script, argv)


def main() -> None:
    torch.set_num_threads(1)
    wandb_logger.INIT_SECONDS = wandb_logger.LOG_SECONDS = wandb_logger.FINISH_SECONDS = 3.0
    sys.argv = sys.argv[1:]
    SCRIPTS[sys.argv[0]](sys.argv[1:])


if __name__ == "__main__":
    main()
