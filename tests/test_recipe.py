"""Recipes: what is refused, and what the sentence names."""

from __future__ import annotations

from pathlib import Path

import pytest

from detdistill.errors import UserError
from detdistill.recipe import read_yaml, resolve_recipe, split_teacher, validate_recipe


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"lr": float("nan")}, "lr"),
        ({"lr": "inf"}, "lr"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"scale_jitter": [0.5, float("inf")]}, r"scale_jitter\.1"),
        ({"flip": float("nan")}, "flip"),
        ({"epochs": True}, "epochs"),
        ({"lr": True}, "lr"),
        ({"resize_short": [True]}, r"resize_short\.0"),
        ({"seed": 2**63}, "seed"),
        ({"methods": {"crosskd": 3}}, r"methods\.crosskd"),
        ({"student_options": {1: 2}}, r"student_options\.1"),
        ({"lr": 1e300}, "lr"),
        ({"weight_decay": 1e300}, "weight_decay"),
        ({"workers": 10**5}, "workers"),
        ({"batch_size": 10**9}, "batch_size"),
        ({"resize_short": [1]}, r"resize_short\.0"),
        ({"resize_long": 10**9}, "resize_long"),
        ({"scale_jitter": [1e-4, 1]}, r"scale_jitter \[0.0001, 1.0\] makes sides of 0 to 544"),
        ({"scale_jitter": [0.5, 1e6]}, r"scale_jitter .* makes sides of 160 to 544000000"),
        ({"student_options": {"num_classes": 3}}, "student_options: 'num_classes' is no option"),
        ({"methods": {"crosskd": {"name": "a"}}}, r"methods\.crosskd: 'name' is no option"),
        ({"bias_lr_factor": 0}, "bias_lr_factor: "),
        ({"bias_lr_factor": 1e300}, "bias_lr_factor: "),
        ({"bias_lr_factor": None}, "bias_lr_factor: "),
        ({"bias_weight_decay": -1}, "bias_weight_decay: "),
        ({"bias_weight_decay": True}, "bias_weight_decay: "),
        ({"warmup": "cosine"}, "warmup: .*'linear' or 'constant'"),
        ({"warmup": "constant", "warmup_start": 0}, "warmup 'constant' needs a warmup_start above"),
        ({"Bach_Size": 3}, "unknown key 'Bach_Size'; did you mean 'batch_size'"),
        ({"bach_size": 3}, "unknown key 'bach_size'; did you mean 'batch_size'"),
    ],
)
def test_refused_with_file_and_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(UserError, match=f"^mine.yaml: {field}"):
        validate_recipe(values, "mine.yaml")


def test_numbers_may_be_texts(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-3\nepochs: '7'\nscale_jitter: [5e-1, 2]\nstrict: true\n")
    recipe = resolve_recipe(read_yaml(file), "mine.yaml", assignments=["weight_decay=1e-5"])
    assert (recipe.lr, recipe.epochs, recipe.scale_jitter) == (1e-3, 7, [0.5, 2.0])
    assert recipe.weight_decay == 1e-5 and recipe.strict


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "lr"),
        ("methods:\n  crosskd: {depth: 1}\n  crosskd: {depth: 2}\n", "crosskd"),
        ("student_options: {norm_eval: true, norm_eval: false}", "norm_eval"),
    ],
)
def test_a_key_occurs_once(text: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"mine.yaml: the key '{key}' occurs twice"):
        read_yaml(file)


@pytest.mark.parametrize("text", ["a: [", "lr: 2024-99-99", "{a: 1}: 2", "- 1", "\tlr: 1"])
def test_what_is_no_recipe(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml: ") as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "assignments", "start"),
    [
        ({}, [], "mine.yaml: lr: "),
        ({}, ["lr=abc"], "--set lr=abc: lr: "),
        ({}, ["lr=abc", "lr=-1"], "--set lr=-1: lr: "),
        ({}, ["lr=1", "methods.crosskd=3"], "--set methods.crosskd=3: methods.crosskd: "),
        ({}, ["lr=1", "ls=1"], "--set ls=1: unknown key 'ls'"),
        ({}, ["lr={a: 1, a: 2}"], "--set lr={a: 1, a: 2}: the key 'a' occurs twice"),
        ({}, ["lr.a=1"], "--set lr.a=1: lr is 0, not a group"),
        ({}, ["student_options.=1"], "--set student_options.=1: expected key=value"),
        ({"devices": 0}, ["lr=1"], "--devices 0: devices: "),
    ],
)
def test_the_sentence_names_where_a_value_is_from(
    given: dict[str, object], assignments: list[str], start: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve_recipe({"lr": 0}, "mine.yaml", given, assignments)
    assert str(caught.value).startswith(start)


def test_assignments_leave_the_callers_values_alone() -> None:
    values = {"student_options": {"norm_eval": True}}
    recipe = resolve_recipe(values, "mine.yaml", {"lr": None}, ["student_options.tower_depth=2"])
    assert recipe.student_options == {"norm_eval": True, "tower_depth": 2}
    assert values == {"student_options": {"norm_eval": True}}


def test_a_teacher_is_a_path_or_a_name_with_one(tmp_path: Path) -> None:
    odd = tmp_path / "lr=0.1"
    odd.mkdir()
    assert split_teacher(str(odd)) == (None, odd)
    assert split_teacher("gfl_r101=a.pth") == ("gfl_r101", Path("a.pth"))
    assert split_teacher("runs/teacher") == (None, Path("runs/teacher"))


@pytest.mark.parametrize("arm", ["student", "a/b", "", "empty"])
def test_an_arm_that_is_no_name_or_has_no_method_is_refused(arm):
    methods = {} if arm == "empty" else {"crosskd": {}}
    with pytest.raises(UserError, match="needs another name"):
        validate_recipe({"arms": {arm: methods}}, "mine.yaml")


def test_a_text_names_each_method_once() -> None:
    recipe = validate_recipe({"methods": {"pkd": {"weight": 3}}}, "mine.yaml")
    assert recipe.methods_of("crosskd+pkd") == {"crosskd": {}, "pkd": {"weight": 3}}
    with pytest.raises(
        UserError, match=r"^pkd\+crosskd\+pkd names pkd more than once: name it once"
    ):
        recipe.methods_of("pkd+crosskd+pkd")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("class_map.car=-1", r"^--set class_map.car=-1: class_map.car: expected what the teacher"),
        ("class_map.car=true", r"class_map.car: expected .* from 0 on; .*\(found True\)"),
        ("class_map.v1.5=car", r"class_map.v1: .* in braces: --set 'class_map=\{\"v1.5\": NAME\}'"),
        ("class_map={0: car}", "class_map: YAML reads the class 0 as no text: put its name in quo"),
        ("class_map=[car]", "class_map: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_class_map_is_told_in_plain_words(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        resolve_recipe({}, "mine.yaml", assignments=[given])
    assert "function-" not in str(refusal.value)


def test_a_class_map_has_names_and_labels() -> None:
    recipe = resolve_recipe({}, "", assignments=["class_map={v1.5: cow, '0': '3', dog: 2}"])
    assert recipe.class_map == {"v1.5": "cow", "0": "3", "dog": 2}
