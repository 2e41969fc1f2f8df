"""Reading a Weights & Biases run back from its log on this disk, with wandb's own inspector."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.system.errors import FileError

TYPE_KEY = "._type"  # ends the name of a histogram, table or image; its parts have further endings


def read_offline_run(path: Path) -> dict[str, Any]:
    """Read a run's log: a .wandb file, or the folder wandb/offline-run-… that holds one.

    Returns a dict of

    - "run": id, name, project, job_type, group, tags and notes, those that were set,
    - "config" and "summary": as they were last,
    - "history": a dict a logged row, in order, with "_step" and "_timestamp" (seconds since 1970).
      A histogram of n bins is {"_type": "histogram", "bins": n + 1 edges, "values": n counts},
    - "artifacts": of those that the run logs or uses, a dict each as wandb wrote it, with "name",
      "type" and, of one that is used, "use_after_commit".

    A run that was resumed has a log a part. Raises FileError where there is no log to read.
    """
    merged = json.loads(_inspect(path, "--summary"))
    records = [json.loads(line) for line in _inspect(path).splitlines()]
    contents = [(record["type"], record.get(record["type"], {})) for record in records]
    run = next((content for kind, content in contents if kind == "run"), {})
    return {
        "run": {
            "id": merged["run_id"],
            "name": merged["name"],
            "project": merged["project"],
            "job_type": run.get("job_type"),
            "group": run.get("run_group"),
            "tags": merged.get("tags", []),
            "notes": merged.get("notes") or None,
        },
        "config": merged.get("config", {}),
        "summary": merged.get("summary", {}),
        "history": [_unflatten(c["item"]) for kind, c in contents if kind == "history"],
        "artifacts": [content for kind, content in contents if kind == "artifact"],
    }


def _inspect(path: Path, *flags: str) -> str:
    """Return what wandb prints about the log: a JSON object a record, a line each, or a summary."""
    if not path.exists():
        raise FileError(f"{path}: there is no such log of Weights & Biases")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(path)]
    completed = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if completed.returncode or not completed.stdout:
        reason = (completed.stderr.strip() or "nothing in it").splitlines()[-1]
        raise FileError(f"{path} is not a log of Weights & Biases: {reason}")
    return completed.stdout


def _unflatten(row: dict[str, Any]) -> dict[str, Any]:
    """Put the parts of each histogram, table or image, "name.bins" and so on, into one dict."""
    names = [key.removesuffix(TYPE_KEY) for key in row if key.endswith(TYPE_KEY)]
    media: dict[str, dict[str, Any]] = {name: {} for name in names}
    plain = {}
    for key, value in row.items():
        name, _, part = key.rpartition(".")
        if name in media:
            media[name][part] = value
        else:
            plain[key] = value
    return plain | media
