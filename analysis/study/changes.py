"""Which results of a study were made with other flags than its grid has now."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from analysis.study.commands import settings_of
from analysis.study.jobs import Job
from analysis.study.plan import StudyPlan
from analysis.study.records import recorded_command
from analysis.study.settings import SettingsError


def refuse_changed(plans: Sequence[StudyPlan], names: Sequence[str]) -> None:
    """Raise SettingsError where variants have results that were made with other flags.

    They would stand in one row with what runs now.
    """
    for plan in plans:
        if found := changed_jobs(plan, names):
            again = plan.forget_flags(dict.fromkeys(_patterns(plan, found)))
            raise SettingsError(
                f"{_describe(plan, found)}: choose another --out, or make them again after {again}"
            )


def warn_of_changed(plans: Sequence[StudyPlan], unknown: Set[str]) -> None:
    """Print one line for each network with such results, which stay in its tables.

    `unknown` are settings that cannot be compared, as the data set is not read.
    """
    for plan in plans:
        if found := changed_jobs(plan, plan.variants, unknown):
            print(
                f"{_describe(plan, found)}: the tables have them as they were run, see the "
                "commands there",
                file=sys.stderr,
            )


def changed_jobs(
    plan: StudyPlan, names: Iterable[str], unknown: Set[str] = frozenset()
) -> dict[Job, str]:
    """Return how the flags of recorded jobs of these variants differ from those planned now.

    Raises FileError.
    """
    jobs = dict.fromkeys(
        each for name in names for job in _jobs(plan, name) for each in _chain(job)
    )
    differences = {job: _difference(plan, job, unknown) for job in jobs}
    return {job: words for job, words in differences.items() if words}


def _jobs(plan: StudyPlan, name: str) -> Iterator[Job]:
    """Yield the quantizations that a variant's λ was, and its rows are, made of."""
    yield from plan.tuning(name).values()
    choice = plan.saved_choice(name)
    if choice or not plan.lmbdas(name):
        yield from plan.final(name, plan.records.seeds(), choice and choice.lmbda)


def _chain(job: Job) -> list[Job]:
    """Return the trainings that a job rests on, the first one first, and itself."""
    return [each for needed in job.needs for each in _chain(needed)] + [job]


def _difference(plan: StudyPlan, job: Job, unknown: Set[str]) -> str:
    """Return in words the first flag of a job that was another one when it ran; "" if none was.

    What cannot be compared counts as equal: a job without a record, or one of flags that are gone.
    """
    if not plan.records.exists(job.record):
        return ""
    with plan.records.open(job.record) as record:
        command = recorded_command(record)
    try:
        before, now = settings_of(command), settings_of(job.command)
    except (LookupError, ValueError):
        return ""
    for name in sorted(now.keys() - unknown):
        if before.get(name) != now[name]:
            return f"--{name} was {before.get(name)!r}, is {now[name]!r}"
    return "" if command[0] == job.command[0] else f"was {command[0]}, is {job.command[0]}"


def _describe(plan: StudyPlan, found: Mapping[Job, str]) -> str:
    """Return the beginning of a line about changed jobs: how many, and the first one's change."""
    job, words = next(iter(found.items()))
    record = plan.records.key(job.record)
    how_many = f"1 job in {plan.out}" if len(found) == 1 else f"{len(found)} jobs in {plan.out}"
    return f"{how_many} ran with other flags than now, such as {record} ({words})"


def _patterns(plan: StudyPlan, found: Iterable[Job]) -> Iterator[str]:
    """Yield what --forget takes to have these jobs again: seed* where they are those of all seeds.

    What rests on them is forgotten with them.
    """
    keys = [plan.records.key(job.record) for job in found]
    for key in keys:
        name = key.partition("/")[2]
        of_seeds = [f"seed{seed}/{name}" for seed in plan.records.seeds()]
        recorded = {each for each in of_seeds if plan.records.exists(plan.out / each)}
        yield f"seed*/{name}" if key in recorded and recorded.issubset(keys) else key
