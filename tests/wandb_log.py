"""What a test reads of a Weights & Biases run in its log on this disk, with wandb's inspector."""

import json
import subprocess
import sys

TYPE_KEY = "._type"  # ends the name of a histogram, table or image; its parts have further endings


def read_log(path):
    """Return run, config, summary, history and artifacts of a .wandb file, or of its folder.

    A histogram of n bins is {"_type": "histogram", "bins": n + 1 edges, "values": n counts}.
    """
    merged = json.loads(inspect(path, "--summary"))
    records = [json.loads(line) for line in inspect(path).splitlines()]
    contents = [(record["type"], record.get(record["type"], {})) for record in records]
    run = next((content for kind, content in contents if kind == "run"), {})
    return {
        "run": {
            "id": merged["run_id"],
            "name": merged["name"],
            "job_type": run.get("job_type"),
            "group": run.get("run_group"),
            "tags": merged.get("tags", []),
            "notes": merged.get("notes") or None,
        },
        "config": merged.get("config", {}),
        "summary": merged.get("summary", {}),
        "history": [unflatten(c["item"]) for kind, c in contents if kind == "history"],
        "artifacts": [content for kind, content in contents if kind == "artifact"],
    }


def inspect(path, *flags):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(path)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def unflatten(row):
    """Put the parts of each histogram, table or image, "name.bins" and so on, into one dict."""
    names = [key.removesuffix(TYPE_KEY) for key in row if key.endswith(TYPE_KEY)]
    media = {name: {} for name in names}
    plain = {}
    for key, value in row.items():
        name, _, part = key.rpartition(".")
        if name in media:
            media[name][part] = value
        else:
            plain[key] = value
    return plain | media
