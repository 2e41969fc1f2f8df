"""Exported files in every runtime: predictions and logits that are not the simulation's.

Each file of weights is exported at (4,4) and (8,8), per tensor and per channel, with residual sums,
and at (8,8) for VNNI only and (4,4) with packed weights; `quant_inference.py --verify` compares it
in each runtime. With Valgrind, ONNX Runtime is also run on a processor that it emulates, which has
AVX2 and neither AVX-512 nor VNNI. Finished cases are kept.

    npm install --no-save --ignore-scripts onnxruntime-web onnxruntime-node
    OMP_NUM_THREADS=1 python benchmarks/runtimes.py weights/control.pt --output results/runtimes
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import numpy as np
import torch

import flags
from analysis.study.records import pack_records
from data import cifar10
from engine.deploy import runtimes

CASES = {
    "(4,4)": "--bits 4 --act_bits 4",
    "(4,4) per channel": "--bits 4 --act_bits 4 --per_channel",
    "(4,4) packed": "--bits 4 --act_bits 4 --pack_weights int4",
    "(8,8)": "--bits 8 --act_bits 8",
    "(8,8) per channel": "--bits 8 --act_bits 8 --per_channel",
    "(8,8) for VNNI": "--bits 8 --act_bits 8 --export_for vnni",
}
ROOT = Path(__file__).parents[1]
FIXED = "--fold_bn --quantize_sums --schemes uniform --no_plots --device cpu"
EMULATED = "ONNX Runtime, AVX2 emulated"
RUN_ALONE = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {"images": np.load(sys.argv[2])})[0])
"""


def emulate(path: Path, images: torch.Tensor) -> dict[str, Any]:
    """Return how logits under Valgrind differ from those of this processor's own."""
    x, y, script = (path.with_suffix(end) for end in (".x.npy", ".y.npy", ".py"))
    np.save(x, images.numpy())
    script.write_text(RUN_ALONE, encoding="utf-8")
    command = ["valgrind", "--tool=none", sys.executable, script, path, x, y]
    subprocess.run(command, check=True, capture_output=True)
    logits = np.load(y)
    _, outputs = runtimes.run_model("onnxruntime", path.read_bytes(), images)
    expected = outputs["logits"]
    for each in (x, y, script):
        each.unlink()
    return {
        "n_images": len(images),
        "differing_predictions": int((logits.argmax(1) != expected.argmax(1)).sum()),
        "differing_logits": int((logits != expected).sum()),
        "n_logits": logits.size,
    }


def measure(weights: Path, words: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export and verify one case; return what was found."""
    stem = f"{weights.stem} {words}".replace("--", "").replace(" ", "_")
    path = folder / f"{stem}.onnx"
    record = path.with_suffix(".verified.json")
    if not record.exists():
        command = [sys.executable, "quant_inference.py", weights, *words.split(), *FIXED.split()]
        command += ["--export", path, "--verify", "--runtimes", *args.runtimes]
        command += ["--data_dir", args.data_dir, "--test_subset", args.n_images]
        command += ["--output", folder / stem]
        subprocess.run(list(map(str, command)), check=False, cwd=ROOT)
    verified = json.loads(record.read_text(encoding="utf-8"))
    images = cifar10(args.data_dir, 0).test_images
    if args.n_emulated and EMULATED not in verified["runtimes"]:
        verified["runtimes"][EMULATED] = emulate(path, images[: args.n_emulated])
    record.write_text(json.dumps(verified, indent=1), encoding="utf-8")
    return verified


def cell(record: Mapping[str, Any], name: str) -> str:
    """Return what differs in a runtime."""
    if name == "onnxruntime":
        differing, n_images = record["differing_predictions"]["integer"], record["n_images"]
        logits = record["largest_logit_difference"]["integer"] and "some"
    elif name in record["runtimes"]:
        each = record["runtimes"][name]
        differing = each["differing_predictions"]
        n_images = each.get("n_images", record["n_images"])
        logits = each["differing_logits"]
    else:
        return "–"
    logits = f"{logits:,}" if isinstance(logits, int) and logits else logits or "no"
    return f"{differing} of {n_images:,}, {logits} logits"


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all cases as Markdown."""
    first = next(iter(records.values()))
    versions = {"onnxruntime": first["onnxruntime"]}
    versions |= {k: v["version"] for k, v in first["runtimes"].items() if "version" in v}
    names = [*versions, *([EMULATED] if EMULATED in first["runtimes"] else [])]
    machine = first["environment"]["machine"]
    lines = [
        f"Predictions, and logits, that differ from the simulation. "
        f"{machine['processor']}, {'with' if has_vnni() else 'without'} VNNI, "
        f"{machine['threads']} thread(s).",
        "",
        "| file | bytes | "
        + " | ".join(f"{name} {versions.get(name, '')}".strip() for name in names)
        + " |",
        "| --- | ---: |" + " --- |" * len(names),
    ]
    for name, record in records.items():
        cells = [name, f"{record['bytes']['file']:,}", *(cell(record, each) for each in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def has_vnni() -> bool:
    """Tell whether this processor has VNNI, as Linux says it."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "_vnni" in info.read_text(encoding="utf-8")


def main() -> None:
    """Measure all files and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--runtimes", nargs="+", default=[*flags.RUNTIMES[:4]], metavar="NAME")
    parser.add_argument("--n_images", type=int, default=10_000)
    parser.add_argument("--n_emulated", type=int, default=200 if shutil.which("valgrind") else 0)
    parser.add_argument("--data_dir", default="./data")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    folder = Path("runs/runtimes").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    records = {}
    for weights in args.weights:
        for name, words in CASES.items():
            records[f"{weights.stem} {name}"] = measure(weights.resolve(), words, args, folder)
            text = table(records)
            (args.output / "table.md").write_text(text, encoding="utf-8")
            (args.output / "records.jsonl.gz").write_bytes(pack_records(records))
    print(text)


if __name__ == "__main__":
    main()
