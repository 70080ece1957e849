"""The learning rate at which the student alone does best, found on val before a study begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detdistill.errors import DivergedError

FACTORS = (0.5, 1.0, 2.0)
"""Of the recipe's rate: those that are tried in any case."""
FURTHEST = 8.0
"""While the best is the largest or the smallest of all, the next one by 2 is tried, up to here."""


@dataclass(frozen=True)
class Tuning:
    """What was tried for the student alone.

    Attributes:
        seed: with which.
        aps: final AP on val, 0..1, by learning rate; -inf where training diverged.
    """

    seed: int
    aps: Mapping[float, float]

    @property
    def lr(self) -> float:
        """The best; of equals the smallest."""
        return max(sorted(self.aps), key=lambda lr: self.aps[lr])

    @property
    def text(self) -> str:
        """What was chosen and from what, for the settings of a study."""
        tried = ", ".join(f"{lr:g} ({_shown(self.aps[lr])})" for lr in sorted(self.aps))
        return f"{self.lr:g}; AP of the student alone on val, seed {self.seed}: {tried}"

    @property
    def warnings(self) -> list[str]:
        """Where the best is the last one tried, a better one may lie beyond."""
        if min(self.aps) < self.lr < max(self.aps):
            return []
        end = "largest" if self.lr == max(self.aps) else "smallest"
        return [
            f"The best learning rate for the student alone, {self.lr:g}, is the {end} that was "
            f"tried; a better one may lie beyond (another study with --set lr={self.lr:g})."
        ]

    def as_values(self) -> dict[str, Any]:
        """For `study.json`, which has no -inf."""
        tried = [[lr, None if ap == -math.inf else ap] for lr, ap in sorted(self.aps.items())]
        return {"seed": self.seed, "val_ap": tried}

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Tuning:
        """From `study.json`."""
        aps = {lr: -math.inf if ap is None else ap for lr, ap in values["val_ap"]}
        return cls(values["seed"], aps)


def tuning_of(state: Mapping[str, Any]) -> Tuning | None:
    """What the content of `study.json` holds of it; None where nothing was tuned (yet)."""
    values = state.get("tuning", {})
    return Tuning.of_values(values) if "val_ap" in values else None


def tune(lr: float, seed: int, measure: Callable[[Sequence[float]], Sequence[float]]) -> Tuning:
    """Tries the rates around `lr`.

    Args:
        lr: where to begin.
        seed: of all runs.
        measure: final AP of each of some rates, -inf for those at which training diverges.

    Raises:
        DivergedError: when it does at all of them.
    """
    aps: dict[float, float] = {}
    wanted = [lr * factor for factor in FACTORS]
    while wanted:
        aps |= dict(zip(wanted, measure(wanted), strict=True))
        best = Tuning(seed, aps).lr
        beyond = {max(aps): best * 2, min(aps): best / 2}
        better = list(aps.values()).count(aps[best]) == 1  # than all others
        within = best in beyond and lr / FURTHEST <= beyond[best] <= lr * FURTHEST
        wanted = [beyond[best]] if better and within else []
    if max(aps.values()) == -math.inf:
        raise DivergedError(
            f"the student alone diverged at each learning rate from {min(aps):g} to {max(aps):g}; "
            f"begin lower, e.g. --set lr={min(aps) / 10:g}, or with --set clip_norm=10"
        )
    return Tuning(seed, aps)


def _shown(ap: float) -> str:
    return "diverged" if ap == -math.inf else f"{100 * ap:.1f}"
