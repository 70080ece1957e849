"""COCO numbers against pycocotools: stored references and a live comparison."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detdistill.errors import UserError
from detdistill.evaluation.coco import NUMBERS, ap_gain_interval, coco_metrics, match_at_50

GOLDEN = Path(__file__).parent / "coco_golden"


def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def golden_truth():
    return read("gt")


def box_annotation(number, image_id, category_id, bbox, crowd=0):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": crowd,
    }


def tiny_truth():
    """Two images, sparse category ids, one box each."""
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in (3, 9)],
        "annotations": [
            box_annotation(1, 3, 7, [10, 10, 40, 40]),
            box_annotation(2, 9, 90, [20, 20, 30, 30]),
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}],
    }


def detection(image_id, category_id, bbox, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


@pytest.mark.parametrize("case", ["good", "poor", "ties"])
def test_golden_numbers_and_classes(golden_truth, case):
    found = coco_metrics(golden_truth, read(f"dets_{case}"))
    reference = read(f"ref_{case}")
    assert tuple(found.numbers) == NUMBERS
    assert found.numbers == pytest.approx(reference["stats"], abs=1e-9)
    ids = {c["name"]: str(c["id"]) for c in golden_truth["categories"]}
    by_id = {ids[name]: value for name, value in found.per_class.items()}
    expected = {k: -1.0 if v is None else v for k, v in reference["AP_per_category_id"].items()}
    assert by_id == pytest.approx(expected, abs=1e-9)


def test_order_among_equal_scores_counts(golden_truth):
    ties = read("dets_ties")
    turned = coco_metrics(golden_truth, ties[::-1]).numbers["AP"]
    assert abs(turned - coco_metrics(golden_truth, ties).numbers["AP"]) > 1e-6


def random_study(seed):
    """Random truth with crowds and detections, some of them on the boxes, on 12 images."""
    random = np.random.default_rng(seed)
    truth = {
        "images": [{"id": i, "width": 400, "height": 300} for i in range(12)],
        "annotations": [],
        "categories": [{"id": k, "name": str(k)} for k in (2, 5, 11)],
    }
    results = []
    for image in range(11):  # the last image stays empty
        for _ in range(int(random.integers(1, 15))):
            box = (random.random(4) * [250, 150, 140, 140] + [0, 0, 4, 4]).tolist()
            category = int(random.choice([2, 5, 11]))
            number = len(truth["annotations"]) + 1
            crowd = int(random.random() < 0.1)
            truth["annotations"].append(box_annotation(number, image, category, box, crowd))
            for _ in range(int(random.integers(0, 20))):
                moved = (np.array(box) + random.normal(0, 6, 4)).clip(1).tolist()
                results.append(detection(image, category, moved, round(random.random(), 2)))
    return truth, results


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_as_pycocotools(seed):
    truth, results = random_study(seed)
    oracle = COCO()
    oracle.dataset = json.loads(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        oracle.createIndex()
        evaluation = COCOeval(oracle, oracle.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert list(coco_metrics(truth, results).numbers.values()) == pytest.approx(
        evaluation.stats.tolist(), abs=1e-9
    )


def test_no_detections_is_zero_where_there_is_truth():
    found = coco_metrics(tiny_truth(), [])
    assert found.numbers["AP"] == 0 and found.numbers["ARm"] == 0
    assert found.numbers["APl"] == -1  # no large box in the truth
    assert found.per_class == {"cat": 0.0, "dog": 0.0}


def test_no_truth_is_undefined():
    truth = {**tiny_truth(), "annotations": []}
    for results in ([], [detection(3, 7, [0, 0, 9, 9], 0.9)]):
        found = coco_metrics(truth, results)
        assert set(found.numbers.values()) == {-1.0}
        assert found.per_class == {"cat": -1.0, "dog": -1.0}


def test_annotation_ids_do_not_matter():
    results = [detection(3, 7, [10, 10, 40, 40], 0.9), detection(9, 90, [20, 20, 30, 20], 0.8)]
    plain = coco_metrics(tiny_truth(), results)
    strange = tiny_truth()
    for annotation in strange["annotations"]:
        annotation["id"] = 0
    assert coco_metrics(strange, results) == plain
    assert 0 < plain.numbers["AP"] < 1


def renamed(entries, images, categories):
    """The same with other image and category ids."""
    named = {"image_id": images, "category_id": categories}
    return [
        entry | {key: ids[entry[key]] for key, ids in named.items() if key in entry}
        for entry in entries
    ]


@pytest.mark.parametrize("base", [2**60, 2**70, -5, -(2**60)])
def test_any_integer_is_an_id(base):
    truth, results = random_study(0)
    images = {i: base + i for i in range(12)}
    categories = {k: base + k for k in (2, 5, 11)}
    other = {
        "images": [image | {"id": images[image["id"]]} for image in truth["images"]],
        "annotations": renamed(truth["annotations"], images, categories),
        "categories": [{**c, "id": categories[c["id"]]} for c in truth["categories"]],
    }
    found = renamed(results, images, categories)
    assert coco_metrics(other, found) == coco_metrics(truth, results)
    assert match_at_50(other, found) == match_at_50(truth, results)


def test_detections_of_other_images_are_refused():
    for stray in (detection(4, 7, [1, 1, 9, 9], 0.5), detection(3, 8, [1, 1, 9, 9], 0.5)):
        with pytest.raises(UserError, match=r"(image_id 4|category_id 8), which the ground truth"):
            coco_metrics(tiny_truth(), [stray])


def test_classes_of_one_name_stay_apart():
    truth = tiny_truth()
    truth["categories"].append({"id": 91, "name": "dog"})
    found = coco_metrics(truth, [detection(9, 90, [20, 20, 30, 30], 0.8)])
    assert found.numbers["AP"] == pytest.approx(0.5)


def test_matches_name_the_finder_and_leave_crowds_out():
    truth = tiny_truth()
    truth["annotations"].append(box_annotation(5, 9, 7, [60, 60, 30, 30], crowd=1))
    results = [
        detection(9, 90, [20, 20, 30, 20], 0.4),  # fits, but a better one follows
        detection(9, 90, [20, 20, 30, 30], 0.9),
        detection(3, 90, [10, 10, 40, 40], 0.8),  # of another class
        detection(9, 7, [62, 62, 20, 20], 0.7),  # on the crowd
    ]
    found = match_at_50(truth, results)
    assert found.correct == [False, True, False, None]
    assert found.found_by == [None, 1, None]
    assert match_at_50(truth, []).found_by == [None, None, None]


def test_matches_without_truth_are_all_wrong():
    truth = {**tiny_truth(), "annotations": []}
    found = match_at_50(truth, [detection(3, 7, [0, 0, 9, 9], 0.9)])
    assert found.correct == [False] and found.found_by == []


def test_a_score_limit_changes_no_match(golden_truth):
    results = read("dets_ties")
    everything = match_at_50(golden_truth, results)
    kept = [i for i, result in enumerate(results) if result["score"] >= 0.5]
    some = match_at_50(golden_truth, [results[i] for i in kept])
    assert some.correct == [everything.correct[i] for i in kept]
    assert any(some.correct) and not all(some.correct)


def test_gain_interval_holds_the_gain_and_is_repeatable(golden_truth):
    poor, good = read("dets_poor"), read("dets_good")
    low, high = ap_gain_interval(golden_truth, poor, good, samples=20)
    gain = read("ref_good")["stats"]["AP"] - read("ref_poor")["stats"]["AP"]
    assert gain - 0.1 < low < gain < high < gain + 0.1
    assert ap_gain_interval(golden_truth, poor, good, samples=20) == (low, high)
    assert ap_gain_interval(golden_truth, good, good, samples=5) == (0, 0)
    assert ap_gain_interval({**golden_truth, "annotations": []}, poor, good) is None


def test_nothing_is_printed(capfd):
    coco_metrics(tiny_truth(), [detection(3, 7, [10, 10, 40, 40], 0.9)])
    coco_metrics(tiny_truth(), [])
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
