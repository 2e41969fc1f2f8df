"""Logging in Weights & Biases, which never stops a training."""

import argparse
import netrc
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from torch import nn

from engine.system import distributed
from engine.system.environment import describe_code

MODES = ("online", "offline", "disabled")  # that WANDB_MODE may be
OLD_MODES = {"run": "online", "dryrun": "offline"}  # as W&B once called them
Table = tuple[Sequence[str], Sequence[Mapping[str, Any]]]  # columns, and rows by column
INIT_SECONDS, LOG_SECONDS, FINISH_SECONDS = 30.0, 30.0, 60.0  # time limits of the logger


class WandbLogger:
    """A Weights & Biases run that never stops a training: after a failure it only warns."""

    run: Any = None  # wandb's, None where there is none
    healthy = True  # False after a failure: nothing more is logged
    histogram_seconds = 0.0  # spent on histograms so far
    exit_code = 0  # that the run ends with
    mode = "disabled"  # of the run: online, offline or disabled
    failed_modes: set[str] = set()  # in this process, of any run: they are not waited for again

    def __init__(
        self, args: argparse.Namespace, job_type: str, name: str, config: dict, run_id: str
    ) -> None:
        """Start the run: WANDB_MODE where set, else online with a key and offline without one.

        `args` has the flags for Weights & Biases; `job_type` says what kind of run it is.
        The config is logged without empty entries and with the git commit. A run_id that was used
        before continues that run. Of several processes rank 0 logs.
        """
        import wandb  # takes a second to import: only where a run starts

        self.wandb = wandb
        self.log_model = args.log_model
        limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
        options = {
            "project": args.wandb_project,
            "entity": args.wandb_entity,
            "name": name,
            "job_type": job_type,
            "group": args.wandb_group,
            "tags": args.wandb_tags or None,
            "notes": args.wandb_notes,
            "config": without_empty({**config, **describe_code()}),
            "id": run_id,
            "resume": "allow",
            "settings": wandb.Settings(**limits, finish_timeout_raises=True, silent=True),
        }
        settle_environment()
        first_mode = environment_mode() or ("online" if has_key() else "offline")
        if distributed.get_rank():
            first_mode = "disabled"
        for mode in dict.fromkeys((first_mode, "offline", "disabled")):
            if mode in self.failed_modes:
                continue
            self.mode = mode
            if mode == "online" and not has_key():  # wandb would ask for one
                warn("Weights & Biases, online: no key here; `wandb login` stores one")
                continue
            try:
                self.run = call_with_timeout(2 * INIT_SECONDS, wandb.init, mode=mode, **options)
                self.folder = Path(os.path.relpath(Path(self.run.dir).parent))
                break
            except Exception as error:  # whatever the logger raises, training continues
                warn(f"Weights & Biases, {mode}: {error}")
                self.failed_modes.add(mode)
                self._attempt(2 * FINISH_SECONDS, wandb.teardown)  # else the id is still in use
        self.healthy = True  # so far
        self._attempt_if_healthy(lambda: self.run.define_metric("epoch", hidden=True))
        self.define("*", "epoch")
        if self.run is not None and self.run.resumed:  # what stopped it then is no failure now
            self.summarize({"failure": None})

    def define(self, name: str, step: str, summary: str | None = None) -> None:
        """Plot the values of that name against those of `step`.

        `summary` is what the run's summary holds of them: None for the last, "none" for nothing.
        """
        self._attempt_if_healthy(
            lambda: self.run.define_metric(name, step_metric=step, summary=summary)
        )

    def log(self, values: dict[str, Any]) -> None:
        """Log values, "epoch" among them, which is the x axis."""
        self._attempt_if_healthy(lambda: self.run.log(values))

    def summarize(self, values: dict[str, Any]) -> None:
        """Set entries of the run's summary: the columns by which runs are sorted and compared."""
        self._attempt_if_healthy(lambda: self.run.summary.update(values))

    def _is_recorded(self) -> bool:
        return self.run is not None and not self.run.disabled and self.healthy

    def _attempt_if_healthy(self, call: Callable[[], Any]) -> Any:
        """Do as `_attempt` where there is a run that has not failed."""
        return self._attempt(LOG_SECONDS, call) if self.run is not None and self.healthy else None

    def _attempt(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call with a time limit and return the result; where that fails, warn and log no more."""
        try:
            return call_with_timeout(seconds, call, *arguments)
        except Exception as error:
            warn(f"Weights & Biases: {str(error) or type(error).__name__}")
            self.healthy = False
            if isinstance(error, TimeoutError):
                self.failed_modes.add(self.mode)
            return None

    def log_histograms(self, net: nn.Module, epoch: float) -> None:
        """Log every parameter and its gradient under the names that wandb.watch uses."""
        if not self._is_recorded():
            return
        started_at = time.perf_counter()
        histogram = self.wandb.Histogram
        values: dict[str, Any] = {"epoch": epoch}
        for name, p in net.named_parameters():
            values[f"parameters/{name}"] = histogram(p.detach().float().cpu().numpy())
            if p.grad is not None:  # None of a frozen parameter
                values[f"gradients/{name}"] = histogram(p.grad.float().cpu().numpy())
        self.log(values)
        self.histogram_seconds += time.perf_counter() - started_at

    def log_media(self, tables: Mapping[str, Table], images: Mapping[str, Path]) -> None:
        """Log tables and images, by name."""
        if not self._is_recorded():
            return
        wandb = self.wandb

        def make() -> dict[str, Any]:
            made = {name: wandb.Image(str(path)) for name, path in images.items()}
            for name, (columns, rows) in tables.items():
                cells = [[row[column] for column in columns] for row in rows]
                made[name] = wandb.Table(list(columns), cells, allow_mixed_types=True)
            return made

        if made := self._attempt(LOG_SECONDS, make):
            self.log(made)

    def fail(self, error: BaseException) -> None:
        """Have the run end as failed or interrupted, with the reason in its summary."""
        code = getattr(error, "code", None)  # of SystemExit
        self.exit_code = code if isinstance(code, int) else 1
        reason = str(error).split("\n")[0]
        if self.exit_code > 128 or isinstance(error, KeyboardInterrupt):
            reason = f"interrupted {reason}"
        self.summarize({"failure": reason})

    def log_weights(self, path: Path) -> dict[str, str] | None:
        """With --log_model, log a file of weights as the run's output.

        Returns the artifact's name and digest, by which `use_weights` finds it again, or None.
        """
        if not (self.log_model and self._is_recorded()):
            return None
        artifact = self._draft_artifact(path, weights_name(self.run.id))
        if artifact is None:
            return None
        drafted = {"name": artifact.name, "digest": artifact.digest}  # later ":v0" is added
        self._attempt(2 * FINISH_SECONDS, self.run.log_artifact, artifact)
        return drafted if self.healthy else None

    def use_weights(self, path: Path, name: str, digest: str | None) -> None:
        """Log a file of weights as the run's input: the artifact of that name and content.

        A server that has the artifact links this run with the one that logged it; another gets the
        file. `digest` is that of the weights that the training logged; else only --log_model makes
        an artifact. Where the file has another digest, a line says so and nothing is linked.
        """
        if not ((digest or self.log_model) and self._is_recorded()):
            return
        artifact = self._draft_artifact(path, name)
        if artifact is None:
            return
        if digest and artifact.digest != digest:
            warn(f"{path} is no longer what its training logged as {name}: the two are not linked")
        elif self.run.offline:  # use_artifact itself refuses: this records what it would have sent
            options = {"is_user_created": True, "use_after_commit": True}
            self._attempt(LOG_SECONDS, lambda: self.run._log_artifact(artifact, **options))
        else:
            self._attempt(2 * FINISH_SECONDS, self.run.use_artifact, artifact)

    def _draft_artifact(self, path: Path, name: str) -> Any:
        """Return an artifact whose digest depends on the file's content only; None on failure."""

        def draft() -> Any:
            artifact = self.wandb.Artifact(name, "model", metadata={"file": str(path)})
            artifact.add_file(str(path), f"weights{path.suffix}")
            return artifact

        return self._attempt(LOG_SECONDS, draft)

    def close(self) -> None:
        """Close the run within a time limit."""
        if self.run is not None and not self.run.disabled:
            self._attempt(2 * FINISH_SECONDS, self.run.finish, self.exit_code)
            self._attempt(2 * FINISH_SECONDS, self.wandb.teardown)  # else it waits at exit


def how_to_open(loggers: Sequence[WandbLogger]) -> str:
    """Return lines that say how to open the runs, which are closed."""
    loggers = [each for each in loggers if each.run is not None and not each.run.disabled]
    if not loggers:
        return "Weights & Biases: nothing logged"
    local = [each for each in loggers if each.run.offline or not each.healthy]
    lines = [f"dashboard: {each.run.url}" for each in loggers if each not in local]
    if local:
        folder = local[0].folder.parent
        shown = local[0].folder if len(local) == 1 else folder
        # of --resume, too
        parts = sorted(p for each in local for p in folder.glob(f"*-{each.run.id}"))
        lines += [
            f"dashboard, in this terminal: wandb leet {shown}",
            f"dashboard, in the browser:   wandb sync {' '.join(map(str, parts))}",
        ]
    return "\n".join(lines)


def without_empty(value: Any) -> Any:
    """Return a config without None, and without what is empty or holds only such entries."""
    if not isinstance(value, dict):
        return value
    entries = {key: without_empty(item) for key, item in value.items()}
    return {key: v for key, v in entries.items() if v is not None and v not in ("", [], (), {})}


def weights_name(made_by: str) -> str:
    """Return the name of the artifact of a training's weights; `made_by` is its run's ID."""
    return "weights-" + re.sub(r"[^\w.-]", "_", made_by, flags=re.ASCII)[:100]


def call_with_timeout(seconds: float, call: Callable, *arguments: Any, **options: Any) -> Any:
    """Call in a thread of its own and return the result; TimeoutError after `seconds`.

    W&B's own time limits do not hold a run. Measured with wandb 0.31: `init` keeps to init_timeout,
    but with a server that hangs later, `finish` went on for 300 s and more despite a limit of 60,
    and with W&B's own process stopped `log` never returned once its buffer was full.
    """
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call(*arguments, **options))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return outcome.result()


def environment_mode() -> str:
    """Return which of MODES the variable WANDB_MODE says, "" where it says none of them."""
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    mode = OLD_MODES.get(mode, mode)
    return mode if mode in MODES else ""


def settle_environment() -> None:
    """Set WANDB_MODE to a value that W&B accepts; with any other it would not even start."""
    mode = environment_mode()
    asked = os.environ.pop("WANDB_MODE", "")
    if mode:
        os.environ["WANDB_MODE"] = mode
    elif asked:
        warn(f"WANDB_MODE={asked!r} is left out: it is none of {', '.join(MODES)}")


def warn(message: object) -> None:
    """Print the first line of the message on stderr."""
    print(str(message).strip().split("\n")[0], file=sys.stderr)


def new_run_id() -> str:
    """Return an unused ID for a Weights & Biases run; in a sweep, the one that its agent gave."""
    return sweep_run_id() or uuid.uuid4().hex[:12]


def sweep_run_id() -> str:
    """Return the ID that a sweep's agent gave this run, "" outside a sweep."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def has_key() -> bool:
    """Tell whether Weights & Biases has credentials, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(host) is not None
