"""Run the study: every regularizer with every seed, quantized, as tables and plots.

The first two thirds of a run are without a penalty and the same for every variant of a seed: they
are trained once, and each variant goes on from that checkpoint (--init_from), bit for bit as if it
had trained them itself. λ is chosen once per variant on held-out training images, see `choose`;
the test set is looked at only afterwards. What is done is skipped; what was killed goes on.
"""

import argparse
import json
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import quant_inference
import train
from analysis import study_figures, study_jobs, study_results, study_tables
from analysis.study_jobs import Job, pending
from engine.cli import Parser, bounded_number, choice_ignoring_case, refuse_unused_flags
from engine.errors import FileError
from engine.io import read_json, run_lock, save_json, warn_on_error

# --- the grid --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What is done in the last third of a run."""

    flags: str  # of train.py, or, where they say --phases (with {lmbda}), of combined_protocol.py
    lmbdas: tuple[float, ...] = ()  # to choose from; () where the flags say it all
    cost: float = 1.0  # of an epoch, in epochs of the control: for estimates before the first one
    lambda_from: str = ""  # the variant whose λ this one takes over


SECOND_ORDER = 3.3
# In the order of the tables; they run in the order in which --only names them. Of the two λ of a
# gradient penalty the first makes λ·R 0.5 to 0.8 where regularization begins, in evaluation mode,
# the second about three times that, which often costs more accuracy than MAX_LOSS allows (_frozen:
# a third of both does, so that a tenth is tried, too).
# _frozen: batch norms keep their statistics, and penalties are of the network as it is used.
VARIANTS = {
    "control": Variant("--regularizer none"),
    "control_frozen": Variant("--regularizer none --freeze_bn_from {first}"),
    "l1grad": Variant("--regularizer L1Grad", (1.5e-4, 5e-4), SECOND_ORDER),
    "l1grad_weights": Variant(
        "--regularizer L1Grad --no_activation_gradients", cost=SECOND_ORDER, lambda_from="l1grad"
    ),
    "l2grad": Variant("--regularizer L2Grad", (0.03, 0.1), SECOND_ORDER),
    "l2grad_weights": Variant(
        "--regularizer L2Grad --no_activation_gradients", cost=SECOND_ORDER, lambda_from="l2grad"
    ),
    "l2grad_frozen": Variant(
        "--regularizer L2Grad --freeze_bn_from {first}", (0.003, 0.01, 0.03), SECOND_ORDER
    ),
    "linfgrad": Variant("--regularizer LinfGrad", (0.15, 0.5), SECOND_ORDER),
    "stepl1grad": Variant("--regularizer StepL1Grad", (0.015, 0.05), SECOND_ORDER),
    "stepl1grad_held": Variant(
        "--regularizer StepL1Grad --hold_step", cost=SECOND_ORDER, lambda_from="stepl1grad"
    ),
    "stepl2grad": Variant("--regularizer StepL2Grad", (6.0, 20.0), SECOND_ORDER),
    "stepl2grad_held": Variant(
        "--regularizer StepL2Grad --hold_step", cost=SECOND_ORDER, lambda_from="stepl2grad"
    ),
    "stepnoise": Variant("--regularizer StepNoise", (0.3, 1.0, 3.0), 2.1),
    "stepnoise_frozen": Variant(
        "--regularizer StepNoise --freeze_bn_from {first}", (0.3, 1.0), 2.1
    ),
    "variancenorm": Variant("--regularizer VarianceNorm", (1.25, 5.0, 20.0)),
    "stddevnorm": Variant("--regularizer StdDevNorm", (1.0, 4.0, 16.0)),
    "inversevariancenorm": Variant("--regularizer InverseVarianceNorm", (3e-5, 3e-4, 3e-3)),
    "inversestddevnorm": Variant("--regularizer InverseStdDevNorm", (0.003, 0.03, 0.3)),
    "combined": Variant(
        "--phases 0:none {first}:VarianceNorm=1.25 {late}:VarianceNorm=1.25+L2Grad@weights=0.05",
        cost=(1 + 2 * SECOND_ORDER) / 3,
    ),
    "rangenorm": Variant("--regularizer RangeNorm", (0.03, 0.1, 0.3, 1.0)),
    "rangenorm_folded": Variant("--regularizer RangeNorm --fold_bn", (0.03, 0.1, 0.3)),
    "kurtosisnorm": Variant("--regularizer KurtosisNorm", (0.01, 0.1, 1.0, 10.0)),
    "kurtosisnorm_folded": Variant("--regularizer KurtosisNorm --fold_bn", (0.01, 0.1, 1.0, 10.0)),
}
# The learning rate is 0.1 before regularization, a tenth of that with it, a hundredth at the end.
TRAINING = (
    "--lr 0.1 --scheduler multistep --gamma 0.1 --milestones {first},{last} --no_test_penalty "
    "--track L1Grad L2Grad VarianceNorm KurtosisNorm RangeNorm StepL1Grad StepL2Grad StepNoise"
)
QUANTIZATIONS = {  # flags of quant_inference.py
    "tuning": "--bits 4 --schemes uniform",
    "weights": "--bits 2 3 4 5 6 7 8 --schemes uniform dorefa pwlq --trials 1 --precision bf16",
    "recalibrated": "--bits 2 3 4 --schemes uniform --bn_images 4000 --precision bf16",
    "folded": "--bits 4 6 8 --schemes uniform pwlq --fold_bn --act_bits same",
    "corrected": "--bits 2 3 4 --schemes uniform --mean_correction --precision bf16",
    "corrected_folded": "--bits 4 --schemes uniform pwlq --mean_correction --fold_bn "
    "--act_bits same --calibration percentile",
}
FINAL = ("weights", "recalibrated", "folded", "corrected", "corrected_folded")  # on the test set
TUNING_SEED = 0
MAX_ACCURACY_DROP = 0.01  # of full-precision accuracy, on held-out images

EPOCH_SECONDS = 60.0  # of the control on 2 cores in bfloat16, until one is measured
QUANTIZATION_SECONDS = {
    "tuning": 20.0,
    "weights": 40.0,
    "recalibrated": 20.0,
    "folded": 60.0,
    "corrected": 8.0,
    "corrected_folded": 12.0,
}


def tuned_name(name: str) -> str:
    """Return the variant whose λ this one has: itself, or the one it takes it over from."""
    return VARIANTS[name].lambda_from or name


def select_lambda(candidates: Mapping[float, tuple[float, float]], control: float) -> float:
    """Return the λ to use, given each λ's (full-precision, 4-bit uniform) held-out accuracy.

    The best 4-bit accuracy among those that lose less than MAX_LOSS of the control's full-precision
    accuracy; the best full-precision accuracy where all lose more. Of equal ones the smallest λ.
    """
    kept = {
        lmbda: a for lmbda, a in candidates.items() if control - a[0] < MAX_ACCURACY_DROP - 1e-9
    }
    column = 1 if kept else 0
    return max(kept or candidates, key=lambda lmbda: (candidates[lmbda][column], -lmbda))


class NotChosen(Exception):
    """A variant's λ is not known yet, or cannot be; the message is one line."""


# --- the jobs --------------------------------------------------------------------------------


def epoch_names(n_epochs: int) -> dict[str, int]:
    """Return the epochs that flags name: the first regularized one, and later ones."""
    n_regularized = n_epochs // 3
    first = n_epochs - n_regularized
    late, last = first + n_regularized // 2, first + n_regularized * 2 // 3
    return {"first": first, "late": late, "last": last}


class StudyPlan:
    """The jobs of the study in the folder `out`, from VARIANTS and the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Take the folder, the length of the runs, and further flags for the scripts."""
        self.out, self.n_epochs = Path(args.out), args.n_epochs
        self.epochs = epoch_names(args.n_epochs)
        self.first = self.epochs["first"]
        self.holdout = args.holdout
        self.data_flags = shlex.split(args.data_flags)
        training = args.TRAINING.format(**self.epochs) + " " + args.train_flags
        self.training = [*shlex.split(training), *self.data_flags]
        self.measured = {} if args.epoch_seconds else study_jobs.job_seconds(self.out)
        trunk = self.measured.get("trunk", 0) / self.first
        self.epoch_seconds = args.epoch_seconds or trunk or EPOCH_SECONDS
        self.failed: set[Path] = set()  # targets, since this program was started

    def trunk(self, seed: int, tuning: bool) -> Job:
        """Return the training that all variants of a seed have in common."""
        flags = ["--n_epochs", str(self.first)]
        return self._training("train.py", "trunk", "trunk", flags, seed, tuning, self.first)

    def branch(self, name: str, seed: int, lmbda: float | None, tuning: bool = False) -> Job:
        """Return the last third of a variant's run; λ is None where there is none to choose."""
        variant, trunk = VARIANTS[name], self.trunk(seed, tuning)
        flags = variant.flags.format(**self.epochs, lmbda=f"{lmbda or 0:g}").split()
        script = "combined_protocol.py" if "--phases" in flags else "train.py"
        if lmbda is not None and script == "train.py":
            flags += ["--lmbda", f"{lmbda:g}", "--first_regularized_epoch", str(self.first)]
        flags += ["--n_epochs", str(self.n_epochs), "--init_from", f"{self._stem(trunk)}.ckpt"]
        stem = name if lmbda is None else f"{name}_{lmbda:g}"
        cost = variant.cost * (self.n_epochs - self.first)
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
        """Return the job of a training that costs that many epochs of the control."""
        folder = self.out / ("tuning" if tuning else f"seed{seed}")
        held = ["--holdout", str(self.holdout)] if tuning else []
        command = (  # of a flag that is given twice the last one counts
            script,
            *self.training,
            "--run_name",
            f"study_{folder.name}_{stem}",
            "--save_file",
            str(folder / stem),
            "--resume",
            "--seed",
            str(seed),
            *flags,
            *held,
        )
        targets = (folder / f"{stem}.pt",)
        if not needs:  # others go on from its checkpoint
            targets += (folder / f"{stem}.ckpt",)
        seconds = self.measured.get(kind, cost * self.epoch_seconds)
        return Job(kind, targets, command, seconds, needs)

    def quantized(self, trained: Job, how: str) -> Job:
        """Return the quantization of what was trained, in one of the QUANTIZATIONS."""
        folder = Path(f"{self._stem(trained)}_{how}")
        held = ["--holdout", str(self.holdout)] if how == "tuning" else []
        flags = [*self.data_flags, *QUANTIZATIONS[how].split(), *held]
        command = (
            "quant_inference.py",
            str(trained.target),
            *flags,
            "--no_plots",
            "--output",
            str(folder),
        )
        seconds = self.measured.get(f"quantize {how}", QUANTIZATION_SECONDS[how])
        return Job(f"quantize {how}", (folder / "results.json",), command, seconds, (trained,))

    @staticmethod
    def _stem(trained: Job) -> str:
        return str(trained.target.with_suffix(""))

    def tuning(self, name: str) -> dict[float | None, Job]:
        """Return the jobs that the choice of the variant's λ rests on: the control's under None."""
        name = tuned_name(name)
        lmbdas = VARIANTS[name].lmbdas
        if not lmbdas:
            return {}
        tried = {None: ("control", None), **{lmbda: (name, lmbda) for lmbda in lmbdas}}
        return {
            key: self.quantized(self.branch(of, TUNING_SEED, lmbda, tuning=True), "tuning")
            for key, (of, lmbda) in tried.items()
        }

    def saved_choice(self, name: str) -> study_results.Choice | None:
        """Return the choice of the variant's λ that was made last, or None; raises FileError."""
        path = self._choice_path(name)
        return study_results.Choice.load(path) if path.exists() else None

    def _choice_path(self, name: str) -> Path:
        return self.out / "tuning" / f"{tuned_name(name)}_choice.json"

    def choice(self, name: str, keep: bool = False) -> study_results.Choice | None:
        """Return what λ was chosen from, and which; `keep` saves it, and it is not made again.

        None where there is nothing to choose. Raises NotChosen before all that it rests on has
        been run, and where that failed. A failed candidate is left out, for good once it is saved.
        """
        jobs = self.tuning(name)
        if not jobs:
            return None
        kept = self.saved_choice(name)
        if kept and list(kept.candidates) == [lmbda for lmbda in jobs if lmbda is not None]:
            return kept
        if not all(job.done or job.blocked(self.failed) for job in jobs.values()):
            raise NotChosen(f"{name}: λ is not chosen yet")
        found = {
            key: read_holdout_accuracy(job.target) if job.done else None
            for key, job in jobs.items()
        }
        control = found.pop(None)
        whole = {lmbda: accuracies for lmbda, accuracies in found.items() if accuracies}
        if not control or not whole:
            raise NotChosen(f"{name}: no λ to choose from: the control or all candidates failed")
        made = study_results.Choice(control, found, select_lambda(whole, control[0]))
        if keep:
            made.save(self._choice_path(name))
        return made

    def warn_failed_candidates(self, name: str) -> None:
        """Print which candidates the variant's λ was chosen without."""
        choice = self.saved_choice(name)
        for lmbda, accuracies in choice.candidates.items() if choice else ():
            if not accuracies:
                tqdm.write(
                    f"{name}: λ = {lmbda:g} failed and is left out; to try it again, remove "
                    f"{self._choice_path(name)}"
                )

    def chosen(self, name: str, keep: bool = False) -> float | None:
        """Return the variant's λ, None where there is none to choose; may raise NotChosen."""
        choice = self.choice(name, keep)
        return choice.lmbda if choice else None

    def final(self, name: str, seeds: Iterable[int], lmbda: float | None) -> list[Job]:
        """Return the quantizations of the variant on the test set: what the tables are made of."""
        branches = [self.branch(name, seed, lmbda) for seed in seeds]
        return [self.quantized(branch, how) for branch in branches for how in FINAL]

    def planned(self, name: str, seeds: Iterable[int]) -> tuple[list[Job], bool]:
        """Return the variant's jobs, and whether its λ is known; else its first one stands in."""
        try:
            return self.final(name, seeds, self.chosen(name)), True
        except NotChosen:
            lmbda = VARIANTS[tuned_name(name)].lmbdas[0]
            return [*self.tuning(name).values(), *self.final(name, seeds, lmbda)], False

    def next_job(
        self, names: Sequence[str], seeds: Sequence[int], started: Set[Path]
    ) -> Job | None:
        """Return the first job that can be started now: those that λ rests on, then the final."""
        for name in names:
            try:
                jobs = self.final(name, seeds, self.chosen(name, keep=True))
            except NotChosen:
                jobs = self.tuning(name).values()
            if job := study_jobs.next_ready_job(jobs, started):
                return job
        return None


def read_holdout_accuracy(path: Path) -> tuple[float, float]:
    """Return the full-precision and the 4-bit uniform accuracy of a result; raises FileError."""
    with read_json(path) as results:
        accuracy = {row["bits"]: row["accuracy"] for row in results["rows"]}
        return accuracy[32], accuracy[4]


# --- what is done with them ------------------------------------------------------------------


def run_all(grid: StudyPlan, names: Sequence[str], seeds: Sequence[int], at_once: int) -> bool:
    """Run every variant, renew the tables as results come, and return whether all succeeded."""
    jobs = [job for name in names for job in grid.planned(name, seeds)[0]]
    total = sum(job.seconds for job in pending(jobs))

    def renew_after(job: Job) -> None:
        if job.kind.split()[-1] in FINAL:
            with warn_on_error("tables and plots were not renewed"):
                update_report(grid)

    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"
    with tqdm(total=total, bar_format=form, disable=None) as bar:
        study_jobs.run(
            lambda started: grid.next_job(names, seeds, started),
            at_once,
            grid.out,
            grid.failed,
            bar,
            renew_after,
        )
    update_report(grid)
    complete = not grid.failed
    for name in names:
        try:
            left = pending(grid.final(name, seeds, grid.chosen(name)))
        except NotChosen as error:
            tqdm.write(str(error))
            complete = False
            continue
        for job in left:
            tqdm.write(f"not run, for it needs what failed: {job.title}")
        grid.warn_failed_candidates(name)
    return complete


def update_report(grid: StudyPlan) -> bool:
    """Write tables and plots of what there is; return whether there is anything.

    Of each variant with the λ that was chosen last. Raises FileError and OSError.
    """
    results, choices = [], {}
    for name, variant in VARIANTS.items():
        has_choice = bool(VARIANTS[tuned_name(name)].lmbdas)
        choice = grid.saved_choice(name) if has_choice else None
        if choice and not variant.lambda_from:
            choices[name] = choice
        if choice or not has_choice:
            results += finished(grid, name, choice.lmbda if choice else None)
    if results:
        rows, tracked = study_results.read(results)
        study_tables.write(grid.out, results, rows, tracked, choices)
        study_figures.draw(grid.out, rows, tracked, choices, grid.first)
    return bool(results)


def finished(grid: StudyPlan, name: str, lmbda: float | None) -> Iterator[study_results.Result]:
    """Yield every final result there is of a variant, of all seeds."""
    folders = [re.fullmatch("seed(0|[1-9][0-9]*)", path.name) for path in grid.out.glob("seed*")]
    for seed in sorted(int(match[1]) for match in folders if match):
        branch = grid.branch(name, seed, lmbda)
        jobs = {how: grid.quantized(branch, how) for how in FINAL}
        if all(job.done for job in jobs.values()):
            yield study_results.Result(
                name,
                lmbda,
                seed,
                branch.target.with_suffix(".json"),
                {how: job.target for how, job in jobs.items()},
                [
                    f"mkdir -p {branch.target.parent}",
                    *(
                        reproduction_command(job.target.with_suffix(".json"))
                        for job in (*branch.needs, branch, *jobs.values())
                    ),
                ],
                grid.first,
            )


def reproduction_command(path: Path) -> str:
    """Return the command of a training's record or of a results.json; raises FileError.

    With its number of threads: sums are taken in that order.
    """
    with read_json(path) as record:
        ran = record["settings"] | record  # a results.json has them among its settings
        threads, command = ran["machine"]["threads"], shlex.join(ran["command"])
    return f"OMP_NUM_THREADS={threads} python {command}"


def plan(grid: StudyPlan, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Print what would run, and how long that would take."""
    seen: dict[Path, Job] = {}
    for name in names:
        jobs, known = grid.planned(name, seeds)
        todo = [job for job in pending(jobs) if job.target not in seen]
        seen |= {job.target: job for job in todo}
        note = "" if known else "; the final ones with the λ that is chosen then"
        print(f"{name}: {len(todo)} jobs, {duration(sum(job.seconds for job in todo))}{note}")
        for job in todo:
            print(f"  {duration(job.seconds)}  {job.line}")
    total = duration(sum(job.seconds for job in seen.values()))
    how = f"{grid.epoch_seconds:.0f} s an epoch of the control, on all cores"
    print(f"in all {len(seen)} jobs, about {total}, with {how}")


def duration(seconds: float) -> str:
    """Return the time as hours and minutes."""
    return f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f} h"


# --- the script ------------------------------------------------------------------------------

# What a study is: the same for all of a folder. Each with its default; TRAINING is no flag.
SETTINGS = {
    "n_epochs": 9,
    "holdout": 5000,
    "train_flags": "",
    "data_flags": "",
    "TRAINING": TRAINING,
}
# Flags that --data_flags may give, and those that --train_flags may not, for the study gives them.
DATA_FLAGS = {"dataset", "data_dir", "device", "model"}
RESERVED_FLAGS = {
    "run_name",
    "save_file",
    "resume",
    "init_from",
    "override",
    "seed",
    "n_epochs",
    "holdout",
    "regularizer",
    "lmbda",
    "first_regularized_epoch",
    "no_activation_gradients",
    "freeze_bn_from",
    "save_preregularized_model",
    "lmbda_warmup",
    "fold_bn",
    "hold_step",
}


def make_parser() -> Parser:
    """Make the parser of study.py."""
    parser = Parser("Run the study: variants × seeds, as tables and plots; see VARIANTS.")
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--plan", action="store_true", help="print what would run and how long it takes; run none"
    )
    mode.add_argument(
        "--tables", action="store_true", help="only renew tables and plots from what there is"
    )
    add(
        "--only",
        type=choice_ignoring_case(VARIANTS),
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help="variants",
    )
    add("--seeds", type=bounded_number(int, at_least=0), nargs="+", default=[0, 1, 2], help="seeds")
    add(
        "--jobs",
        type=bounded_number(int, at_least=1),
        default=1,
        help="at once; they share the cores, and the times of one tell little while others run",
    )
    add("--out", default="results/study", help="folder of everything that is written")
    add(
        "--epoch_seconds",
        type=bounded_number(float, above=0),
        help="of the control on all cores, for --plan; None: as measured",
    )
    group = parser.add_argument_group("what the study is: set by the first run in --out")
    add = group.add_argument
    add(
        "--n_epochs",
        type=bounded_number(int, at_least=6),
        help="of which a third is regularized, the last",
    )
    add("--holdout", type=bounded_number(int, at_least=1), help="images for λ")
    add(
        "--train_flags", type=shell_words, help="of every training, as in --train_flags='--lr 0.05'"
    )
    add(
        "--data_flags",
        type=shell_words,
        help="of every training and quantization, as in --data_flags='--device cuda'",
    )
    return parser


def shell_words(text: str) -> str:
    """Return text that a shell could split into flags: an argparse type."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return text


def resolve_settings(parser: Parser, args: argparse.Namespace) -> dict[str, object]:
    """Fill in what the study in --out is, or the defaults of a new one, and return that.

    Ends with one line where a flag contradicts it: runs of other lengths are another study.
    """
    kept = load_settings(Path(args.out) / "study.json")
    for name, default in SETTINGS.items():
        given = getattr(args, name, None)
        if kept and given is not None and given != kept[name]:
            parser.error(
                f"--{name} {given}: the study in {args.out} has {kept[name]!r}: choose "
                "another --out"
            )
        setattr(args, name, kept[name] if kept else default if given is None else given)
    if args.TRAINING != TRAINING:
        print(f"{args.out} goes on with the flags that it was begun with: {args.TRAINING}")
    check_flags(parser, args)
    return {name: getattr(args, name) for name in SETTINGS}


def load_settings(path: Path) -> dict[str, object] | None:
    """Return what a study.json holds, None where there is none; ends with one line if it is bad."""
    checker = make_parser()
    checker.prog += f": {path}"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        checker.error(str(error))
    if not isinstance(kept, dict) or kept.keys() != SETTINGS.keys():
        checker.error(f"these are not the settings of a study: {', '.join(SETTINGS)}")
    try:
        shlex.split(kept["TRAINING"].format(**epoch_names(6)))
    except (LookupError, ValueError, AttributeError) as error:
        checker.error(f"TRAINING cannot be {kept['TRAINING']!r}: {error!r}")
    flags = [f"--{name}={value}" for name, value in kept.items() if name != "TRAINING"]
    parsed = {**kept, **vars(checker.parse_args(flags))}
    for name, default in SETTINGS.items():
        if parsed[name] != kept[name] or type(kept[name]) is not type(default):
            checker.error(f"{name} cannot be {kept[name]!r}")
    return kept


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """End the program where --train_flags or --data_flags hold what they should not."""
    data_flags, train_flags = shlex.split(args.data_flags), shlex.split(args.train_flags)
    of_training, of_quantization = train.make_parser(), quant_inference.make_parser()
    of_quantization.parse_args(["weights.pt", *data_flags])  # they end it where there is no such
    refused = {
        "data": flags_in(of_training, data_flags) - DATA_FLAGS,
        "train": flags_in(of_training, train_flags) & (RESERVED_FLAGS | DATA_FLAGS),
    }
    for kind, names in refused.items():
        if names:
            parser.error(f"--{kind}_flags: --{sorted(names)[0]} is not for it to say")


def flags_in(parser: Parser, words: Sequence[str]) -> set[str]:
    """Return the names of the flags that the words give."""
    parser.parse_args(words)
    return parser.explicit_flags


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, run or tabulate; exit with 1 if a job failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_unused_flags(
        parser,
        (
            *((flag, "something to run", not args.tables) for flag in ("only", "seeds", "jobs")),
            ("epoch_seconds", "--plan", args.plan),
        ),
    )
    settings = resolve_settings(parser, args)
    grid = StudyPlan(args)
    try:
        if args.plan:
            return plan(grid, args.only, args.seeds)
        if args.tables:
            if not update_report(grid):
                parser.exit_with(1, f"error: there are no results in {grid.out} yet")
            return None
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        grid.out.mkdir(parents=True, exist_ok=True)
        with run_lock(grid.out / "study", instead="another --out"):
            save_json(settings, grid.out / "study.json")
            complete = run_all(grid, args.only, args.seeds, args.jobs)
    except (FileError, OSError) as error:
        parser.exit_with(1, f"error: {error}")
    except KeyboardInterrupt:
        parser.exit_with(130, "stopped")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
