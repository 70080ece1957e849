import pytest
import timm
import torch

from detdistill import create_method
from detdistill.distill.schedule import named_schedules
from detdistill.doctor.schedule import check_recipe, check_schedules, check_start, recipe_numbers
from detdistill.engine.build import new_student
from detdistill.recipe import Recipe
from tests.doctor.conftest import levels
from tests.helpers import narrow


def found_in(recipe, images=100, steps_per_epoch=10, total_steps=1000):
    return check_recipe(recipe, images, steps_per_epoch, total_steps)


def test_a_good_recipe():
    recipe = Recipe(batch_size=16, base_batch=8, lr=0.02, warmup_steps=50)
    rate, length, warmup = found_in(recipe)
    assert levels([rate, length, warmup]) == ["ok"] * 3
    assert "= 0.04" in rate.text
    assert "160.0 times" in length.text
    assert recipe_numbers(recipe, 10, 1000)["lr"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("steps", "level"), [(0, "ok"), (100, "ok"), (101, "warning"), (1000, "problem")]
)
def test_warmup(steps, level):
    *_, found = found_in(Recipe(warmup_steps=steps))
    assert found.level == level
    assert level == "ok" or "warmup_steps=50" in found.advice


@pytest.mark.parametrize(
    ("settings", "images", "total", "part"),
    [
        ({"batch_size": 200}, 100, 1000, "filled up"),
        ({"max_steps": 5}, 100, 5, "seen 0.4 times"),
        ({"optimizer": "adamw", "lr": 0.02}, 100, 1000, "much for adamw"),
        ({"schedule": "step", "milestones": [8, 200]}, 100, 1000, "milestones [200]"),
    ],
)
def test_what_does_not_suit(settings, images, total, part):
    recipe = Recipe(**{"warmup_steps": 0, **settings})
    bad = [f for f in found_in(recipe, images, total_steps=total) if f.level == "warning"]
    assert [part in finding.text for finding in bad] == [True]


def test_sizes_that_no_image_can_have():
    [wrong, *_] = found_in(Recipe(resize_short=[320, 640], warmup_steps=50))
    assert wrong.level == "problem" and "resize_short 640 is never reached" in wrong.text


def of_head(**options):
    method = create_method("head", **options)
    method.prepare(narrow("retinanet_r18"), narrow("faster_rcnn_r18"))
    return named_schedules({"head": method})


CKD_ALONE = {"akd": False, "ckd": True, "ckd_warmup": 0, "ckd_start": 500}
ASSISTANT = {"akd": False, "ckd": False}
WARM = {"assistant_warmup": True, "start": 5000, "warmup": 50}


@pytest.mark.parametrize("options", [{"warmup": 50}, ASSISTANT, CKD_ALONE, {**ASSISTANT, **WARM}])
def test_methods_that_act_in_time(options):
    assert check_schedules(of_head(**options), 1000) == []


@pytest.mark.parametrize(
    ("options", "level", "part"),
    [
        ({}, "problem", "reach 50%"),
        ({"warmup": 200}, "warning", "20% of the run"),
        ({"start": 1000}, "problem", "never"),
        ({"start": 500, "warmup": 1000}, "problem", "reach 50%"),
        ({"warmup": 9, "ckd_start": 1000}, "problem", "head's CKD starts at step 1000"),
        ({"warmup": 9, "ckd_warmup": 200}, "warning", "head's CKD warms up over 200 steps"),
        ({**ASSISTANT, **WARM, "warmup": 2000}, "problem", "head warms up over 2000 steps"),
    ],
)
def test_methods_that_act_too_late(options, level, part):
    [found] = check_schedules(of_head(**options), 1000)
    assert found.level == level and part in found.text
    own = next((key for key in options if key.startswith("ckd_")), "")
    assert f"--set methods.head.{own}" in found.advice


def test_a_full_backbone_without_imagenet_weights(tmp_path):
    assert check_start(narrow(), Recipe()) == []
    options = {"fpn_channels": 8, "tower_channels": 8}
    recipe = Recipe(student="gfl_r18", student_options=options)
    assert levels(check_start(new_student(recipe, ["cat"]), recipe)) == ["note"]
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, tmp_path / "r18.pth")
    options["backbone_weights"] = str(tmp_path / "r18.pth")
    recipe = Recipe(student="gfl_r18", student_options=options)
    assert check_start(new_student(recipe, ["cat"]), recipe) == []
