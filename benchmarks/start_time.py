"""What compiling costs a run at its start: processor time of train.py, of several source trees.

Each tree trains an epoch of 256 synthetic images with L2Grad, eagerly, compiled with an empty cache
and compiled with the cache that this left; trees take turns. The cost of compiling is the time over
the tree's own eager run, the median over rounds. To compare with an earlier commit:

    git worktree add ../before COMMIT
    python benchmarks/start_time.py --trees ../before . [--models ConvNet ResNet20] [--rounds 3]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {"eager": "--no-compile", "empty cache": "--compile", "cached": "--compile"}  # in this order
MODELS = ["ConvNet", "ResNet20", "MobileNetV2 --width 0.5"]
FLAGS = "--dataset Synthetic --n_epochs 1 --train_subset 256 --regularizer L2Grad"


def processor_seconds(tree: Path, model: str, flag: str, folder: str) -> float:
    """Return the processor time of a training and of what it starts, in seconds."""
    words = f"train.py --model {model} {FLAGS} {flag} --lmbda 0.01 --run_name start".split()
    own = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "cache")), "WANDB_MODE": "disabled"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, str(tree / words[0]), *words[1:]],
        check=True,
        cwd=folder,
        env={**os.environ, **own},
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure all trees and print a row for each network and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="+", type=Path, default=[Path(".")], metavar="FOLDER")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="FLAGS")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    trees = [tree.resolve() for tree in args.trees]
    print("processor seconds, the median; in brackets those over the tree's own eager run")
    for model in args.models:
        seconds = {(run, tree): [] for run in RUNS for tree in trees}
        for _ in range(args.rounds):
            for tree in trees:
                with tempfile.TemporaryDirectory() as folder:
                    for run, flag in RUNS.items():
                        found = processor_seconds(tree, model, flag, folder)
                        seconds[run, tree].append(found)
        for run in RUNS:
            medians = [statistics.median(seconds[run, tree]) for tree in trees]
            eager = [statistics.median(seconds["eager", tree]) for tree in trees]
            cells = (f"{m:6.1f} ({m - e:5.1f})" for m, e in zip(medians, eager, strict=True))
            print(f"{model:<26}{run:<14}{'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
