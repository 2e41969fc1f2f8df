"""The report of the study: tables and figures of every result that there is."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from analysis.study import figures as study_figures
from analysis.study import results as study_results
from analysis.study import tables as study_tables
from analysis.study.lambda_choice import Choice
from analysis.study.plan import StudyPlan
from analysis.study.records import StudyRecords, recorded_command, recorded_settings
from analysis.study.results import Result, Statistics


def update_reports(plans: Sequence[StudyPlan], all_plans: Sequence[StudyPlan]) -> bool:
    """Write tables and figures of the plans' networks; return whether there are any results.

    Where the study has several networks there is networks.md of `all_plans`, in the folder above
    theirs. Raises FileError and OSError.
    """
    statistics = {
        plan.network: update_report(plan) if plan in plans else read_study(plan)[0]
        for plan in all_plans
    }
    with_results = {network: each for network, each in statistics.items() if each}
    if len(all_plans) > 1 and with_results:
        study_tables.write_networks(plans[0].out.parent, with_results, plans[0].note)
    return any(statistics[plan.network] for plan in plans)


def update_report(plan: StudyPlan) -> Statistics | None:
    """Write tables and figures of all results of a network; return what they say, None if nothing.

    Raises FileError and OSError.
    """
    statistics, results, choices = read_study(plan)
    if statistics:
        study_tables.write_tables(plan.out, statistics, results, choices, plan.note)
        with plan.records.open(results[0].training) as record:
            n_classes = study_results.count_classes(record)
        first = plan.epochs["first"]
        study_figures.draw_figures(plan.out, statistics, choices, first, n_classes)
    return statistics


def read_study(plan: StudyPlan) -> tuple[Statistics | None, list[Result], dict[str, Choice]]:
    """Return what all results of a network say (None: there are none), they, and how λ were chosen.

    A variant has the λ that was chosen last. Raises FileError.
    """
    variants = list(known_variants(plan))
    choices = {n: plan.saved_choice(n) for n, _ in variants if plan.variants[n].lmbdas}
    results = [each for variant in variants for each in finished_results(plan, *variant)]
    if not results:
        return None, results, choices
    first = plan.epochs["first"]
    tables = study_results.read_results(results, plan.records, plan.quantizations, first)
    return Statistics(*tables), results, choices


def print_left_out(plans: Sequence[StudyPlan]) -> None:
    """Print what is not in the tables, for a quantization that it lacks; raises FileError."""
    for plan in plans:
        for name, lmbda in known_variants(plan):
            for seed in plan.records.seeds():
                branch = plan.branch(name, seed, lmbda)
                jobs = plan.final_quantized(branch)
                lacking = [how for how, job in jobs.items() if not job.done]
                if 0 < len(lacking) < len(jobs):
                    what = f"{branch.target.with_suffix('')} is not quantized as"
                    print(f"left out of the tables: {what} {', '.join(lacking)} yet")


def known_variants(plan: StudyPlan) -> Iterator[tuple[str, float | None]]:
    """Yield each variant whose λ is known, with the one that was chosen last; raises FileError."""
    for name in plan.variants:
        choice = plan.saved_choice(name)
        if choice or not plan.lmbdas(name):
            yield name, choice and choice.lmbda


def finished_results(plan: StudyPlan, name: str, lmbda: float | None) -> Iterator[Result]:
    """Yield the final results of a variant for each seed that has all of them; raises FileError."""
    for seed in plan.records.seeds():
        branch = plan.branch(name, seed, lmbda)
        jobs = plan.final_quantized(branch)
        if not all(job.done for job in jobs.values()):
            continue
        commands = [f"mkdir -p {branch.target.parent}"]
        for job in (*branch.needs, branch, *jobs.values()):
            commands.append(reproduction_command(plan.records, job.record))
        quantized = {quantization: job.target for quantization, job in jobs.items()}
        yield Result(name, lmbda, seed, branch.record, quantized, commands)


def reproduction_command(records: StudyRecords, path: Path) -> str:
    """Return the command of a training's record or of a results.json; raises FileError.

    With its number of threads: sums are split among them.
    """
    with records.open(path) as record:
        threads = recorded_settings(record)["machine"]["threads"]
        command = shlex.join(recorded_command(record))
    return f"OMP_NUM_THREADS={threads} python {command}"
