"""The parts of the page, each from its numbers and its examples."""

from __future__ import annotations

import html
from collections.abc import Sequence

from detdistill.analysis import charts
from detdistill.analysis.conflict import THRESHOLD, Conflict
from detdistill.analysis.imitation import Imitation
from detdistill.analysis.maps import HEAT, OBJECT, OWN, RANK, TEACHERS, map_panels, rank_panels
from detdistill.analysis.ranks import EASY, Ranks
from detdistill.analysis.words import Numbers, percent, plain
from detdistill.data import DetectionDataset
from detdistill.drawing.page import figure, panel_row, table

CONFLICT = (
    "What the labels ask of the student and what the teacher says are two targets. Where they "
    f"differ by more than {THRESHOLD:g}, a student that mimics the teacher's predictions is pulled "
    "two ways; CrossKD keeps the two apart. The labels are those of the student's own assigner and "
    "loss (1 for the class of a positive; with GFL the IoU of the student's box); a place counts "
    "by the class on which label and teacher differ most."
)
RANKS = (
    "The candidates of an object are the anchors or points that the teacher's assigner gives to "
    "it. Detection keeps the one with the best score. If the student ranks them otherwise, it "
    "keeps a box from another place, often a worse one, above all of hard objects; Rank Mimicking "
    "teaches the order."
)
IMITATION = (
    "Prediction-guided Feature Imitation holds that features which differ where predictions agree "
    "need no correction, and weighs a place's feature difference by its prediction difference, the "
    "mean squared difference of the scores there. {measure} The less the two correlate, the more "
    "such weighing changes: a rank correlation of 1 means that they are great in the same places, "
    "0 that they have nothing to do with each other."
)
MEASURES = {
    "mean_squared": "The pyramids are equally wide, so a feature difference is the mean squared "
    "difference of their channels, without an adapter: where the two networks were trained apart, "
    "their channels mean different things, and the difference mostly shows how active a place is.",
    "relational": "The pyramids are not equally wide, so a feature difference is 1 less the "
    "correlation of a place's relations, its inner products with other places of the map, in the "
    "teacher's and in the student's features.",
}
SIMILARITY = (
    "Linear CKA between the two models' features at the same positions: 1 for features that are "
    "equal up to rotation, scale and offset, about 0 for features that have nothing in common. It "
    "needs no equal widths. Numbers after a branch count the blocks of the heads' towers. A "
    "two-stage teacher's head is compared on boxes, the student's best proposals. HEAD expects "
    "heads of unlike kinds to be unlike here, and an assistant of the teacher's kind to be nearer "
    "to it than the student's own head."
)
CONFLICT_MAPS = {
    "labels and teacher": "the conflict",
    "student and labels": "the student's distance to the labels",
    "student and teacher": "and to the teacher",
}
IMITATION_MAPS = {
    "features": "feature difference",
    "predictions": "prediction difference",
    "product": "both multiplied",
}


def left_out(reason: str) -> str:
    """In place of a part."""
    return _text(f"Left out for this pair: {reason[0].lower()}{reason[1:]}")


def conflict_section(part: Conflict, found: Numbers, dataset: DetectionDataset) -> str:
    """Chart, table and maps of the target conflict."""
    header = ["", found["places"], "in conflict", "share", "teacher higher"]
    header += ["student nearer to teacher", "its gap to label", "to teacher"]
    rows = [_conflict_row(name, found[group]) for group, (name, _) in charts.GROUPS.items()]
    own = found["teacher_against_its_own_labels"]
    if own is not None:
        rows.append(_conflict_row("positives, teacher's own labels", own["positives"]))
    note = "The last four columns are of the places in conflict; gaps are 0 to 1."
    if found["places"] == "cells":
        note = (
            "The two heads have different anchors, so cells are compared: of a cell's anchors the "
            f"highest score counts on each side. {note}"
        )
    pictures = [
        panel_row(map_panels(example, _name(dataset, example.index), CONFLICT_MAPS))
        for example in part.examples.items()
    ]
    return (
        _text(CONFLICT)
        + figure(charts.conflict_chart(found), "Dashed: from here on a gap counts as a conflict.")
        + table(header, rows)
        + _note(note)
        + _pictures(
            "The images with the most places in conflict, all levels together. On the class on "
            "which label and teacher differ most:",
            _ramp(HEAT, "0", "1"),
            pictures,
        )
    )


def _conflict_row(name: str, row: Numbers) -> list[str]:
    return [
        name,
        str(row["places"]),
        str(row["conflicts"]),
        percent(row["share"]),
        percent(row["teacher_higher_share"]),
        percent(row["nearer_to_teacher_share"]),
        plain(row["student_to_label"]),
        plain(row["student_to_teacher"]),
    ]


def ranks_section(part: Ranks, found: Numbers, dataset: DetectionDataset) -> str:
    """Chart, table and candidates of the rank disagreement."""
    chart = charts.ranks_chart(found)
    if chart is None:
        return "<p>No object here has two candidates with different scores.</p>"
    header = ["", "objects", "mean tau", "median", "best differs", "teacher's IoU"]
    header += ["student's IoU", "at teacher's best", "at best"]
    rows = {"all": found["all"], **found["sizes"]}
    rows |= {"easy for the teacher": found["easy"], "hard": found["hard"]}
    few = found["objects"] - found["objects_with_candidates"]
    note = (
        "Tau compares class scores; best is the final score, with centerness where there is one. "
        "The teacher's IoU is that of its box with the object at its own best candidate; easy is "
        f"from {EASY} on. The other three are of the student's box: at the candidate that the "
        "student puts first, at the one that the teacher puts first, and the best of all. Small is "
        "below 32 x 32 pixels of the image file, large from 96 x 96. Objects with fewer than two "
        f"candidates do not count: {few} of {found['objects']}."
    )
    examples = part.examples.items()
    pictures = [panel_row(rank_panels(e, _name(dataset, e.index))) for e in examples]
    swatches = {"object": OBJECT, "student's box at the teacher's best": TEACHERS}
    return (
        _text(RANKS)
        + figure(chart, "Tau: 1 for the same order, -1 for the opposite one. Dashed: the mean.")
        + table(header, [_rank_row(name, row) for name, row in rows.items()])
        + _note(note)
        + _pictures(
            "The objects whose candidates are ordered most differently, of those with six "
            "candidates or more. A dot is a candidate, the ringed one is the best.",
            _ramp(RANK, "last", "first") + _keys({**swatches, "at its own best": OWN}),
            pictures,
        )
    )


def _rank_row(name: str, row: Numbers) -> list[str]:
    return [
        name,
        str(row["objects"]),
        plain(row["tau"]),
        plain(row["tau_median"]),
        percent(row["best_differs_share"]),
        plain(row["teachers_iou"]),
        plain(row["iou_at_own_best"]),
        plain(row["iou_at_teachers_best"]),
        plain(row["iou_at_best"]),
    ]


def imitation_section(part: Imitation, found: Numbers, dataset: DetectionDataset) -> str:
    """Chart, table and maps of feature and prediction differences."""
    header = ["", "places", "Pearson", "Spearman", "overlap of the top tenths"]
    header += ["mean feature difference", "mean prediction difference"]
    rows = [
        [
            f"stride {level['stride']}",
            str(level["places"]),
            plain(level["pearson"]),
            plain(level["spearman"]),
            percent(level["overlap_of_top_tenth"]),
            _short(level["feature_difference"]),
            _short(level["prediction_difference"]),
        ]
        for level in found["levels"]
    ]
    stride = part.main_stride
    pictures = [
        panel_row(map_panels(e, _name(dataset, e.index), IMITATION_MAPS, stride))
        for e in part.examples.items()
    ]
    chart = charts.imitation_chart(found, part.rank_table().numpy())
    caption = (
        "Right: were the two unrelated, each cell would hold 1 times its share of the places; were "
        "they in the same places, the diagonal would hold all. Chance gives 0.1 as overlap."
    )
    return (
        _text(IMITATION.format(measure=MEASURES[found["feature_measure"]]))
        + figure(chart, caption)
        + table(header, rows)
        + _note("Spearman and overlap are measured on an even draw of the places.")
        + _pictures(
            f"The images with the greatest prediction difference, at stride {stride}, where most "
            "of it is. Each map has its own scale:",
            _ramp(HEAT, "0", "its greatest value"),
            pictures,
        )
    )


def similarity_section(found: Numbers) -> str:
    """The table of CKA values."""
    chart = charts.similarity_chart(found)
    if chart is None:
        return "<p>The two models have no maps of the same stride.</p>"
    caption = (
        f"From {found['positions_per_map']} positions of each map and image, all where there are "
        "fewer; unbiased, so that few positions do not look alike by chance. Empty: too few "
        "positions, or one of the models has no such map."
    )
    return _text(SIMILARITY) + figure(chart, caption)


def _pictures(intro: str, legend: str, rows: Sequence[str]) -> str:
    if not rows:
        return ""
    words = f'<p class="notes">{html.escape(intro)}</p>'
    return f'{words}<p class="legend">{legend}</p>{"".join(rows)}'


def _text(words: str) -> str:
    return f"<p>{html.escape(words)}</p>"


def _note(text: str) -> str:
    return f'<p class="notes">{html.escape(text)}</p>'


def _ramp(name: str, low: str, high: str) -> str:
    """The colours of a map with the words at both ends."""
    colours = ", ".join(charts.ramp(name))
    bar = f'<span class="ramp" style="background: linear-gradient(to right, {colours})"></span>'
    return f'<span class="key">{html.escape(low)}{bar}{html.escape(high)}</span>'


def _keys(swatches: dict[str, str]) -> str:
    return "".join(
        f'<span class="key"><span class="box" style="border:3px solid {colour}"></span>'
        f"{html.escape(name)}</span>"
        for name, colour in swatches.items()
    )


def _name(dataset: DetectionDataset, index: int) -> str:
    return dataset.records[index].path.name


def _short(value: float | None) -> str:
    return plain(value) if value is None or value == 0 or value >= 0.1 else f"{value:.2g}"
