"""What the numbers of a study say: paired gains, the honest sentence about them, warnings.

All AP values here are on the 0..100 scale.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from detdistill.study.runs import RunScore, comparable_times, read_log

Kind = Literal["teacher", "control", "method", "same_time"]

TITLES = {
    "crosskd": "CrossKD",
    "crosskd_roi": "CrossKD (RoI)",
    "mimic": "mimicking",
    "ld": "LD",
    "feature": "feature imitation",
    "soft_label": "soft labels",
    "pkd": "PKD",
    "head": "HEAD",
    "g_detkd": "G-DetKD",
    "tf_head": "TF-HEAD",
    "rm": "RM",
    "pfi": "PFI",
}
# Two-sided 5 % limits of Student's t for 1, 2, ... degrees of freedom; the last for more.
T_LIMITS = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
CONVERGED = 1.0
"""A control that still gains this many AP in its last quarter has not converged."""
AS_LONG = 0.9
"""An arm that took this share of the slowest one's time is held against the same-time control."""


@dataclass(frozen=True)
class Arm:
    """One row of the table: the same training over all seeds.

    Attributes:
        name: folder name, e.g. "student" or "crosskd+pkd".
        kind: what it is compared as.
        runs: one per seed; the teacher has one.
        latency_ms: per image at batch 1, whole prediction.
    """

    name: str
    kind: Kind
    runs: tuple[RunScore, ...]
    latency_ms: float | None = None

    @property
    def title(self) -> str:
        """Name for people."""
        if self.kind == "same_time":
            return "student, same time"
        return "+".join(TITLES.get(part, part) for part in self.name.split("+"))

    def values(self, number: str = "AP") -> list[float]:
        """A COCO number of each seed, 0..100."""
        return [100 * run.numbers[number] for run in self.runs]

    def mean(self, number: str = "AP") -> float:
        """Mean over the seeds, 0..100."""
        return statistics.fmean(self.values(number))

    @property
    def seconds(self) -> float | None:
        """Mean training time; None when trained elsewhere."""
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return statistics.fmean(known) if known else None


def arm_of(arms: Sequence[Arm], kind: Kind) -> Arm | None:
    """The first arm of a kind; None where there is none, as the teacher of some studies."""
    return next((arm for arm in arms if arm.kind == kind), None)


def control_of(arms: Sequence[Arm]) -> Arm:
    """The student alone, which every study has."""
    return next(arm for arm in arms if arm.kind == "control")


def same_time_of(arms: Sequence[Arm]) -> Arm:
    """The student alone with the time of the slowest method, which every study has."""
    return next(arm for arm in arms if arm.kind == "same_time")


def methods_of(arms: Sequence[Arm]) -> list[Arm]:
    """The distilled students, in the order of the table."""
    return [arm for arm in arms if arm.kind == "method"]


def best_method(arms: Sequence[Arm]) -> Arm:
    """The method with the highest mean AP; it is the one that is shown in pictures."""
    return max(methods_of(arms), key=lambda arm: arm.mean())


def paired_gains(arm: Arm, control: Arm) -> list[float]:
    """AP over the control's run of the same seed."""
    by_seed = {run.seed: 100 * run.numbers["AP"] for run in control.runs}
    return [100 * run.numbers["AP"] - by_seed[run.seed] for run in arm.runs]


def gap_closed(arm: Arm, control: Arm, teacher: Arm | None) -> float | None:
    """Share of the distance from control to teacher; None without a teacher that is ahead."""
    if teacher is None:
        return None
    gap = teacher.mean() - control.mean()
    return (arm.mean() - control.mean()) / gap if gap > 0 else None


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_interval(gains: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean gain over seeds (Student's t); of one seed it has no end."""
    if len(gains) < 2:
        return -math.inf, math.inf
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    reach = error * T_LIMITS[min(len(gains) - 1, len(T_LIMITS)) - 1]
    return statistics.fmean(gains) - reach, statistics.fmean(gains) + reach


def is_clear(gains: Sequence[float]) -> bool:
    """Whether all gains have one sign and their mean differs from 0 (two-sided t test, 5 %)."""
    low, high = mean_interval(gains)
    return (low > 0 and min(gains) > 0) or (high < 0 and max(gains) < 0)


def verdict(title: str, gains: Sequence[float], caveat: str = "") -> str:
    """One honest sentence about paired gains; `caveat` says where they do not hold."""
    mean = f"{signed(statistics.fmean(gains))} AP"
    if len(gains) == 1:
        return (
            f"{title}: {mean} with one seed, which says nothing about the spread between seeds: "
            "use at least three (--seeds 0,1,2)."
        )
    # As they are shown: a gain that reads +0.0 is neither positive nor negative.
    low, high = round(min(gains), 1), round(max(gains), 1)
    reach = _reach(gains)
    if low < 0 < high:
        return f"{title}: no clear gain, the seeds disagree ({mean}, {reach})."
    if low == high == 0:
        return f"{title}: no gain ({mean}, {reach})."
    if low <= 0 <= high:
        return f"{title}: no clear gain, some seeds show none ({mean}, {reach})."
    sign = "positive" if low > 0 else "negative"
    if not is_clear(gains):
        return (
            f"{title}: no clear gain. {mean} ({reach}, all {sign}), but {len(gains)} seeds spread "
            "too widely to be sure: add seeds."
        )
    word = f"helps{caveat}" if sign == "positive" else "hurts"
    return f"{title} {word}: {mean} ({reach}, all {sign})."


def _reach(gains: Sequence[float]) -> str:
    lower, upper = mean_interval(gains)
    return (
        f"95 % interval {signed(lower)} to {signed(upper)}; "
        f"seeds {signed(min(gains))} to {signed(max(gains))}"
    )


def signed(value: float) -> str:
    """One decimal with its sign; what rounds to 0 is +0.0."""
    return f"{round(value, 1) + 0:+.1f}"


def verdicts(arms: Sequence[Arm]) -> list[str]:
    """What is said of each method: against the control, the teacher, and the same-time control.

    Of the only one the last is a text of its own, so that the first makes a headline.
    """
    teacher, control = arm_of(arms, "teacher"), control_of(arms)
    same_time, methods = same_time_of(arms), methods_of(arms)
    measure, (own, *times) = comparable_times(control.runs, *(arm.runs for arm in methods))
    # Part of an epoch counts as one; a control that is longer still has the time of a slower method
    # that was left out since.
    needed = _mean_epochs(control) * max(times) / own + 1 if own else math.inf
    beyond = AS_LONG * _mean_epochs(same_time) > needed
    texts: list[str] = []
    for arm, time in zip(methods, times, strict=True):
        gains = paired_gains(arm, same_time)
        as_long = time >= AS_LONG * max(times) and not beyond
        behind = as_long and max(gains) <= 0
        caveat = " at equal steps, not at equal training time" if behind else ""
        text = verdict(arm.title, paired_gains(arm, control), caveat)
        if teacher is not None:
            text += _against_teacher(arm, control, teacher)
        faster = "" if as_long or not own else f"{time / own:.2g} x the student's {measure}"
        beside = _against_same_time(arm, gains, same_time, control, faster)
        texts += [text, beside] if len(methods) == 1 else [f"{text} {beside}"]
    return texts


def _against_teacher(arm: Arm, control: Arm, teacher: Arm) -> str:
    """A further sentence where the teacher is ahead of the student alone."""
    share = gap_closed(arm, control, teacher)
    if share is not None and arm.mean() >= teacher.mean():
        return f" It reaches {arm.mean():.1f} AP, the teacher {teacher.mean():.1f}."
    if share is not None and share > 0:
        gap = teacher.mean() - control.mean()
        return f" It closes {share:.0%} of the {gap:.1f} AP between student and teacher."
    return ""


def warnings(arms: Sequence[Arm]) -> list[str]:
    """What makes the numbers worth less than they look."""
    teacher, control = arm_of(arms, "teacher"), control_of(arms)
    found = []
    if teacher is not None and teacher.mean() <= control.mean():
        found.append(
            f"The teacher ({teacher.mean():.1f} AP) is no better than the student alone "
            f"({control.mean():.1f} AP): a better teacher comes before any distillation."
        )
    unsure = [text for arm in methods_of(arms) if (text := _within_noise(arm))]
    if unsure:
        found.append(
            "The test split is too small to be sure of every run: with other images of its kind "
            f"{', '.join(unsure)} (95 %, resampled test images)."
        )
    late = [gain for run in control.runs if (gain := late_gain(run)) is not None]
    if late and statistics.fmean(late) >= CONVERGED:
        found.append(
            f"The student alone has not converged: its last quarter of training still gained "
            f"{statistics.fmean(late):.1f} AP on val, so part of the gain may be faster learning. "
            "Train longer (--set epochs=...)."
        )
    return found


def late_gain(run: RunScore) -> float | None:
    """AP gained on val in the last quarter of training; None without an evaluation at its begin."""
    log = read_log(run.folder, "eval")
    before = [entry for entry in log if 0.6 <= entry["step"] / log[-1]["step"] <= 0.75]
    if not before:
        return None
    return float(100 * (log[-1]["metrics"]["AP"] - before[-1]["metrics"]["AP"]))


def _within_noise(arm: Arm) -> str:
    """What the test images leave open of a seed's gain that might be none; "" where none might."""
    unsure = [
        (run.seed, low, high)
        for run in arm.runs
        if run.gain_interval is not None
        for low, high in [run.gain_interval]
        if low <= 0 <= high
    ]
    if not unsure:
        return ""
    seed, low, high = min(unsure, key=lambda entry: entry[1])
    reach = f"{signed(100 * low)} to {signed(100 * high)} AP"
    return f"{arm.title} could gain {reach} with seed {seed}"


def _mean_epochs(arm: Arm) -> float:
    """Of an arm that was trained here."""
    return statistics.fmean(run.epochs for run in arm.runs if run.epochs is not None)


def _against_same_time(
    arm: Arm, gains: list[float], same_time: Arm, control: Arm, faster: str
) -> str:
    """What the control with more time says: that of the slowest method.

    `faster` says of another how long it took, as a share of the control's time.
    """
    factor = _mean_epochs(same_time) / _mean_epochs(control)
    if factor == 1:
        return "Distillation took no longer than the student alone, which so had the same time."
    reach = f" ({_reach(gains)})" if len(gains) > 1 else ""
    given = f"the same training time ({factor:.2g} x the epochs)"
    if faster:
        given = (
            f"the time of a slower method ({factor:.2g} x the epochs; {arm.title} itself took "
            f"{faster})"
        )
    return f"Against the student alone given {given}: {signed(statistics.fmean(gains))} AP{reach}."
