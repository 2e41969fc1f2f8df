"""What a quantization logs in Weights & Biases: a run for each network, linked to its training."""

import argparse
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.report import COLUMNS, FLOAT_BITS, LAYER_COLUMNS, UNQUANTIZED, Results, Row
from analysis.weights_files import WeightsFile
from engine.system.wandb_logger import WandbLogger, how_to_open, new_run_id, weights_name


def log_quantizations(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    files: Mapping[str, WeightsFile],
    results: Results,
    plots: Mapping[str, Path],
) -> str:
    """Log a run for each network, and return lines that say how to open them.

    With a run each, networks are rows of the project's table of runs, and accuracies its columns.
    `files` are those of the networks, `plots` the pictures by title: weights/<name> is of that one.
    """
    loggers = []
    for name, file in files.items():
        others = {f"weights/{other}" for other in files if other != name}
        rows = [row for row in results.rows if row["checkpoint"] == name]
        layer_rows = [row for row in results.layer_rows if row["checkpoint"] == name]
        config = {**settings, "checkpoints": [str(file.path)], **describe_training(file.record)}
        run_id = uuid.uuid4().hex[:12] if loggers else new_run_id()  # a sweep gives one
        logger = WandbLogger(args, "quantize", f"quantize_{name}", config, run_id)
        try:
            own_plots = {title: path for title, path in plots.items() if title not in others}
            log_results(logger, rows, layer_rows, own_plots, args.act_bits or [])
            use_weights(logger, file)
        except BaseException as error:  # such as Ctrl-C
            logger.fail(error)
            raise
        finally:
            logger.close()
        loggers.append(logger)
    return how_to_open(loggers)


# --- where the weights come from -------------------------------------------------------------


def describe_training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entry "training": run ID and name, final accuracy, and its settings."""
    if not record:
        return {}
    settings = {k: v for k, v in record["settings"].items() if not k.startswith("wandb_")}
    outcome = {key: record.get(key) for key in ("run_id", "git_commit", "final_accuracy")}
    return {"training": {**settings, **outcome}}


def use_weights(logger: WandbLogger, file: WeightsFile) -> None:
    """Log the weights as the run's input, under the name that their training gave them."""
    artifact = file.record.get("artifact")
    if isinstance(artifact, dict) and artifact.keys() >= {"name", "digest"}:
        logger.use_weights(file.path, str(artifact["name"]), str(artifact["digest"]))
    else:
        made_by = file.record.get("run_id") or file.path.stem
        logger.use_weights(file.path, weights_name(str(made_by)), None)


# --- numbers, tables and pictures ------------------------------------------------------------


def measures(row: Row) -> dict[str, float]:
    """Return the numbers of a row that are compared, by their names in the dashboard."""
    return {
        "accuracy": row["accuracy"],
        "accuracy_drop": -row["accuracy_change"],
        "squared_error": row["squared_error"],
    }


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return the summary of one network, with a key for each measure, scheme and bit-width.

    accuracy/uniform/4 is that of 4-bit weights, accuracy/uniform/4,8 with 8-bit activations as
    well, and accuracy/full that of the network as it was trained. A drop of 0.01 is one point.
    """
    values = {}
    for row in rows:
        if row["scheme"] == UNQUANTIZED:
            values |= {"accuracy/full": row["accuracy"], "loss/full": row["loss"]}
            continue
        bits = str(row["bits"])
        if row["act_bits"] != FLOAT_BITS:
            bits += f",{row['act_bits']}"
        for name, value in measures(row).items():
            values[f"{name}/{row['scheme']}/{bits}"] = value
    return values


def curves(rows: Sequence[Row], asked: Sequence[int | str]) -> list[dict[str, float]]:
    """Return rows of the history, one per bit-width, whose x axis is "bits".

    A curve is accuracy/uniform, accuracy/uniform/act_8 with 8-bit activations, or …/act_same, as
    `asked` says, the values of --act_bits: one point may lie on two curves.
    """
    points: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["scheme"] == UNQUANTIZED:
            continue
        bits, act_bits = row["bits"], row["act_bits"]
        on = [each for each in asked if act_bits == (bits if each == "same" else each)]
        point = points.setdefault(bits, {"bits": bits})
        for curve in on or [act_bits]:  # learned steps have bits that no flag says
            ending = "" if curve == FLOAT_BITS else f"/act_{curve}"
            for name, value in measures(row).items():
                point[f"{name}/{row['scheme']}{ending}"] = value
    return [points[n_bits] for n_bits in sorted(points)]


def log_results(
    logger: WandbLogger,
    rows: Sequence[Row],
    layer_rows: Sequence[Row],
    plots: Mapping[str, Path],
    act_bits: Sequence[int | str],
) -> None:
    """Log the numbers of one network, and the plots, paths by title, as images."""
    points = curves(rows, act_bits)
    for name in dict.fromkeys(name for point in points for name in point):
        logger.define(name, "bits", "none")  # the summary has a key of its own per bit-width
    for point in points:
        logger.log(point)
    logger.summarize(summary(rows))
    tables = {"results": (COLUMNS, rows), "per_layer": (LAYER_COLUMNS, layer_rows)}
    images = {f"plots/{title}": path for title, path in plots.items()}
    logger.log_media({name: table for name, table in tables.items() if table[1]}, images)
