"""The raw records of a study: the JSON that its jobs wrote, and one compact file with all of it."""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from analysis.study.grid import CONTROL, TRUNK, TUNING, choice_name, quantized_name
from engine.system.io import atomic_write, file_boundary, read_json

ARCHIVE_NAME = "records.jsonl.gz"
JOB_FOLDERS = re.compile("tuning|seed(0|[1-9][0-9]*)")


class StudyRecords:
    """The records of a study: of each training, quantization and choice of λ that is done.

    Jobs write them as files below the folder `out`. <out>/records.jsonl.gz collects them, a line
    {"path": …, "content": …} each, and stands in for files that are not there, as in a fresh clone;
    where both are there the file counts.
    """

    def __init__(self, out: Path) -> None:
        """Read <out>/records.jsonl.gz where there is one; raises FileError if it is damaged."""
        self.out = out
        self.archive = out / ARCHIVE_NAME
        self._archived = _read_archive(self.archive)  # by path below out, with slashes

    def archived(self, path: Path) -> bool:
        """Return whether the compact file has the record that is saved at `path`, below `out`."""
        return self.key(path) in self._archived

    def exists(self, path: Path) -> bool:
        """Return whether there is a record of that path, as a file or in the compact file."""
        return path.exists() or self.archived(path)

    def seeds(self) -> list[int]:
        """Return the seeds that have a folder or records, in order."""
        folders = {path.name for path in self.out.glob("seed*")}
        folders |= {key.partition("/")[0] for key in self._archived}
        matches = map(JOB_FOLDERS.fullmatch, folders)
        return sorted(int(match[1]) for match in matches if match and match[1])

    @contextmanager
    def open(self, path: Path) -> Iterator[Any]:
        """Context manager that yields the record saved at `path`.

        A missing one, and whatever error a wrong content leads to inside, is a FileError naming it.
        """
        if path.exists() or not self.archived(path):
            with read_json(path) as record:
                yield record
            return
        with file_boundary(f"{path} in {self.archive}"):
            yield self._archived[self.key(path)]

    def add(self, *paths: Path) -> None:
        """Copy the files at `paths` into the compact file; raises FileError and OSError."""
        changed = False
        for path in paths:
            with read_json(path) as record:
                changed |= self._archived.get(self.key(path)) != record
                self._archived[self.key(path)] = record
        if changed:
            self._save()

    def add_all(self) -> None:
        """Copy every record that is a file into the compact file; call it while no job runs."""
        folders = [path for path in self.out.glob("*/") if JOB_FOLDERS.fullmatch(path.name)]
        patterns = ("*.json", "*/results.json")
        self.add(*(path for folder in folders for p in patterns for path in folder.glob(p)))

    def forget(self, patterns: Sequence[str]) -> dict[str, str]:
        """Remove the records whose path below `out` matches, those that rest on them, and files.

        Trained weights and checkpoints are removed with their record. Returns the paths in order,
        each with one that matches and that it rests on, "" where it matches itself.
        """
        self.add_all()
        matching = {key for key in self._archived if any(fnmatchcase(key, p) for p in patterns)}
        resting = {
            key: matching.intersection(_needed(key, self._archived)) for key in self._archived
        }
        resting = {key: min(needed) for key, needed in resting.items() if needed}
        forgotten = resting | dict.fromkeys(matching, "")
        for key in forgotten:
            del self._archived[key]
            path = self.out / key
            stem = "*" if path.stem == TRUNK else escape(path.stem)  # also what was interrupted
            for suffix in (".json", ".pt", ".ckpt", ".ckpt.previous"):
                for file in path.parent.glob(stem + suffix):
                    file.unlink()
        self._save()
        return dict(sorted(forgotten.items()))

    def key(self, path: Path) -> str:
        """Return the name of the record that is saved at `path`: the path below `out`."""
        return path.relative_to(self.out).as_posix()

    def _save(self) -> None:
        content = pack_records(self._archived)
        atomic_write(self.archive, lambda path: path.write_bytes(content))


def _needed(key: str, keys: Iterable[str]) -> Iterator[str]:
    """Yield the paths of the records that one rests on; `keys` are those of all records.

    They are the trunk, of a quantization also the training, and of a choice all that was tuned.
    """
    yield f"{key.partition('/')[0]}/{TRUNK}.json"
    if key.endswith("/results.json"):
        trainings = (each.removesuffix(".json") for each in keys if each.count("/") == 1)
        own = [name for name in trainings if key.startswith(quantized_name(name, ""))]
        yield max(own, key=len, default="") + ".json"  # that of a_b_weights is a_b, not a
    if choice := re.fullmatch(f"tuning/{choice_name('(.+)')}.json", key):
        training = f"({CONTROL}|{re.escape(choice[1])}_[^_/]+)"
        tuned = re.compile(f"tuning/{training}({quantized_name('', TUNING)}/results)?.json")
        yield from filter(tuned.fullmatch, keys)


def recorded_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a record, with what a training's has beside them."""
    return record["settings"] | record


def recorded_command(record: Mapping[str, Any]) -> list[str]:
    """Return the command that does today what the one of a record did.

    Before --biases, PWLQ quantized biases.
    """
    settings = recorded_settings(record)
    has_pwlq = "pwlq" in settings.get("schemes", ()) and not settings.get("fold_bn")
    is_old = has_pwlq and "biases" not in settings
    return [*settings["command"], *(["--biases", "weight"] if is_old else [])]


def pack_records(records: Mapping[str, Any]) -> bytes:
    """Return a compact file of records by path: the same ones always give the same bytes."""
    entries = ({"path": path, "content": records[path]} for path in sorted(records))
    lines = (json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
    return gzip.compress("".join(lines).encode(), mtime=0)


def _read_archive(path: Path) -> dict[str, Any]:
    """Return the records of a compact file by path; raises FileError if it is damaged."""
    if not path.exists():
        return {}
    with file_boundary(path, "is damaged"):
        content = path.read_bytes()
        if not content:  # which gzip takes for nothing compressed
            raise EOFError("it is empty")
        lines = gzip.decompress(content).splitlines()
        return {line["path"]: line["content"] for line in map(json.loads, lines)}
