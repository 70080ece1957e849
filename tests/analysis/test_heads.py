"""Heads of unlike kinds on the same inputs, and HEAD's assistant from a run's own files."""

from dataclasses import replace

import pytest
import torch

from detdistill import HEAD, Distiller, UserError
from detdistill.analysis.heads import load_assistant, rows_on_boxes
from detdistill.analysis.pair import Pair
from detdistill.analysis.similarity import Similarity
from detdistill.engine.checkpoint import STATE, save_checkpoint
from detdistill.recipe import Recipe, dump_recipe
from tests.helpers import narrow

DENSE = ["assistant cls 1", "assistant cls 2", "assistant cls 3"]
DENSE += ["assistant box 1", "assistant box 2", "assistant box 3"]
CASCADE = [f"assistant {stage} fc {layer}" for stage in (1, 2, 3) for layer in (1, 2)]


def save_state(folder, distiller):
    """A checkpoint of which only the distiller is looked at."""
    save_checkpoint(folder / "last.ckpt", dict.fromkeys(STATE) | {"distiller": distiller})


def write_run(folder, student, teacher, taught=True, **options):
    """What a run of HEAD leaves, its assistant told apart from a fresh one."""
    models = [narrow(f"{name}_r18", 10, seed) for seed, name in enumerate((student, teacher))]
    method = HEAD(**options)
    distiller = Distiller(models[0], models[1] if taught else None, {"head": method})
    with torch.no_grad():
        for parameter in method.link.assistant.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder.mkdir()
    name = "runs/teacher" if taught else None
    recipe = Recipe(student=f"{student}_r18", teacher=name, methods={"head": options})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    save_state(folder, distiller.state_dict())
    return Pair(models[1], models[0]), method.link.assistant


@pytest.mark.parametrize(
    ("student", "teacher", "own", "stages"),
    [
        ("retinanet", "faster_rcnn", ["own head"], ["assistant fc 1", "assistant fc 2"]),
        ("fcos", "faster_rcnn", ["own head"], ["assistant fc 1", "assistant fc 2"]),
        ("retinanet", "reppoints", [], DENSE),
        ("faster_rcnn", "cascade_rcnn", ["own head"], CASCADE),
    ],
)
def test_the_assistant_of_a_run(student, teacher, own, stages, tmp_path, look):
    pair, trained = write_run(tmp_path / "run", student, teacher)
    assistant = load_assistant(tmp_path / "run", pair)
    for found, wanted in zip(assistant.parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, wanted) and not found.requires_grad
    part = Similarity(pair, assistant)
    for index in range(2):
        part.add(look(pair, index=index))
    found = part.numbers()["stages"]
    assert [name for name in found if name == "own head" or "assistant" in name] == own + stages
    assert all(-1 <= value <= 1 for name in own for value in found[name].values())


ALONE = {"taught": False, "akd": False, "ckd": False}


@pytest.mark.parametrize("teacher", ["faster_rcnn", "cascade_rcnn"])
def test_an_assistant_that_learned_without_a_teacher(teacher, tmp_path, look):
    pair, _ = write_run(tmp_path / "run", "retinanet", teacher, **ALONE)
    part = Similarity(pair, load_assistant(tmp_path / "run", pair))
    part.add(look(pair))
    assert [*part.numbers()["stages"]][-3:] == ["own head", "assistant fc 1", "assistant fc 2"]


def test_an_assistant_without_a_teacher_is_no_dense_head(tmp_path):
    pair, _ = write_run(tmp_path / "run", "retinanet", "reppoints", **ALONE)
    told = "learned without a teacher and is an R-CNN head .* such as a Faster R-CNN"
    with pytest.raises(UserError, match=told):
        load_assistant(tmp_path / "run", pair)


def test_all_look_at_the_same_boxes(look):
    """A fresh assistant is the teacher's head: on the teacher's own features both say the same."""
    teacher, student = narrow("cascade_rcnn_r18", 10), narrow("faster_rcnn_r18", 10, 1)
    pair, method = Pair(teacher, student), HEAD()
    method.prepare(student, teacher)
    sample = look(pair)
    on_equal = replace(sample, student=replace(sample.student, pyramid=sample.teacher.pyramid))
    rows = rows_on_boxes(pair, on_equal, method.link.assistant)
    assert list(rows) == ["own head", *CASCADE]
    for stage in CASCADE:
        assert torch.equal(*rows[stage]) and len(rows[stage][0]) > 3
    own = rows["own head"]
    assert len(own[0]) == len(own[1]) and not torch.equal(*own)


def test_a_dense_students_own_head_is_its_tower_where_a_box_came_from(make_pair, look):
    pair = make_pair("faster_rcnn_r18", "gfl_r18")
    sample = look(pair)
    [(name, (_, found))] = rows_on_boxes(pair, sample, None).items()
    rois = pair.student.propose(sample.student.dense, sample.targets.sizes, max_per_image=128)
    level, y, x, _ = rois.origin[0][5].tolist()
    assert name == "own head"
    assert torch.equal(found[5], sample.student.dense.towers["cls"][level][4][0, :, y, x])


def test_boxes_are_compared_where_the_teacher_looks_at_boxes(make_pair, look):
    pair = make_pair("gfl_r18", "faster_rcnn_r18")
    assert rows_on_boxes(pair, look(pair), None) == {}


def test_other_folders_have_no_assistant(tmp_path, make_pair):
    pair = make_pair()
    assert load_assistant(tmp_path, pair) is None
    assert load_assistant(tmp_path / "model.safetensors", pair) is None
    (tmp_path / "recipe.yaml").write_text(dump_recipe(Recipe(methods={"pkd": {}})))
    save_state(tmp_path, {})
    assert load_assistant(tmp_path, pair) is None


@pytest.mark.parametrize("teacher", ["cascade_rcnn_r18", "reppoints_r18", "retinanet_r18"])
def test_another_kind_of_teacher_is_told(teacher, tmp_path):
    pair, _ = write_run(tmp_path / "run", "retinanet", "faster_rcnn")
    other = Pair(narrow(teacher, 10), pair.student)
    with pytest.raises(UserError, match=rf"not of the kind of {teacher}'s head.*runs/teacher"):
        load_assistant(tmp_path / "run", other)
