"""The plan of the study: which jobs make a variant, in which order, and what λ they are given."""

import shlex
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from analysis.study import jobs as study_jobs
from analysis.study.commands import QUANTIZE, TRAIN, script_of
from analysis.study.grid import (
    CONTROL,
    TRUNK,
    TUNING,
    Grid,
    choice_name,
    lambda_text,
    quantized_name,
    training_name,
)
from analysis.study.jobs import Job
from analysis.study.lambda_choice import TUNING_SEED, Choice, HoldoutAccuracy, select_lambda
from analysis.study.records import StudyRecords
from analysis.study.settings import Settings, epoch_names
from engine.system.io import save_json

CONTROL_EPOCH_SECONDS = 60.0  # on 2 cores in bfloat16, until one is measured


class NotChosen(Exception):
    """A variant's λ is not known yet, or cannot be; the message is one line."""


class StudyPlan:
    """The jobs of one network in the folder `out`.

    Attributes:
        network: as --models names it; "" where the study has no --models.
        epochs: those that flags name, see `epoch_names`.
        final_quantizations: names of the quantizations on the test set.
        failed: targets of jobs that failed since this program was started.
        epoch_seconds: of an epoch of the control; a guess unless `is_timed`.
    """

    def __init__(
        self,
        out: Path,
        settings: Settings,
        grid: Grid,
        network: str = "",
        epoch_seconds: float | None = None,
    ) -> None:
        """Read what is done in `out`; without `epoch_seconds`, times are those measured there.

        Raises FileError and OSError.
        """
        self.out = out
        self.network = network
        self.variants = grid.variants
        self.note = grid.note
        self.quantizations = dict(grid.quantizations)
        if network in grid.tuning:
            own = replace(grid.quantizations[TUNING], flags=grid.tuning[network])
            self.quantizations[TUNING] = own
        self.final_quantizations = [name for name in self.quantizations if name != TUNING]
        self.records = StudyRecords(out)
        self.failed: set[Path] = set()
        self.n_epochs = settings["n_epochs"]
        self.holdout = settings["holdout"]
        self.epochs = epoch_names(self.n_epochs)
        self.data_flags = [*shlex.split(settings["data_flags"]), *network_flags(network)]
        self.group = ["--wandb_group", (out.resolve().name or "study")[:128]]  # of the dashboard
        training = settings["TRAINING"].format(**self.epochs) + " " + settings["train_flags"]
        self.training_flags = [*shlex.split(training), *self.data_flags]
        self.measured = {} if epoch_seconds else study_jobs.job_seconds(out)
        measured = self.measured.get(TRUNK, 0) / self.epochs["first"]
        self.is_timed = bool(epoch_seconds or measured)
        self.epoch_seconds = epoch_seconds or measured or CONTROL_EPOCH_SECONDS

    # --- single jobs ---

    def trunk(self, seed: int, tuning: bool) -> Job:
        """Return the training that all variants of a seed have in common."""
        n_epochs = self.epochs["first"]
        flags = ["--n_epochs", str(n_epochs)]
        return self._training(TRAIN, TRUNK, TRUNK, flags, seed, tuning, n_epochs)

    def branch(self, name: str, seed: int, lmbda: float | None, tuning: bool = False) -> Job:
        """Return the last third of a variant's run; λ is None where there is none to choose."""
        trunk = self.trunk(seed, tuning)
        text = lambda_text(lmbda or 0.0)
        flags = shlex.split(self.variants[name].flags.format(**self.epochs, lmbda=text))
        script = script_of(flags)
        first = self.epochs["first"]
        if lmbda is not None and script == TRAIN:
            flags += ["--lmbda", text, "--first_regularized_epoch", str(first)]
        flags += [
            "--n_epochs",
            str(self.n_epochs),
            "--init_from",
            str(trunk.target.with_suffix(".ckpt")),
        ]
        stem = training_name(name, lmbda)
        cost = self.variants[self.tuned_name(name)].cost * (self.n_epochs - first)
        return self._training(script, name, stem, flags, seed, tuning, cost, (trunk,))

    def _training(
        self,
        script: str,
        kind: str,
        stem: str,
        flags: Sequence[str],
        seed: int,
        tuning: bool,
        cost: float,
        needs: tuple[Job, ...] = (),
    ) -> Job:
        """Return the job of a training that costs as much as `cost` epochs of the control."""
        folder = self.out / ("tuning" if tuning else f"seed{seed}")
        names = ["--run_name", f"study_{folder.name}_{stem}", "--save_file", str(folder / stem)]
        holdout = ["--holdout", str(self.holdout)] if tuning else []
        command = (  # of a flag that is given twice the last one counts
            *(script, *self.training_flags, *names, "--resume", "--seed", str(seed)),
            *(*flags, *holdout, *self.group),
        )
        targets = (folder / f"{stem}.pt",)
        if not needs:  # others continue from its checkpoint
            targets += (folder / f"{stem}.ckpt",)
        seconds = self.measured.get(kind, cost * self.epoch_seconds)
        return Job(kind, targets, command, seconds, needs)

    def quantized(self, trained: Job, quantization: str) -> Job:
        """Return the quantization of a trained network; named by a key of `quantizations`."""
        folder = trained.target.with_name(quantized_name(trained.target.stem, quantization))
        flags = [*self.data_flags, *shlex.split(self.quantizations[quantization].flags)]
        if quantization == TUNING:
            flags += ["--holdout", str(self.holdout)]
        output = ["--no_plots", "--output", str(folder)]
        command = (QUANTIZE, str(trained.target), *flags, *output, *self.group)
        target = folder / "results.json"
        kind = f"quantize {quantization}"
        seconds = self.measured.get(kind, self.quantizations[quantization].seconds)
        recorded = self.records.archived(target)
        return Job(kind, (target,), command, seconds, (trained,), recorded)

    # --- the choice of λ ---

    def tuned_name(self, name: str) -> str:
        """Return the variant whose λ this one has: itself, or the one it takes it over from."""
        return self.variants[name].lambda_from or name

    def lmbdas(self, name: str) -> tuple[float, ...]:
        """Return the λ that the variant's is chosen from, () where there is none to choose."""
        return self.variants[self.tuned_name(name)].lmbdas

    def choice_path(self, name: str) -> Path:
        """Return where the choice of the variant's λ is saved."""
        return self.out / "tuning" / f"{choice_name(self.tuned_name(name))}.json"

    def saved_choice(self, name: str) -> Choice | None:
        """Return the choice of the variant's λ that was made last, or None; raises FileError."""
        path = self.choice_path(name)
        if not self.lmbdas(name) or not self.records.exists(path):
            return None
        return Choice.load(self.records, path)

    def tuning(self, name: str) -> dict[float | None, Job]:
        """Return, by λ, the jobs that its choice rests on: the control's under None."""
        lmbdas = self.lmbdas(name)
        variants = {None: CONTROL, **dict.fromkeys(lmbdas, self.tuned_name(name))} if lmbdas else {}
        return {
            lmbda: self.quantized(self.branch(variant, TUNING_SEED, lmbda, tuning=True), TUNING)
            for lmbda, variant in variants.items()
        }

    def chosen_lambda(self, name: str, save: bool = False) -> float | None:
        """Return the variant's λ, None where there is none to choose; `save` keeps a new choice.

        Raises NotChosen while what it rests on has not been run, and if that failed.
        """
        if not self.lmbdas(name):
            return None
        choice = self.saved_choice(name)
        if choice is None or tuple(choice.candidates) != self.lmbdas(name):
            choice = self._choose(name)
            if save:
                save_json(asdict(choice), self.choice_path(name))
                self.records.add(self.choice_path(name))
        return choice.lmbda

    def _choose(self, name: str) -> Choice:
        """Return the choice of the variant's λ among the candidates that did not fail."""
        jobs = self.tuning(name)
        if not all(job.done or job.blocked(self.failed) for job in jobs.values()):
            raise NotChosen(f"{name}: λ is not chosen yet")
        accuracies = {
            lmbda: HoldoutAccuracy.load(self.records, job.target) if job.done else None
            for lmbda, job in jobs.items()
        }
        control = accuracies.pop(None)
        valid = {lmbda: accuracy for lmbda, accuracy in accuracies.items() if accuracy}
        if not control or not valid:
            raise NotChosen(f"{name}: no λ to choose from: the control or all candidates failed")
        return Choice(control, accuracies, select_lambda(valid, control.full))

    def warn_failed_candidates(self, name: str) -> None:
        """Print which candidates the variant's λ was chosen without."""
        choice = self.saved_choice(name)
        path = self.choice_path(name)
        again = self.forget_flags([self.records.key(path)])
        for lmbda, accuracies in choice.candidates.items() if choice else ():
            if not accuracies:
                tqdm.write(
                    f"{name}: λ = {lambda_text(lmbda)} failed and is left out; to try it again, "
                    f"remove {path} with {again}"
                )

    def forget_flags(self, patterns: Iterable[str]) -> str:
        """Return the flags that forget such records of this network, and of no other."""
        of_network = ["--models", self.network] if self.network else []
        return shlex.join([*of_network, "--forget", *patterns])

    # --- all jobs of a variant ---

    def final(self, name: str, seeds: Iterable[int], lmbda: float | None) -> list[Job]:
        """Return the quantizations of the variant on the test set: what the tables are made of."""
        branches = [self.branch(name, seed, lmbda) for seed in seeds]
        return [job for branch in branches for job in self.final_quantized(branch).values()]

    def final_quantized(self, trained: Job) -> dict[str, Job]:
        """Return the quantizations of a trained network on the test set, by their names."""
        return {name: self.quantized(trained, name) for name in self.final_quantizations}

    def completes_network(self, job: Job) -> bool:
        """Return whether the job that has just succeeded was a network's last one."""
        trained = job.needs[0] if job.needs else job
        finals = self.final_quantized(trained).values()
        return job.target in {each.target for each in finals} and all(each.done for each in finals)

    def next_jobs(
        self, name: str, seeds: Iterable[int], save: bool = False
    ) -> tuple[list[Job], bool]:
        """Return the variant's final jobs and True; its tuning jobs, False before λ is chosen."""
        try:
            return self.final(name, seeds, self.chosen_lambda(name, save)), True
        except NotChosen:
            return list(self.tuning(name).values()), False

    def planned(self, name: str, seeds: Iterable[int]) -> tuple[list[Job], bool]:
        """Return the variant's jobs, and whether its λ is known; else the first one stands in."""
        jobs, is_chosen = self.next_jobs(name, seeds)
        if not is_chosen:
            jobs += self.final(name, seeds, self.lmbdas(name)[0])
        return jobs, is_chosen

    def next_job(
        self, names: Sequence[str], seeds: Sequence[int], started: Set[Path]
    ) -> Job | None:
        """Return the first job that can start now, or None: first those that λ is chosen by."""
        variants = (self.next_jobs(name, seeds, save=True)[0] for name in names)
        ready = (study_jobs.next_ready_job(jobs, started) for jobs in variants)
        return next(filter(None, ready), None)


def network_flags(network: str) -> list[str]:
    """Return the flags of NAME or NAME@WIDTH, as --models names a network; "": none."""
    name, at, width = network.rpartition("@")
    if not at:
        return ["--model", network] if network else []
    return ["--model", name, "--width", width]
