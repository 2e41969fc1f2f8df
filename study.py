"""Run the study: every regularizer with every seed, quantized, as tables and figures.

The first two thirds of a run are without a penalty and the same for every variant of a seed: they
are trained once, and each variant continues from that checkpoint (--init_from), exactly as if it
had trained them itself. λ is chosen once per variant on held-out training images, see
analysis/study/lambda_choice.py; the test set is looked at only afterwards. Finished jobs are
skipped, interrupted ones resume.
"""

import engine.system.early_interrupt  # noqa: F401, first: what follows takes seconds

# isort: split
import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import flags
import train
from analysis.study import jobs as study_jobs
from analysis.study.changes import refuse_changed, warn_of_changed
from analysis.study.estimate import measure_epoch_seconds
from analysis.study.executors import Executor, LocalExecutor, RayExecutor, visible_gpus
from analysis.study.grid import Grid, Quantization, Variant
from analysis.study.grid_check import OF_TRAININGS, OF_VARIANTS, check_grid
from analysis.study.grid_file import load_grid
from analysis.study.jobs import Job, pending
from analysis.study.plan import NotChosen, StudyPlan
from analysis.study.runner import JobRunner
from analysis.study.settings import Settings, load_settings, resolve_settings
from engine.system.cli import (
    Parser,
    choice_ignoring_case,
    exit_codes,
    refuse_flags,
    warn_unused_flags,
)
from engine.system.errors import FileError
from engine.system.hardware import print_device
from engine.system.io import check_writable, run_lock, save_json, warn_on_error
from engine.system.signals import GracefulShutdown

SCRIPTS = Path(__file__).parent  # folder of the scripts that jobs run

# --- the grid --------------------------------------------------------------------------------

SECOND_ORDER = 3.3
# In the order of the tables; they run in the order in which --only names them. A gradient penalty
# has two candidates for λ. With the first, λ·R is 0.5 to 0.8 where regularization begins (in
# evaluation mode). The second is about three times as large and often costs more accuracy than
# MAX_ACCURACY_DROP allows. Variants called _frozen keep the statistics of batch norms, so that the
# penalty is that of the network as it is used. There a third of these λ has the same effect, and
# a smaller one is tried as well.
VARIANTS = {
    "control": Variant("--regularizer none"),
    "control_frozen": Variant("--regularizer none --freeze_bn_from {first}"),
    "l1grad": Variant("--regularizer L1Grad", (1.5e-4, 5e-4), SECOND_ORDER),
    "l1grad_weights": Variant(
        "--regularizer L1Grad --no_activation_gradients", lambda_from="l1grad"
    ),
    "l2grad": Variant("--regularizer L2Grad", (0.03, 0.1), SECOND_ORDER),
    "l2grad_weights": Variant(
        "--regularizer L2Grad --no_activation_gradients", lambda_from="l2grad"
    ),
    "l2grad_frozen": Variant(
        "--regularizer L2Grad --freeze_bn_from {first}", (0.003, 0.01, 0.03), SECOND_ORDER
    ),
    "linfgrad": Variant("--regularizer LinfGrad", (0.15, 0.5), SECOND_ORDER),
    "stepl1grad": Variant("--regularizer StepL1Grad", (0.015, 0.05), SECOND_ORDER),
    "stepl1grad_held": Variant("--regularizer StepL1Grad --hold_step", lambda_from="stepl1grad"),
    "stepl2grad": Variant("--regularizer StepL2Grad", (6.0, 20.0), SECOND_ORDER),
    "stepl2grad_held": Variant("--regularizer StepL2Grad --hold_step", lambda_from="stepl2grad"),
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
MAX_WAITING = 1000  # jobs given to a cluster, which runs as many as it has room for
BN_IMAGES = 4000  # to recalibrate batch norms with, or as many as there are
# "tuning" is on held-out images, to choose λ by; all others are on the test set.
QUANTIZATIONS = {
    "tuning": Quantization("--bits 4 --schemes uniform", 20.0),
    "weights": Quantization(
        "--bits 2 3 4 5 6 7 8 --schemes uniform dorefa pwlq --trials 1 --precision bf16 "
        "--biases weight",
        40.0,
    ),
    "recalibrated": Quantization(
        "--bits 2 3 4 --schemes uniform --recalibrate_bn_images {bn_images} --precision bf16",
        20.0,
        {"uniform": "recalibrated"},
    ),
    "folded": Quantization(  # in float32
        "--bits 4 6 8 --schemes uniform pwlq --fold_bn --act_bits same", 60.0, full_precision=True
    ),
    "corrected": Quantization(
        "--bits 2 3 4 --schemes uniform --mean_correction --precision bf16",
        8.0,
        {"uniform": "corrected"},
    ),
    "corrected_folded": Quantization(
        "--bits 4 --schemes uniform pwlq --mean_correction --fold_bn --act_bits same "
        "--calibration percentile",
        12.0,
        {"uniform": "corrected", "pwlq": "corrected pwlq"},
    ),
}

NOTE = (
    "A b-bit PWLQ has 2^(b+1) − 1 levels. Recalibrated: uniform, then batch-norm statistics "
    "estimated again on 4,000 training images, or as many as there are. (W,A) is with batch norms "
    "folded. Corrected: uniform, or PWLQ, then the mean of every channel of weights as before "
    "(--mean_correction); at (4,4) the range of an activation is then without its 0.01 % largest "
    "values, in place of the median of the ten largest. Full precision and (W,A) are measured in "
    "float32, weights alone in bfloat16 convolutions; of dorefa, which is stochastic, one rounding."
)

# --- the script ------------------------------------------------------------------------------

# What a study is, with defaults: the same for all runs in a folder. All but TRAINING are flags.
SETTINGS: Settings = {
    "n_epochs": 9,
    "holdout": 5000,
    "train_flags": "",
    "data_flags": "",
    "grid": "",
    "models": "",
    "TRAINING": TRAINING,
}
DATA_FLAGS = {  # that --data_flags may give
    "dataset", "data_dir", "device", "memory_format", "model", "width", *data.OPTIONS,
}  # fmt: skip


def make_parser() -> Parser:
    """Make the parser of study.py."""
    description = "Run the study: variants × seeds, as tables and figures; see VARIANTS."
    return flags.make_parser(description, flags.study_flags(VARIANTS, SETTINGS))


def make_plans(parser: Parser, args: argparse.Namespace) -> tuple[list[StudyPlan], Settings]:
    """Return the plans of the study in --out, or of a new one, one a network, and its settings.

    Ends the program where flags contradict the study; raises FileError and OSError.
    """
    out = Path(args.out)
    path = out / "study.json"
    try:
        saved = load_settings(path)
    except FileError as error:
        parser.prog += f": {path}"
        parser.error(str(error))
    requested = {name: getattr(args, name, None) for name in SETTINGS}
    args.models = args.models and list(dict.fromkeys(args.models))
    args.seeds = list(dict.fromkeys(args.seeds))
    requested["models"] = args.models and " ".join(args.models)
    # the one asked for first: it may not be there, and then nothing need be compared
    grid = read_grid(requested["grid"], saved and saved["grid"])
    defaults = {**SETTINGS, "TRAINING": grid.training}
    settings = resolve_settings(args.out, saved, requested, defaults)
    try:
        args.only = list(map(choice_ignoring_case(grid.variants), args.only or grid.variants))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --only: {error}")
    data_args = check_flags(parser, settings, is_new=saved is None)
    looks_only = bool(args.tables or args.forget)  # at what has run
    if not looks_only:
        print_device(data_args.device)
    if settings["TRAINING"] != grid.training:
        print(f"{args.out} continues with the training flags it began with: {settings['TRAINING']}")
    bn_images = BN_IMAGES
    if not looks_only:
        may_shrink = saved is None and requested["holdout"] is None
        bn_images = fit_to_data(parser, settings, data_args, may_shrink)
    quantizations = {
        name: replace(each, flags=each.flags.format(bn_images=bn_images))
        for name, each in grid.quantizations.items()
    }
    grid = replace(grid, quantizations=quantizations)
    return [
        StudyPlan(out / network_folder(network), settings, grid, network, args.epoch_seconds)
        for network in settings["models"].split() or [""]
    ], settings


def read_grid(*files: str | None) -> Grid:
    """Return the grid in the last of those files that are given, else that of this script.

    Raises FileError where one holds something else, or no study can be made of it.
    """
    grid, source = Grid(TRAINING, VARIANTS, QUANTIZATIONS, note=NOTE), "study.py"
    for source in filter(None, files):
        grid = load_grid(Path(source))
    check_grid(grid, source)
    return grid


def network_folder(network: str) -> str:
    """Return the name of a network's folder in --out: without what Windows refuses."""
    return network.replace(":", "_")


def check_flags(parser: Parser, settings: Settings, is_new: bool) -> argparse.Namespace:
    """End the program where --train_flags or --data_flags hold what they may not.

    A study that `is_new` has --models or a network in --data_flags, which count for nothing beside
    them. Returns what --data_flags mean for a training.
    """
    data_flags = shlex.split(settings["data_flags"])
    train_parser = train.make_parser()  # it ends the program at a flag that it does not know
    train_parser.parse_args(shlex.split(settings["train_flags"]))
    refused = {"train": train_parser.explicit_flags & (OF_TRAININGS | OF_VARIANTS | DATA_FLAGS)}
    data_args = train_parser.parse_args(data_flags)
    by_models = {"model", "width"} if is_new and settings["models"] else set()
    refused["data"] = train_parser.explicit_flags - (DATA_FLAGS - by_models)
    for kind, names in refused.items():
        if names:
            reason = "is set by the study and cannot be given here"
            parser.error(f"--{kind}_flags: --{min(names)} {reason}")
    flags.make_parser("", flags.QUANTIZATION).parse_args(["weights.pt", *data_flags])
    return data_args


def fit_to_data(
    parser: Parser, settings: Settings, data_args: argparse.Namespace, may_shrink: bool
) -> int:
    """Make the default of --holdout at most a tenth of the training images, and say so.

    Ends the program where --holdout asks for more than there are. Returns how many images batch
    norms are recalibrated with.
    """
    n_images = count_images(data_args)
    available = f"{data_args.dataset} has {n_images} training images"
    if may_shrink and settings["holdout"] > n_images // 10:
        settings["holdout"] = max(1, n_images // 10)
        print(f"{available}: λ is chosen with {settings['holdout']} of them")
    if settings["holdout"] >= n_images:
        parser.error(f"--holdout {settings['holdout']}: {available}")
    if BN_IMAGES > n_images:
        print(f"{available}: batch norms are recalibrated with all of them, not {BN_IMAGES}")
    return min(BN_IMAGES, n_images)


def count_images(data_args: argparse.Namespace) -> int:
    """Return how many training images there are, those held out included."""
    if data_args.dataset in ("CIFAR10", "CIFAR100"):
        return 50_000  # which need not be fetched to be counted
    return len(data.load(data_args.dataset, data_args.data_dir, 0).train_images)


# --- what it does ----------------------------------------------------------------------------


def update_report(
    plans: Sequence[StudyPlan], all_plans: Sequence[StudyPlan], is_last: bool = True
) -> bool:
    """Renew tables and figures, and the page of all networks; return whether there are results yet.

    Where it `is_last`, what they lack is printed.
    """
    from analysis.study import report  # with pandas and Matplotlib, which --plan needs not wait for

    if is_last:
        report.print_left_out(plans)
    return report.update_reports(plans, all_plans)


def print_plans(plans: Sequence[StudyPlan], names: Sequence[str], seeds: Sequence[int]) -> None:
    """Print what would run, and how long that would take."""
    seconds = sum(print_plan(plan, names, seeds) for plan in plans)
    n_cores = torch.get_num_threads()
    cost = f"{duration(seconds * n_cores)} of a core" if n_cores > 1 else "of one core"
    if seconds:
        print(f"{len(plans)} network(s), {len(seeds)} seed(s): about {duration(seconds)}, {cost}")


def print_plan(plan: StudyPlan, names: Sequence[str], seeds: Sequence[int]) -> float:
    """Print what would run of one network; return how many seconds that would take."""
    how = "given, or of the jobs so far"
    has_work = any(pending(plan.planned(name, seeds)[0]) for name in names)
    if has_work and not plan.is_timed:
        plan.epoch_seconds, how = measure_epoch(plan), "measured in a few steps"
    total: dict[Path, Job] = {}
    for name in names:
        jobs, is_chosen = plan.planned(name, seeds)
        todo = [job for job in pending(jobs) if job.target not in total]
        total |= {job.target: job for job in todo}
        note = "" if is_chosen else "; the final ones with the λ that is chosen then"
        title = f"{plan.network} {name}".strip()
        print(f"{title}: {len(todo)} jobs, {duration(sum(job.seconds for job in todo))}{note}")
        for job in todo:
            print(f"  {duration(job.seconds)}  {job.line}")
    print_retrained(plan, total.values())
    seconds = sum(job.seconds for job in total.values())
    rate = f"{plan.epoch_seconds:.0f} s an epoch of the control, on all cores ({how})"
    if not total:
        print(f"nothing to run: all of it is done, see {plan.out / 'tables.md'}")
    else:
        print(f"in all {len(total)} jobs, about {duration(seconds)}, with {rate}")
    return seconds


def measure_epoch(plan: StudyPlan) -> float:
    """Return the seconds that an epoch of the plan's control takes on this machine."""
    args = train.make_parser().parse_args(plan.training_flags)
    n_images = args.train_subset or count_images(args)
    return measure_epoch_seconds(args, n_images)


def print_retrained(plan: StudyPlan, jobs: Iterable[Job]) -> None:
    """Say which trainings have a record but no weights, as in a fresh clone: they are repeated."""
    if titles := [job.title for job in pending(jobs) if plan.records.archived(job.record)]:
        print(f"trained again, because their weights are not here: {', '.join(titles)}")


def duration(seconds: float) -> str:
    """Return the time as hours and minutes."""
    return f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f} h"


def run_all(
    plans: Sequence[StudyPlan], all_plans: Sequence[StudyPlan], args: argparse.Namespace
) -> bool:
    """Run every variant, renew the tables as results come, and return whether all succeeded."""
    names, seeds = args.only, args.seeds
    executor = make_executor(args, plans)
    plan_of = {plan.out: plan for plan in plans}
    failed: set[Path] = set()
    jobs = []
    for plan in plans:
        plan.records.add_all()
        plan.failed = failed
        jobs_of_plan = [job for name in names for job in plan.planned(name, seeds)[0]]
        print_retrained(plan, jobs_of_plan)
        jobs += jobs_of_plan

    def next_job(started: Set[Path]) -> Job | None:
        return next(filter(None, (plan.next_job(names, seeds, started) for plan in plans)), None)

    def on_success(job: Job, seconds: float | None) -> None:
        plan = next(plan_of[folder] for folder in job.target.parents if folder in plan_of)
        with warn_on_error("the job's time was not recorded"):
            study_jobs.finish(job, seconds, executor.jobs_per_machine, plan.out)
        with warn_on_error("records, tables and figures were not renewed"):
            plan.records.add(job.record)
            if plan.completes_network(job):
                update_report(plans, all_plans, is_last=False)

    seconds = sum(job.seconds for job in pending(jobs))
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}"
    with tqdm(total=seconds, bar_format=bar_format, disable=None) as bar:
        JobRunner(next_job, on_success, executor, failed, bar).run()
    update_report(plans, all_plans)
    return all([report_failures(plan, names, seeds) for plan in plans])  # noqa: C419 (each prints)


def make_executor(args: argparse.Namespace, plans: Sequence[StudyPlan]) -> Executor:
    """Return where the jobs run, as the flags say; raises SetupError."""
    if args.ray:
        n_jobs = args.jobs or MAX_WAITING
        return RayExecutor(args.ray, n_jobs, SCRIPTS, args.cpus_per_job, args.gpus_per_job)
    max_parallel = args.jobs or 1
    names_a_gpu = any("cuda:" in flag for flag in plans[0].data_flags)
    gpus = [] if max_parallel == 1 or names_a_gpu else visible_gpus()
    return LocalExecutor(max_parallel, SCRIPTS, gpus)


def report_failures(plan: StudyPlan, names: Sequence[str], seeds: Sequence[int]) -> bool:
    """Print what was not run, and which λ were left out; return whether no job failed."""
    complete = not plan.failed
    for name in names:
        try:
            jobs = pending(plan.final(name, seeds, plan.chosen_lambda(name)))
        except NotChosen as error:
            tqdm.write(str(error))
            complete = False
            continue
        for job in jobs:
            tqdm.write(f"not run, for it needs what failed: {job.title}")
        plan.warn_failed_candidates(name)
    return complete


def run_mode(parser: Parser, args: argparse.Namespace) -> int:
    """Plan, run or tabulate, as the flags say; return the exit code."""
    all_plans, settings = make_plans(parser, args)
    plan_of = {plan.network: plan for plan in all_plans}
    plans = [plan_of[network] for network in args.models or plan_of]
    out = Path(args.out)
    if args.plan:
        refuse_changed(plans, args.only)
        print_plans(plans, args.only, args.seeds)
        return 0
    if args.tables:
        # how many images batch norms were recalibrated with depends on the data set
        warn_of_changed(plans, unknown={"recalibrate_bn_images"})
        if not update_report(plans, all_plans):
            parser.exit_with(1, f"error: there are no results in {out} yet")
        print(f"renewed the tables and figures in {out}")
        return 0
    if args.forget and not (out / "study.json").exists():
        parser.exit_with(1, f"error: there is no study in {out}")
    with parser.reporting_value_errors("argument --out: "):
        check_writable(out / "study.json")
    out.mkdir(parents=True, exist_ok=True)
    with run_lock(out / "study", instead="another --out"):
        if args.forget:
            forgotten = [
                f"{path}, which rests on {needed}" if needed else path
                for plan in plans
                for path, needed in plan.records.forget(args.forget).items()
            ]
            if not forgotten:
                patterns = " ".join(args.forget)
                parser.exit_with(1, f"error: no record in {out} matches {patterns}")
            print("\n".join(["forgotten:", *forgotten]))
            return 0
        refuse_changed(plans, args.only)
        save_json(settings, out / "study.json")
        return 0 if run_all(plans, all_plans, args) else 1


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, run or tabulate; exit with 1 if a job failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    runs = not (args.tables or args.forget or args.plan)
    refuse_flags(parser, args, parser.flags)
    warn_unused_flags(parser, args, parser.flags)
    hint = "; the same command resumes"
    with exit_codes(parser, lambda: hint if runs and Path(args.out).is_dir() else ""):
        with GracefulShutdown():
            code = run_mode(parser, args)
    if code or not (args.plan or args.tables):
        sys.exit(code)


if __name__ == "__main__":
    main()
