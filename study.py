"""Run the study: every regularizer with every seed, quantized, as tables and plots.

The first two thirds of a run are without a penalty and the same for every variant of a seed: they
are trained once, and each variant goes on from that checkpoint (--init_from), bit for bit as if it
had trained them itself. λ is chosen once per variant on held-out training images, see `choose`;
the test set is looked at only afterwards. What is done is skipped; what was killed goes on.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import study_plots
import study_tables
import utils

# --- the grid --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What is done in the last third of a run."""

    flags: str  # of train.py, or, where they say --phases, of combined_protocol.py
    lmbdas: tuple[float, ...] = ()  # to choose from; () where the flags say it all
    cost: float = 1.0  # of an epoch, in epochs of the control: for estimates before the first one
    tuned_as: str = ""  # the variant whose λ this one takes over


SECOND_ORDER = 3.3
# In the order in which they run: the questions that matter most come first. The three λ of a
# gradient penalty make it about 0.3, 1 and 3 in the control, so that all choose from equal ranges.
VARIANTS = {
    "control": Variant("--regularizer none"),
    "l2grad": Variant("--regularizer L2Grad", (0.02, 0.06, 0.2), SECOND_ORDER),
    "l1grad": Variant("--regularizer L1Grad", (1e-4, 3e-4, 1e-3), SECOND_ORDER),
    "stepnoise": Variant("--regularizer StepNoise", (0.3, 1.0, 3.0), 2.1),
    "variancenorm": Variant("--regularizer VarianceNorm", (1.25, 5.0, 20.0)),
    "stepl2grad": Variant("--regularizer StepL2Grad", (4.0, 12.0, 40.0), SECOND_ORDER),
    "stepl1grad": Variant("--regularizer StepL1Grad", (0.01, 0.03, 0.1), SECOND_ORDER),
    "rangenorm": Variant("--regularizer RangeNorm", (0.01, 0.03, 0.1)),
    "kurtosisnorm": Variant("--regularizer KurtosisNorm", (0.003, 0.03, 0.3)),
    "combined": Variant(
        "--phases 0:none {first}:VarianceNorm=1.25 {late}:VarianceNorm=1.25+L2Grad@weights=0.05",
        cost=(1 + SECOND_ORDER) / 2,
    ),
    "stddevnorm": Variant("--regularizer StdDevNorm", (1.0, 4.0, 16.0)),
    "inversevariancenorm": Variant("--regularizer InverseVarianceNorm", (3e-5, 3e-4, 3e-3)),
    "inversestddevnorm": Variant("--regularizer InverseStdDevNorm", (0.003, 0.03, 0.3)),
    "stepl2grad_held": Variant(
        "--regularizer StepL2Grad --hold_step", cost=SECOND_ORDER, tuned_as="stepl2grad"
    ),
    "stepl1grad_held": Variant(
        "--regularizer StepL1Grad --hold_step", cost=SECOND_ORDER, tuned_as="stepl1grad"
    ),
    "l2grad_weights": Variant(
        "--regularizer L2Grad --no_activation_gradients", cost=SECOND_ORDER, tuned_as="l2grad"
    ),
    "l1grad_weights": Variant(
        "--regularizer L1Grad --no_activation_gradients", cost=SECOND_ORDER, tuned_as="l1grad"
    ),
    "linfgrad": Variant("--regularizer LinfGrad", (0.1, 0.3, 1.0), SECOND_ORDER),
}
TRAINING = (
    "--lr 0.1 --scheduler exponential --gamma 0.75 --no_test_penalty "
    "--track L1Grad L2Grad VarianceNorm KurtosisNorm RangeNorm StepL1Grad StepL2Grad StepNoise"
)
QUANTIZATIONS = {  # flags of quant_inference.py
    "tuning": "--bits 4 --schemes uniform",
    "weights": "--bits 2 3 4 5 6 7 8 --schemes uniform dorefa pwlq --trials 1 --precision bf16",
    "folded": "--bits 4 6 8 --schemes uniform pwlq --fold_bn --act_bits same",
}
TUNING_SEED = 0
HOLDOUT = 5000  # training images that λ is chosen on
MAX_LOSS = 0.01  # of full-precision accuracy, there

EPOCH_SECONDS = 60.0  # of the control on 2 cores in bfloat16, until one is measured
QUANTIZATION_SECONDS = {"tuning": 20.0, "weights": 120.0, "folded": 60.0}


def choose(candidates: Mapping[float, tuple[float, float]], control: float) -> float:
    """Return the λ to use, given each λ's (full-precision, 4-bit uniform) held-out accuracy.

    The best 4-bit accuracy among those that lose less than MAX_LOSS of the control's full-precision
    accuracy; the best full-precision accuracy where all lose more. Of equal ones the smallest λ.
    """
    kept = {lmbda: a for lmbda, a in candidates.items() if a[0] > control - MAX_LOSS}
    column = 1 if kept else 0
    return max(kept or candidates, key=lambda lmbda: (candidates[lmbda][column], -lmbda))


# --- jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A command and the file that is there when it is done."""

    kind: str  # jobs of one kind take about as long
    target: Path
    command: tuple[str, ...]  # a script of this project and its flags
    seconds: float  # estimated
    needs: tuple["Job", ...] = ()

    @property
    def line(self) -> str:
        """The command as one can paste it."""
        return "python " + shlex.join(self.command)

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        return self.target.parent.name + "/" + self.target.stem


def pending(jobs: Iterable[Job]) -> list[Job]:
    """Return what is to be run, in order: nothing that is done, nor what only that needed."""
    found: dict[Path, Job] = {}
    for job in jobs:
        if not job.target.exists():
            found |= {needed.target: needed for needed in pending(job.needs)}
            found[job.target] = job
    return list(found.values())


class Grid:
    """The jobs of the study in the folder `out`, from VARIANTS and the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Take the folder, the length of the runs, and further flags for the scripts."""
        self.out, self.n_epochs = Path(args.out), args.n_epochs
        self.first = args.n_epochs - args.n_epochs // 3
        self.holdout = args.holdout
        self.data_flags = shlex.split(args.data_flags)
        self.training = [*shlex.split(TRAINING + " " + args.train_flags), *self.data_flags]
        self.measured = study_tables.job_seconds(self.out)
        self.epoch_seconds = args.epoch_seconds or self.measured.get("trunk", 0) / self.first
        self.failed: set[Path] = set()

    def trunk(self, seed: int, tuning: bool) -> Job:
        """Return the training that all variants of a seed have in common."""
        flags = ["--n_epochs", str(self.first)]
        return self._training("train.py", "trunk", "trunk", flags, seed, tuning, self.first)

    def branch(self, name: str, seed: int, lmbda: float | None, tuning: bool = False) -> Job:
        """Return the last third of a variant's run; λ is None where there is none to choose."""
        variant, trunk = VARIANTS[name], self.trunk(seed, tuning)
        late = self.first + (self.n_epochs - self.first) // 2
        flags = variant.flags.format(first=self.first, late=late).split()
        script = "combined_protocol.py" if "--phases" in flags else "train.py"
        if lmbda is not None:
            flags += ["--lmbda", f"{lmbda:g}", "--first_regularized_epoch", str(self.first)]
        flags += ["--n_epochs", str(self.n_epochs), "--init_from", f"{self._stem(trunk)}.ckpt"]
        stem = name if lmbda is None else f"{name}_{lmbda:g}"
        cost = variant.cost * (self.n_epochs - self.first)
        return self._training(script, name, stem, flags, seed, tuning, cost, (trunk,))

    def _training(
        self, script: str, kind: str, stem: str, flags: Sequence[str], seed: int, tuning: bool,
        cost: float, needs: tuple[Job, ...] = (),
    ) -> Job:
        """Return the job of a training that costs that many epochs of the control."""
        folder = self.out / ("tuning" if tuning else f"seed{seed}")
        held = ["--holdout", str(self.holdout)] if tuning else []
        command = (
            script, "--run_name", f"study_{folder.name}_{stem}", "--save_file",
            str(folder / stem), "--resume", "--seed", str(seed), *flags, *held, *self.training,
        )
        seconds = self.measured.get(kind, cost * (self.epoch_seconds or EPOCH_SECONDS))
        return Job(kind, folder / f"{stem}.pt", command, seconds, needs)

    def quantized(self, trained: Job, how: str) -> Job:
        """Return the quantization of what was trained, in one of the QUANTIZATIONS."""
        folder = Path(f"{self._stem(trained)}_{how}")
        held = ["--holdout", str(self.holdout)] if how == "tuning" else []
        flags = [*QUANTIZATIONS[how].split(), *held, *self.data_flags]
        command = ("quant_inference.py", str(trained.target), *flags, "--output", str(folder))
        seconds = self.measured.get(f"quantize {how}", QUANTIZATION_SECONDS[how])
        return Job(f"quantize {how}", folder / "results.json", command, seconds, (trained,))

    @staticmethod
    def _stem(trained: Job) -> str:
        return str(trained.target.with_suffix(""))

    def tuning(self, name: str) -> dict[float | None, Job]:
        """Return the jobs that the choice of the variant's λ rests on: the control's under None."""
        name = VARIANTS[name].tuned_as or name
        lmbdas = VARIANTS[name].lmbdas
        if not lmbdas:
            return {}
        tried = {None: ("control", None), **{lmbda: (name, lmbda) for lmbda in lmbdas}}
        return {
            key: self.quantized(self.branch(of, TUNING_SEED, lmbda, tuning=True), "tuning")
            for key, (of, lmbda) in tried.items()
        }

    def chosen(self, name: str) -> float | None:
        """Return the variant's λ; LookupError before all that the choice rests on has been run."""
        jobs = self.tuning(name)
        if not jobs:
            return None
        if not all(job.target.exists() or job.target in self.failed for job in jobs.values()):
            raise LookupError(f"{name}: λ is not chosen yet")
        found = {key: held_out(job.target) for key, job in jobs.items() if job.target.exists()}
        control = found.pop(None, None)
        if not control or not found:
            raise LookupError(f"{name}: no λ to choose from: the control or all candidates failed")
        return choose(found, control[0])

    def final(self, name: str, seeds: Iterable[int], lmbda: float | None) -> list[Job]:
        """Return the quantizations of the variant on the test set: what the tables are made of."""
        branches = [self.branch(name, seed, lmbda) for seed in seeds]
        return [self.quantized(branch, how) for branch in branches for how in ("weights", "folded")]

    def planned(self, name: str, seeds: Iterable[int]) -> tuple[list[Job], bool]:
        """Return the variant's jobs, and whether its λ is known; else its first one stands in."""
        tuning = list(self.tuning(name).values())
        try:
            lmbda, known = self.chosen(name), True
        except LookupError:
            lmbda, known = VARIANTS[VARIANTS[name].tuned_as or name].lmbdas[0], False
        return tuning + self.final(name, seeds, lmbda), known


def held_out(path: Path) -> tuple[float, float]:
    """Return the full-precision and the 4-bit uniform accuracy of a tuning result."""
    rows = json.loads(path.read_text())["rows"]
    return tuple(row["accuracy"] for row in rows if row["bits"] in (32, 4))


# --- running ---------------------------------------------------------------------------------


class Running:
    """A job that was started: its output goes to <target>.log."""

    def __init__(self, job: Job, threads: int) -> None:
        """Start the job with so many threads; when this program is killed, it is stopped."""
        self.job = job
        job.target.parent.mkdir(parents=True, exist_ok=True)
        self.whole = not job.target.with_suffix(".ckpt").exists()  # nothing of an earlier attempt
        self.began = time.perf_counter()
        with open(job.target.with_suffix(".log"), "a", encoding="utf-8") as log:
            print(f"$ {job.line}", file=log, flush=True)
            script = Path(__file__).with_name(job.command[0])
            self.process = subprocess.Popen(
                [sys.executable, script, *job.command[1:]], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, preexec_fn=stop_with_parent,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.process.poll() is not None

    def finish(self, out: Path) -> bool:
        """Note the time of a job that is over, clear up, and return whether its target is there."""
        job, seconds = self.job, time.perf_counter() - self.began
        done = self.process.returncode == 0 and job.target.exists()
        if done and self.whole:
            study_tables.note(out, job.kind, seconds, job.line)
        if done and job.needs:  # nothing goes on from its checkpoint, as from a trunk's
            for suffix in (".ckpt", ".ckpt.previous"):
                job.target.with_suffix(suffix).unlink(missing_ok=True)
            for plot in job.target.parent.glob("*.png"):  # the study draws its own
                plot.unlink()
        return done


def stop_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the one that started it dies; Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def next_job(
    grid: Grid, names: Sequence[str], seeds: Sequence[int], running: Iterable[Job]
) -> Job | None:
    """Return the first job that can be started now; where a job failed, leave out what needs it."""
    started = {job.target for job in running}
    for name in names:
        jobs = list(grid.tuning(name).values())
        with contextlib.suppress(LookupError):  # λ is not chosen yet, or cannot be
            jobs += grid.final(name, seeds, grid.chosen(name))
        for job in pending(jobs):
            if any(needed.target in grid.failed for needed in job.needs):
                grid.failed.add(job.target)
            elif job.target not in started | grid.failed:
                if all(needed.target.exists() for needed in job.needs):
                    return job
    return None


def run_all(grid: Grid, names: Sequence[str], seeds: Sequence[int], at_once: int) -> None:
    """Run every variant: the choice of its λ, then all seeds; renew the tables as results come."""
    jobs = [job for name in names for job in grid.planned(name, seeds)[0]]
    total = sum(job.seconds for job in pending(jobs))
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"
    threads = max(1, torch.get_num_threads() // at_once)
    running: list[Running] = []
    with tqdm(total=total, bar_format=form, disable=None) as bar:
        try:
            while True:
                while len(running) < at_once:
                    job = next_job(grid, names, seeds, [each.job for each in running])
                    if job is None:
                        break
                    running.append(Running(job, threads))
                    bar.set_description(", ".join(each.job.title for each in running))
                if not running:
                    break
                while not any(each.ended for each in running):
                    time.sleep(0.05)
                for each in [each for each in running if each.ended]:
                    running.remove(each)
                    settle(each, grid, bar)
        finally:
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.wait()
    for name in names:
        try:
            grid.chosen(name)
        except LookupError as error:
            tqdm.write(str(error))
    renew(grid)


def settle(over: Running, grid: Grid, bar: tqdm) -> None:
    """Tell how a job that is over went, and renew the tables."""
    if over.finish(grid.out):
        tqdm.write(f"done: {over.job.line}")
        if over.job.target.name == "results.json":
            renew(grid)
    else:
        grid.failed.add(over.job.target)
        tqdm.write(f"FAILED: {over.job.line}\n  see {over.job.target.with_suffix('.log')}")
    bar.update(over.job.seconds)


def renew(grid: Grid) -> None:
    """Write tables and plots of what there is."""
    if results := list(finished(grid)):
        study_tables.write(grid.out, results)
        study_plots.draw(grid.out, results)


def finished(grid: Grid) -> Iterator[study_tables.Result]:
    """Yield every final result there is, of all variants and seeds."""
    seeds = sorted(int(p.name.removeprefix("seed")) for p in grid.out.glob("seed[0-9]*"))
    for name in VARIANTS:
        try:
            lmbda = grid.chosen(name)
        except LookupError:
            continue
        for seed in seeds:
            branch = grid.branch(name, seed, lmbda)
            jobs = [grid.quantized(branch, how) for how in ("weights", "folded")]
            if all(job.target.exists() for job in jobs):
                paths = {how: j.target for how, j in zip(("weights", "folded"), jobs, strict=True)}
                lines = [job.line for job in (*branch.needs, branch, *jobs)]
                record = branch.target.with_suffix(".json")
                yield study_tables.Result(name, lmbda, seed, record, paths, lines, grid.first)


def plan(grid: Grid, names: Sequence[str], seeds: Sequence[int], at_once: int) -> None:
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
    total = duration(sum(job.seconds for job in seen.values()) / at_once)
    how = f"{grid.epoch_seconds or EPOCH_SECONDS:.0f} s an epoch of the control"
    print(f"in all {len(seen)} jobs, about {total}, with {how}, {at_once} at once")


def duration(seconds: float) -> str:
    """Return the time as hours and minutes."""
    return f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f} h"


# --- the script ------------------------------------------------------------------------------


def make_parser() -> utils.Parser:
    """Make the parser of study.py."""
    parser = utils.Parser("Run the study: variants × seeds, as tables and plots; see VARIANTS.")
    add = parser.add_argument
    names = utils.one_of(VARIANTS)
    add("--plan", action="store_true", help="print what would run and how long it takes; run none")
    add("--tables", action="store_true", help="only renew tables and plots from what there is")
    add("--only", type=names, nargs="+", default=list(VARIANTS), metavar="NAME", help="variants")
    add("--seeds", type=utils.number(int, at_least=0), nargs="+", default=[0, 1, 2], help="seeds")
    add("--jobs", type=utils.number(int, at_least=1), default=1, help="at once; they share the "
        "cores, and the times of one tell little while others run")
    add("--out", default="results/study", help="folder of everything that is written")
    add("--n_epochs", type=utils.number(int, at_least=6), default=12, help="of which a third is "
        "regularized, the last")
    add("--holdout", type=utils.number(int, at_least=1), default=HOLDOUT, help="images for λ")
    add("--epoch_seconds", type=utils.number(float, above=0), help="of the control, for estimates; "
        "None: as measured")
    add("--train_flags", default="", help="further flags of every training, in quotes")
    add("--data_flags", default="", help="of every training and quantization, such as --device")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, run or tabulate; exit with 1 if a job failed."""
    args = make_parser().parse_args(argv)
    grid = Grid(args)
    if args.plan:
        return plan(grid, args.only, args.seeds, args.jobs)
    if args.tables:
        return renew(grid)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run_all(grid, args.only, args.seeds, args.jobs)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if grid.failed else 0)


if __name__ == "__main__":
    main()
