"""The table of docs/networks.md: what works with a network of each family of torchvision's.

Each is the smallest of its family, with random weights and batch norms that have seen some of 64
images of random pixels, of the smallest size that it takes. A cell is "yes", or the reason out of
the command's own line of error. Rows are written as they are known; names renew theirs alone.

    python benchmarks/families.py [NAME …]
"""

import argparse
import io
import json
import os
import re
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import _root  # noqa: F401
import torch
from torch import nn

import data
import quant_inference
import train
from engine.deploy import verify
from engine.networks import export
from engine.networks.outputs import check_network
from engine.system.errors import NetworkError
from engine.system.io import save_weights
from models import TORCHVISION, make_model

FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 "
    "resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 "
    "wide_resnet50_2"
).split()
SIZES = (32, 64, 96, 128, 224, 299)
N_TRAIN, N_TEST, N_SEEN = 48, 16, 16
PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
COLUMNS = ("family", "pixels", "train, L2Grad", "quantize (4, 4)", "multiply-adds, weights")
COLUMNS += ("fold", "equalized pairs", "export, verify")
WIDTH = 60  # characters of a reason
TRAIN = "--n_epochs 1 --train_subset 8 --batch_size 8 --lr 1e-4 --regularizer L2Grad --no-compile"
QUANTIZE = "--bits 4 --act_bits 4 --quantize_sums --schemes uniform --calibration_images 16"
Command = Callable[[Sequence[str]], None]


def random_images(size: int) -> data.ImageDataset:
    """Return 64 images of random pixels (3, size, size), of 10 classes."""
    generator = torch.Generator().manual_seed(0)
    n, shape = N_TRAIN + N_TEST, (N_TRAIN + N_TEST, 3, size, size)
    pixels = torch.randint(256, shape, generator=generator).to(torch.uint8)
    labels = torch.arange(n) % 10
    split = pixels[:N_TRAIN], labels[:N_TRAIN], pixels[N_TRAIN:], labels[N_TRAIN:]
    return data.ImageDataset(*split, num_classes=10)


@torch.no_grad()
def make_network(name: str) -> tuple[nn.Module, data.ImageDataset]:
    """Return the network with statistics in its batch norms, and images that it takes."""
    torch.manual_seed(0)
    net = make_model(name, 10)
    for size in SIZES:
        dataset = random_images(size)
        with suppress(NetworkError, RuntimeError, ValueError):  # too small, in either mode
            check_network(net, (3, size, size), 10)
            for x in (dataset.train_images / 64 - 2).split(N_SEEN):
                net.train()(x)
            return net, dataset
    raise NetworkError(f"{name} takes images of none of {SIZES} pixels")


def outcome(command: Command, words: str) -> tuple[str | None, str]:
    """Run a script's `main`; return why it failed, None where it did not, and its output."""
    output = io.StringIO()
    code = 0
    try:
        with redirect_stdout(output), redirect_stderr(output):
            command(words.split())
    except SystemExit as end:
        code = end.code
        if code > 128:  # a signal
            raise
    except Exception as error:  # which no script should raise
        traceback.print_exc()
        return f"TRACEBACK: {type(error).__name__}", ""
    lines = output.getvalue().splitlines()
    if not code:
        return None, output.getvalue()
    errors = [line for line in lines if "error: " in line] or lines
    return shortened(errors[-1]), output.getvalue()


def shortened(line: str) -> str:
    """Return the few words of an error's line that say what is the matter."""
    reason = re.sub(r"^.*error: (\S+\.pt: )?(--\w+: )?", "", line)
    reason = re.sub(r" \([^)]*\)|,? which .*|: --.*| is not supported.*", "", reason)
    reason = re.sub(r"^\S+ (?=calls )", "", reason)
    return textwrap.shorten(reason.replace("|", "/"), WIDTH, placeholder=" …")


def row(name: str) -> dict[str, str]:
    """Return the cells of a family, in the current folder, which gets the files."""
    net, dataset = make_network(TORCHVISION + name)
    data.DATASETS["Random"] = lambda data_dir, seed: dataset
    save_weights(net, Path("w.pt"))
    settings = {"model": TORCHVISION + name, "dataset": "Random"}
    Path("w.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    common = "--dataset Random --device cpu --precision fp32"
    model = f"--model {TORCHVISION}{name} --init_weights w.pt --run_name r"
    cells = {"family": f"`{name}`", "pixels": str(dataset.test_images.shape[-1])}
    why, _ = outcome(train.main, f"{common} {model} {TRAIN}")
    cells["train, L2Grad"] = why or "yes"

    def quantize(flags: str = "") -> tuple[str | None, str]:
        return outcome(quant_inference.main, f"w.pt {common} {QUANTIZE} --no_plots {flags}")

    why, _ = quantize()
    cells["quantize (4, 4)"] = why or "yes"
    if not why:
        last = json.loads(Path("results.json").read_text(encoding="utf-8"))["rows"][-1]
        shares = (last["quantized_macs"], last["quantized_weights"])
        cells["multiply-adds, weights"] = ", ".join(f"{100 * share:.1f} %" for share in shares)
    why, text = quantize("--fold_bn")
    left = re.search(r"(\d+) batch norms do not follow", text)
    folded = "no batch norms" if "no batch norms" in text else "yes"
    cells["fold"] = why or (f"all but {left[1]}" if left else folded)
    why, text = quantize("--fold_bn --equalize")
    pairs = re.search(r"layers equalized: (\d+)", text)
    cells["equalized pairs"] = why or (pairs[1] if pairs else "0")
    why, text = quantize("--fold_bn --export w.onnx --verify")
    cells["export, verify"] = why or "yes"
    return cells


def write_table(rows: Mapping[str, Mapping[str, str]]) -> None:
    """Put the rows in their place on the page, beside those of other families that it has."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    old, after = rest.split(END)
    lines = {line.split("`")[1]: line for line in old.splitlines() if line.startswith("| `")}
    for name, cells in rows.items():
        lines[name] = f"| {' | '.join(cells.get(column, '') for column in COLUMNS)} |"
    head = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: |" + " --- |" * (len(COLUMNS) - 2)]
    table = "\n".join([*head, *(lines[name] for name in FAMILIES if name in lines)])
    PAGE.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")


def trace_once() -> None:
    """Let the commands share what torch.export makes of a network: that takes longest."""
    trace, programs = export.traced, {}

    def traced(net: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
        key = (repr(net), images.shape, images.dtype)
        if key not in programs:
            programs.clear()
            programs[key] = trace(net, images)
        return programs[key]

    export.traced = traced


def main() -> None:
    """Renew the rows of all families, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*FAMILIES, []], metavar="NAME")
    names = parser.parse_args().names or FAMILIES
    os.environ["WANDB_MODE"] = "disabled"
    warnings.simplefilter("ignore")
    verify.BATCHES, verify.ROUNDS, verify.SECONDS_PER_ROUND = (1,), 1, 0.0  # no times are wanted
    torch.set_num_threads(1)
    trace_once()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            home = Path.cwd()
            os.chdir(folder)
            try:
                cells = row(name)
            finally:
                os.chdir(home)
        print(" | ".join(cells.values()), flush=True)
        write_table({name: cells})


if __name__ == "__main__":
    main()
