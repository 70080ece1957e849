"""The whole way from a data set to numbers."""

import json
from dataclasses import replace

import pytest
import torch

from detdistill.analysis.pair import Pair
from detdistill.analysis.run import analyze
from detdistill.errors import UserError
from tests.helpers import narrow


def pair_of(teacher="gfl_r18", student="gfl_r18", **options):
    return Pair(narrow(teacher, 10, 0), narrow(student, 10, 1, **options))


def test_every_part_is_measured(dataset, recipe):
    seen = []
    found = analyze(pair_of(), dataset, recipe, progress=seen.append)
    numbers = found.numbers()
    assert seen == [1] * 6
    assert numbers["images"] == 6
    assert numbers["objects"] == sum(int((~r.crowd).sum()) for r in dataset.records)
    assert numbers["ranks"]["objects"] == numbers["objects"]
    assert numbers["left_out"] == {}
    assert numbers["conflict"]["all"]["places"] == 6 * (64 + 16 + 4 + 1 + 1)
    json.dumps(numbers, allow_nan=False)


def test_the_same_again(dataset, recipe):
    pair = pair_of("retinanet_r18", "retinanet_r18")
    first, second = (analyze(pair, dataset, recipe).numbers() for _ in range(2))
    assert first == second


def test_the_batch_size_of_the_recipe_changes_nothing(dataset, recipe):
    pair = pair_of()
    other = recipe.model_copy(update={"eval_batch": 4})
    assert analyze(pair, dataset, recipe).numbers() == analyze(pair, dataset, other).numbers()


def test_a_part_of_the_images(dataset, recipe):
    found = analyze(pair_of(), dataset, recipe, images=2, examples=0)
    assert found.images == 2
    assert found.conflict.examples.items() == []


@pytest.mark.parametrize(
    ("teacher", "student", "left_out"),
    [
        ("retinanet_r18", "gfl_r18", {"ranks"}),
        ("fcos_r18", "retinanet_r18", {"ranks"}),
        ("atss_r18", "gfl_r18", set()),
    ],
)
def test_unlike_heads(teacher, student, left_out, dataset, recipe):
    numbers = analyze(pair_of(teacher, student), dataset, recipe, images=2).numbers()
    assert set(numbers["left_out"]) == left_out
    for part in ("conflict", "ranks", "imitation"):
        assert (numbers[part] is None) == (part in left_out)


def test_a_two_stage_teacher(dataset, recipe):
    pair = pair_of("faster_rcnn_r18")
    numbers = analyze(pair, dataset, recipe, images=3).numbers()
    assert set(numbers["left_out"]) == {"conflict", "ranks", "imitation"}
    stages = numbers["similarity"]["stages"]
    assert list(stages) == ["backbone", "pyramid", "own head"]
    assert list(stages["backbone"]) == list(stages["pyramid"])[:3] == ["8", "16", "32"]
    assert list(stages["own head"]) == ["boxes"]


def test_labels_follow_the_models_names(dataset, recipe):
    """A data set may number its classes otherwise than the models do."""
    pair = pair_of()
    plain = analyze(pair, dataset, recipe).numbers()
    for model in (pair.teacher, pair.student):
        model.classes = list(dataset.classes)
    turned = [replace(r, labels=9 - r.labels) for r in dataset.records]
    renamed = replace(
        dataset,
        records=turned,
        classes=dataset.classes[::-1],
        category_ids=dataset.category_ids[::-1],
    )
    assert analyze(pair, renamed, recipe).numbers() == plain


def test_data_of_another_task_is_refused(dataset, recipe):
    with pytest.raises(UserError, match="knows 3 classes"):
        analyze(Pair(narrow(), narrow()), dataset, recipe)


def test_crowds_are_no_objects(dataset, recipe):
    records = [replace(r, crowd=torch.ones_like(r.crowd)) for r in dataset.records]
    crowds = replace(dataset, records=records)
    numbers = analyze(pair_of(), crowds, recipe).numbers()
    assert numbers["objects"] == 0
    assert numbers["conflict"]["positives"]["share"] is None
    assert numbers["ranks"]["all"]["tau"] is None
