"""COCO average precision by COCO's own rules; the only file that knows the evaluator library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from detdistill.errors import UserError

NUMBERS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
"""The 12 COCO numbers, in COCO's order."""

Result = dict[str, Any]
"""One detection: image_id, category_id, bbox [x, y, w, h] in pixels of the image, score."""


@dataclass(frozen=True)
class CocoMetrics:
    """Accuracy on one split; every value is 0..1, or -1 where there is nothing to measure.

    Attributes:
        numbers: exactly the keys of `NUMBERS`.
        per_class: AP of each class by name, in the order of the categories.
    """

    numbers: dict[str, float]
    per_class: dict[str, float]


def coco_metrics(ground_truth: Mapping[str, Any], results: Sequence[Result]) -> CocoMetrics:
    """The 12 COCO numbers and AP per class.

    Args:
        ground_truth: a COCO dict with images, annotations (crowds included) and categories.
        results: detections; their order decides among equal scores (stable sort).

    Returns:
        Without any detection everything that has ground truth is 0; without any ground truth
        everything is -1.
    """
    found = _evaluated(ground_truth, results).results(per_class=True)
    numbers = {name: float(found["metrics"][name]) for name in NUMBERS}
    numbers_of = _renumbered(ground_truth["categories"])
    per_class = {
        str(category["name"]): float(found["per_class"].get(str(numbers_of[category["id"]]), -1.0))
        for category in ground_truth["categories"]
    }
    return CocoMetrics(numbers, per_class)


def ap_gain_interval(
    ground_truth: Mapping[str, Any],
    before: Sequence[Result],
    after: Sequence[Result],
    samples: int = 200,
) -> tuple[float, float] | None:
    """95 % of the gains in AP (0..1) that other test images of the same kind would show.

    Both sets of detections are scored on the same resamplings of the images (a paired bootstrap,
    always with the same draws). It knows nothing of other training seeds.

    Returns:
        Lowest and highest gain; None where AP is undefined.
    """
    if not any(not annotation["iscrowd"] for annotation in ground_truth["annotations"]):
        return None
    pair = (_evaluated(ground_truth, before), _evaluated(ground_truth, after))
    found = hotcoco.compare(*pair, n_bootstrap=samples, seed=0, confidence=0.95)["ci"]["AP"]
    return float(found["lower"]), float(found["upper"])


@dataclass(frozen=True)
class Matches:
    """Who found what at IoU 0.5, by COCO's greedy matching.

    Attributes:
        correct: per result; None where COCO ignores it (on a crowd, beyond 100 in an image).
        found_by: per annotation the index of its result; None for missed ones and for crowds.
    """

    correct: list[bool | None]
    found_by: list[int | None]


def match_at_50(ground_truth: Mapping[str, Any], results: Sequence[Result]) -> Matches:
    """Matches results with the ground truth, the best score first.

    Leaving out results below a score changes no other match.
    """
    found = _evaluated(ground_truth, results).image_diagnostics(iou_thr=0.5)
    status, by = found["dt_status"], found["gt_match"]  # both count from 1
    correct = [None if i not in status else status[i] == "tp" for i in range(1, len(results) + 1)]
    numbers = range(1, len(ground_truth["annotations"]) + 1)
    return Matches(correct, [by[i] - 1 if i in by else None for i in numbers])


def _evaluated(ground_truth: Mapping[str, Any], results: Sequence[Result]) -> hotcoco.COCOeval:
    """An evaluation that has run."""
    # Own ids throughout, 1, 2, ...: the library passes ids through float64, where large ones meet,
    # takes 0 for "none", and reports per class name, where names may repeat.
    images = _renumbered(ground_truth["images"])
    categories = _renumbered(ground_truth["categories"])
    data = {
        "images": [{**image, "id": images[image["id"]]} for image in ground_truth["images"]],
        "annotations": [
            {
                **annotation,
                "id": i,
                "image_id": images[annotation["image_id"]],
                "category_id": categories[annotation["category_id"]],
            }
            for i, annotation in enumerate(ground_truth["annotations"], 1)
        ],
        "categories": [{"id": i, "name": str(i)} for i in categories.values()],
    }
    truth = hotcoco.COCO(data)
    evaluation = hotcoco.COCOeval(truth, truth.load_res(_rows(results, images, categories)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # `summarize` prints them
    return evaluation


def _renumbered(entries: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Id to 1..N in the order of the ids, which decides between equal scores of two images."""
    return {number: i for i, number in enumerate(sorted({entry["id"] for entry in entries}), 1)}


def _rows(
    results: Sequence[Result], images: Mapping[int, int], categories: Mapping[int, int]
) -> NDArray[np.float64]:
    """(N, 7) image, x, y, w, h, score, category: the library's fast way in."""
    rows = np.empty((len(results), 7))
    if len(results):
        rows[:, 0] = _looked_up("image_id", results, images)
        rows[:, 1:5] = [result["bbox"] for result in results]
        rows[:, 5] = [result["score"] for result in results]
        rows[:, 6] = _looked_up("category_id", results, categories)
    return rows


def _looked_up(key: str, results: Sequence[Result], numbers: Mapping[int, int]) -> list[int]:
    try:
        return [numbers[result[key]] for result in results]
    except KeyError as error:
        raise UserError(
            f"a detection has the {key} {error}, which the ground truth does not have; use the "
            "detections and the annotations of the same split"
        ) from None
