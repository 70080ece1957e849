"""What an analysis found, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Numbers = dict[str, Any]
NONE = "—"
FEW_IMAGES = 20


def summarise(numbers: Numbers) -> list[str]:
    """A sentence per part that was measured."""
    found = []
    conflict, ranks, imitation = (numbers[name] for name in ("conflict", "ranks", "imitation"))
    if conflict is not None:
        everywhere, positives = conflict["all"], conflict["positives"]
        found.append(
            f"Labels and teacher differ by more than {conflict['threshold']:g} at "
            f"{percent(positives['share'])} of the positives and {percent(everywhere['share'])} "
            f"of all {conflict['places']}"
            + (
                f"; at {percent(everywhere['nearer_to_teacher_share'])} of these places the "
                f"student stands nearer to the teacher."
                if everywhere["conflicts"]
                else "."
            )
        )
    if ranks is not None and ranks["objects_with_candidates"]:
        row = ranks["all"]
        found.append(
            f"The best candidate differs for {percent(row['best_differs_share'])} of "
            f"{row['objects']} objects; Kendall's tau of the candidates' order is "
            f"{plain(row['tau'])} on average."
        )
    if imitation is not None:
        level = main_level(imitation)
        found.append(
            f"At stride {level['stride']}, where predictions differ most, the rank correlation of "
            f"feature and prediction differences is {plain(level['spearman'])}; of the tenth of "
            f"places with the greatest ones, {percent(level['overlap_of_top_tenth'])} are the same."
        )
    stages = {stage_group(name): row for name, row in numbers["similarity"]["stages"].items()}
    shown = ", ".join(f"{name} {plain(mean_similarity(row))}" for name, row in stages.items())
    found.append(f"Similarity of the features (mean CKA, at most 1): {shown}.")
    return found


def stage_group(stage: str) -> str:
    """What a stage counts as in a sentence, where the last block of a group speaks for it."""
    group, _, block = stage.rpartition(" ")
    return f"{group} (last)" if block.isdecimal() or block == "end" else stage


def caveats(numbers: Numbers) -> list[str]:
    """What makes the numbers say little."""
    found = []
    if not numbers["objects"]:
        found.append("These images hold no objects, so the labels ask for background everywhere.")
    if numbers["images"] < FEW_IMAGES:
        found.append(
            f"Only {numbers['images']} images were measured; shares and correlations of so few "
            f"may be chance."
        )
    return found


def main_level(imitation: Numbers) -> Numbers:
    """The level that holds most of the prediction difference."""
    stride = imitation["main_stride"]
    return next(level for level in imitation["levels"] if level["stride"] == stride)


def mean_similarity(row: Mapping[str, float | None]) -> float | None:
    """Over the strides at which it is defined."""
    values = [value for value in row.values() if value is not None]
    return sum(values) / len(values) if values else None


def percent(share: float | None) -> str:
    """A share 0..1 for people; 0 % and 100 % mean none and all."""
    if share is None:
        return NONE
    value = 100 * share
    if 99.5 <= value < 100:
        return f"{min(value, 99.9):.1f} %"
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def plain(value: float | None) -> str:
    """Two digits after the point."""
    return NONE if value is None else f"{round(value, 2) + 0:.2f}"  # + 0: no -0.00
