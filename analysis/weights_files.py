"""Files of weights that a command line names, and what the record beside each says of its training.

The record of `<name>.pt` is `<name>.json`; a checkpoint, `<name>.ckpt`, holds its settings itself.
"""

import argparse
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import accepts
from engine.system import distributed
from engine.system.errors import DataError, FileError
from engine.system.io import read_json, torch_load


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. `record` is that of its training, empty where there is none."""

    path: Path
    record: Mapping[str, Any]

    def setting(self, name: str) -> Any:
        """Return a number or text among the training's settings, None where it is not known."""
        value = self.record.get("settings", {}).get(name)
        return None if isinstance(value, list) else value

    def count(self, name: str) -> int | None:
        """Return a setting that is a number of something, None where the record has no such one."""
        value = self.setting(name)
        return value if type(value) is int and value > 0 else None

    def image_size(self) -> int | None:
        """Return the --image_size of the training, None where the record has no such number."""
        return self.count("image_size")

    def n_trained_on(self, dataset: str, data_dir: str, n: int, n_before: float) -> int:
        """Return how many of the data set's last `n` images, with `n_before` before them, it knows.

        They count as unknown where the record does not say that they were trained on.
        """
        folders = [str(self.setting("data_dir")), data_dir]
        same_folder = len({os.path.realpath(folder) for folder in folders}) == 1
        if self.setting("dataset") != dataset or (accepts(dataset, "workers") and not same_folder):
            return 0  # of one's own images; those of CIFAR-10 are the same in every folder
        n_known = n - (self.count("holdout") or 0)
        subset = self.count("train_subset")  # the first ones
        return max(0, n_known if subset is None else min(n_known, subset - n_before))

    def provenance(self) -> dict[str, Any]:
        """Return what a row of the report says of the training."""
        settings = {name: self.setting(name) for name in ("regularizer", "lmbda", "seed")}
        if settings["regularizer"] in (None, "none"):
            settings["lmbda"] = None
        return {"run_id": self.record.get("run_id"), **settings}

    def expected_accuracy(
        self, dataset: str, is_whole_test_set: bool, key: str = "final_accuracy"
    ) -> float | None:
        """Return the accuracy after training, `key` in the record; None where it is not known.

        It is that on the whole test set of `dataset`; held-out images, for example, are others.
        """
        same_images = self.setting("dataset") == dataset and not self.setting("holdout")
        accuracy = self.record.get(key)
        is_accuracy = isinstance(accuracy, float | int) and 0 <= accuracy <= 1
        return accuracy if is_accuracy and same_images and is_whole_test_set else None


def read_record(path: Path) -> Mapping[str, Any]:
    """Return the record of the training that wrote the file, {} where there is none that fits."""
    if path.suffix != ".ckpt":
        return read_training_record(path.with_suffix(".json")).record
    with suppress(FileError):  # said when its weights are read
        return _plain_record(torch_load(path))
    return {}


def read_training_record(path: Path) -> WeightsFile:
    """Return the record at `path`, whatever that is called, as that of a file of weights."""
    record: dict[str, Any] = {}
    with suppress(FileError), read_json(path) as content:
        record = _plain_record(content)
    if os.path.exists(path) and not record:  # False, too, where the name is too long
        print(f"{path} is ignored: it is damaged, or no record of a training", file=sys.stderr)
    return WeightsFile(path, record)


def _plain_record(content: Any) -> dict[str, Any]:
    """Return a record with settings as the flags can have them, {} where it has none."""
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        return {}
    settings = {k: v for k, v in content["settings"].items() if isinstance(k, str) and _is_plain(v)}
    others = {k: v for k, v in content.items() if _is_plain(v) or k == "artifact"}
    return {**others, "settings": settings}


def _is_plain(value: Any) -> bool:
    """Tell whether the value is a number, a text or None, or a list of these, as settings are."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str | int | float | None) for item in items)


def find_weights(patterns: Sequence[str]) -> dict[str, WeightsFile]:
    """Return the files that the patterns mean, by name as in `find_paths`, with their records."""
    paths = find_paths(patterns)
    return {name: WeightsFile(path, read_record(path)) for name, path in paths.items()}


def find_paths(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files that the patterns mean, by name.

    The name is that of the file without .pt, or its path where another file has that name. A
    pattern without a match stays as it is: reading it then says that it is missing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        paths += map(Path, matches or [pattern])
    paths = list(dict.fromkeys(paths))
    stems = [path.name.removesuffix(".pt") for path in paths]
    names = Counter([*stems, *map(str, paths)])
    files = zip(stems, paths, strict=True)
    return {stem if names[stem] == 1 else str(path): path for stem, path in files}


def common_dataset(files: Iterable[WeightsFile], known: Iterable[str]) -> str | None:
    """Return the data set that the files' records name, None where none does.

    Raises DataError where they name several, or one that is not among the `known`.
    """
    by_dataset = {str(f.setting("dataset")): f.path for f in files if f.setting("dataset")}
    if len(by_dataset) > 1:
        trained = ", ".join(f"{path} on {name}" for name, path in by_dataset.items())
        raise DataError(f"trained on different data sets, {trained}: quantize them one by one")
    if strangers := by_dataset.keys() - set(known):
        name = strangers.pop()
        raise DataError(f"{by_dataset[name]} was trained on {name}, which is not here: --dataset")
    return next(iter(by_dataset), None)


def common_image_size(files: Iterable[WeightsFile], dataset: str) -> int | None:
    """Return the --image_size that files were trained with on the dataset, None where none says it.

    Raises DataError where they say several.
    """
    sizes = {f.image_size() for f in files if f.setting("dataset") == dataset} - {None}
    if len(sizes) > 1:
        pixels = " and ".join(map(str, sorted(sizes)))
        raise DataError(f"trained on images of {pixels} pixels: choose --image_size")
    return next(iter(sizes), None)


def warn_of_holdout(
    files: Iterable[WeightsFile], args: argparse.Namespace, n_before: float
) -> None:
    """Print a line for each file that was trained on images of --holdout, by its record.

    Before those, the data set has `n_before` others.
    """
    for file in files if args.holdout and distributed.get_rank() == 0 else ():
        if n := file.n_trained_on(args.dataset, args.data_dir, args.holdout, n_before):
            print(
                f"{file.path} was trained on {n} of the {args.holdout} images that --holdout tests "
                "on, as its record says: that is no accuracy on new images",
                file=sys.stderr,
            )
