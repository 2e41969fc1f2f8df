"""Random flags: a run that dies at any write is resumed to the bits of one that does not die."""

import itertools
from collections import Counter

import pytest
import tiny_scripts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import read_log, result, survives_broken_write

from regularizers import REGULARIZERS

COMMON = [*tiny_scripts.FLAGS, "--checkpoint_minutes", "0.0001"]
NAMES = [name.replace("<P>", "2") for name in REGULARIZERS]
N_EPOCHS = 3


def flag(name, *values):
    """Draw no flag, or one with one of the values; without values, the flag alone."""
    words = [(name, str(value)) for value in values] or [(name,)]
    return st.one_of(st.just(()), st.sampled_from(words))


def flags(*drawn):
    """Draw all of the flags, as words of a command line."""
    return st.tuples(*drawn).map(lambda words: [*itertools.chain.from_iterable(words)])


TRAINING = [
    flag("--model", "TinyFused", "Foreign"),
    flag("--scheduler", "exponential", "cosine"),
    flag("--milestones", "1,2", "halfway"),
    flag("--momentum", 0),
    flag("--weight_decay", 0.01),
    flag("--label_smoothing", 0.1),
    flag("--batch_size", 24, 50),
    flag("--train_subset", 100),
    flag("--holdout", 40),
    flag("--seed", 7),
    flag("--memory_format", "contiguous"),
    flag("--freeze_bn_from", 1, 2),
    flag("--checkpoint_every", 2),
    flag("--no_test_penalty"),
    flag("--track", "L1Grad", "RangeNorm", "StepNoise"),
    st.one_of(  # the two do not go together
        flags(flag("--ema", 0.9), flag("--recalibrate_bn_images", 32)),
        flags(flag("--qat_bits", 4, "3,5"), flag("--qat_from", 1), flag("--keep_first_last")),
    ),
]
PENALTY = [
    flag("--penalty_every", 2, 3),
    flag("--penalty_gradient", "difference"),
    flag("--lmbda_warmup", 1.5),
    flag("--fold_bn"),
    flag("--target_bits", 3),
    flag("--detach_step"),
    flag("--rho", 0.1),
]
TRAIN = flags(
    st.sampled_from(NAMES).map(lambda name: ("--regularizer", name)),
    flag("--first_regularized_epoch", 1, 2),
    flag("--save_preregularized_model"),
    flag("--no_activation_gradients"),
    *PENALTY,
    *TRAINING,
)
TERMS = st.lists(st.sampled_from([*NAMES, "L1Grad@weights"]), min_size=1, max_size=2, unique=True)
PHASES = st.lists(st.one_of(st.just(["none"]), TERMS), min_size=N_EPOCHS, max_size=N_EPOCHS)
PHASED = flags(
    PHASES.map(
        lambda phases: (
            "--phases",
            *(
                f"{epoch}:" + "+".join(name if name == "none" else f"{name}=0.01" for name in terms)
                for epoch, terms in enumerate(phases)
            ),
        )
    ),
    *PENALTY,
    *TRAINING,
)
SCRIPTS = {"train.py": TRAIN, "combined_protocol.py": PHASED}
outcomes = Counter()


def check(launcher, folder, script, argv, number):
    """Run it whole, let it die at its number-th write and resume it; or it is refused in a line."""
    whole, run = folder / "whole", (script, [*COMMON, "--n_epochs", str(N_EPOCHS), *argv])
    whole.mkdir(parents=True)
    code = launcher.run(*run, whole)
    if code:
        lines = read_log(whole).splitlines()
        assert code in (1, 2) and [line for line in lines if "error:" in line] == lines[-1:], argv
        outcomes[lines[-1].partition("error: ")[2].partition(" with ")[0]] += 1
        return
    broken = survives_broken_write(launcher, run, result(whole), number, "die", folder / "broken")
    outcomes["ends before that write" if broken is None else "resumed to the same bits"] += 1


def check_some(launcher, tmp_path_factory, n):
    """Check n random command lines and print how they ended."""
    outcomes.clear()

    @given(st.data())
    @settings(max_examples=n, deadline=None, suppress_health_check=[*HealthCheck], database=None)
    def check_one(data):
        script = data.draw(st.sampled_from([*SCRIPTS]))
        argv, number = data.draw(SCRIPTS[script]), data.draw(st.integers(1, 60))
        check(launcher, tmp_path_factory.mktemp("run"), script, argv, number)

    check_one()
    print("".join(f"\n{n:5} {outcome}" for outcome, n in outcomes.most_common()))


def test_a_run_of_random_flags_resumes_to_the_same_bits(launcher, tmp_path_factory):
    check_some(launcher, tmp_path_factory, 3)


@pytest.mark.faults
def test_many_runs_of_random_flags_resume_to_the_same_bits(launcher, tmp_path_factory):
    check_some(launcher, tmp_path_factory, 500)
