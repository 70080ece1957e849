"""A whole study with fabricated training: which runs, with which settings, resumed how."""

import json
import shutil
import sys
import warnings

import pytest
import yaml

from detdistill.engine import checkpoint
from detdistill.errors import UserError, UserNotice
from tests.helpers import BROKEN, break_an_image
from tests.study.fabricated_study import TINY, run_study


def recipe_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_runs_and_files(recipe, world, tmp_path, capsys):
    out = tmp_path / "study"
    arms = run_study(recipe, out)
    assert world.trained == [
        "teacher/teacher",
        *("student/seed0", "crosskd/seed0", "student_same_time/seed0"),
        *("student/seed1", "crosskd/seed1", "student_same_time/seed1"),
    ]
    assert [arm.title for arm in arms] == ["teacher", "student", "CrossKD", "student, same time"]
    assert [len(arm.runs) for arm in arms] == [1, 2, 2, 2]
    results = json.loads((out / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == [arm.name for arm in arms]
    gains = results["arms"][2]["ap_gains"]
    for seed, gain in enumerate(gains):
        tested = [json.loads((out / f"runs/{a}/seed{seed}/test.json").read_text()) for a in PAIR]
        assert gain == pytest.approx(tested[0]["numbers"]["AP"] - tested[1]["numbers"]["AP"])
    assert results["arms"][2]["runs"][0]["folder"] == "runs/crosskd/seed0"
    assert (out / "results.md").read_text().startswith("# Results\n\n|")
    assert "CrossKD" in capsys.readouterr().out
    assert not list(out.rglob("*.tmp"))


PAIR = ("crosskd", "student")


def test_arms_differ_in_nothing_but_the_method(recipe, world, tmp_path):
    out = tmp_path / "study"
    given = recipe.model_copy(update={"methods": {"crosskd": {"depth": 0}}})
    run_study(given, out)
    control = recipe_of(out / "runs/student/seed1")
    taught = recipe_of(out / "runs/crosskd/seed1")
    assert control["methods"] == {} and control["teacher"] is None
    assert taught["methods"] == {"crosskd": {"depth": 0}}
    assert taught["teacher"] == str((out / "teacher").resolve())
    differing = {key for key in control if control[key] != taught[key]}
    assert differing == {"methods", "teacher"}
    assert control["seed"] == 1
    longer = recipe_of(out / "runs/student_same_time/seed1")
    assert {key for key in control if control[key] != longer[key]} == {"epochs"}
    assert longer["epochs"] == 12  # 8 epochs, 150 s against 100 s


def test_named_arms_hold_the_methods_that_the_recipe_gives_them(recipe, world, tmp_path):
    out = tmp_path / "study"
    arms = {"deep": {"crosskd": {"depth": 1}}, "crosskd-early": {"crosskd": {"stop": 9}}}
    given = recipe.model_copy(update={"arms": arms})
    world.skills |= {"deep": 0.7, "crosskd-early": 0.6}
    world.seconds |= {"deep": 150, "crosskd-early": 120}
    rows = run_study(given, out, methods=["deep", "crosskd-early"], seeds=[0])
    assert [row.title for row in rows[2:4]] == ["deep", "crosskd-early"]
    for name, methods in arms.items():
        run = recipe_of(out / f"runs/{name}/seed0")
        assert (run["methods"], run["arms"]) == (methods, {})
    with pytest.raises(UserError, match=r"arm deep .* asked for is {'crosskd': {'depth': 0}}"):
        changed = given.model_copy(update={"arms": {"deep": {"crosskd": {"depth": 0}}}})
        run_study(changed, out, methods=["deep"], seeds=[0])


def test_the_teacher_is_trained_by_the_recipe_with_its_own_options(recipe, world, tmp_path):
    out = tmp_path / "study"
    changes = {"schedule": "step", "milestones": [4, 6], "seed": 3}
    run_study(recipe.model_copy(update=changes), out, teacher_epochs=16)
    teacher = recipe_of(out / "teacher")
    assert teacher["student"] == "gfl_r34" and teacher["student_options"] == TINY
    assert teacher["epochs"] == 16 and teacher["milestones"] == [8, 12]
    assert teacher["seed"] == 0 and teacher["methods"] == {}


def test_methods_without_a_teacher_make_a_study_without_one(recipe, world, tmp_path):
    out = tmp_path / "study"
    arms = run_study(recipe, out, teacher=None, methods=["tf_head"])
    assert world.trained[:3] == ["student/seed0", "tf_head/seed0", "student_same_time/seed0"]
    assert [arm.kind for arm in arms] == ["control", "method", "same_time"]
    assert recipe_of(out / "runs/tf_head/seed1")["teacher"] is None
    results = json.loads((out / "results.json").read_text())
    assert results["facts"]["teacher"] == "none" and not (out / "teacher").exists()
    assert "gap" not in (out / "results.md").read_text().lower()
    with pytest.raises(UserError, match=r"teacher None, asked for is 'gfl_r34'"):
        run_study(recipe, out, methods=["tf_head"])


def test_a_study_with_a_teacher_holds_methods_without_one(recipe, world, tmp_path):
    arms = run_study(recipe, tmp_path / "study", methods=["crosskd", "tf_head"], seeds=[0])
    titles = ["teacher", "student", "CrossKD", "TF-HEAD", "student, same time"]
    assert [arm.title for arm in arms] == titles


def test_a_second_call_trains_and_tests_nothing(recipe, world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out)
    before = (out / "results.json").read_bytes()
    world.trained.clear()
    world.loaded.clear()
    run_study(recipe, out)
    assert world.trained == [] and world.loaded == []
    assert (out / "results.json").read_bytes() == before


def test_a_setting_that_is_newer_than_the_study_had_its_default(recipe, world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out)
    world.trained.clear()
    for stored in out.rglob("recipe.yaml"):
        stored.write_text(stored.read_text().replace("drop_empty: false\n", ""))
    state = json.loads((out / "study.json").read_text())
    assert state["recipe"].pop("drop_empty") is False
    (out / "study.json").write_text(json.dumps(state))
    run_study(recipe, out)
    assert world.trained == []
    with pytest.raises(UserError, match="holds a study with drop_empty"):
        run_study(recipe.model_copy(update={"drop_empty": True}), out)


def test_an_interrupted_study_goes_on(recipe, world, tmp_path):
    out = tmp_path / "study"
    world.die_at = "crosskd/seed0"
    with pytest.raises(KeyboardInterrupt):
        run_study(recipe, out)
    state = json.loads((out / "study.json").read_text())
    assert state["runs"]["runs/student/seed0"] == "done"
    assert state["runs"]["runs/crosskd/seed0"] == "training"
    world.die_at = None
    world.trained.clear()
    run_study(recipe, out)
    assert world.trained[0] == "crosskd/seed0" and "student/seed0" not in world.trained
    assert "teacher/teacher" not in world.trained


def test_new_weights_in_a_run_folder_are_tested_anew(recipe, world, tmp_path):
    out = tmp_path / "study"
    old = run_study(recipe, out)[2].runs[0].numbers["AP"]
    weights = out / "runs/crosskd/seed0/model.safetensors"
    weights.write_text(weights.read_text().replace("0.7", "0.1"))
    world.loaded.clear()
    assert run_study(recipe, out)[2].runs[0].numbers["AP"] < old
    assert world.loaded == ["crosskd/seed0"]


def test_seeds_may_be_added(recipe, world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, seeds=[0])
    world.trained.clear()
    arms = run_study(recipe, out, seeds=[0, 4])
    assert world.trained == ["student/seed4", "crosskd/seed4", "student_same_time/seed4"]
    assert [run.seed for run in arms[1].runs] == [0, 4]


def test_only_what_is_left_to_train_is_announced_and_counted(recipe, world, tmp_path):
    out, lines = tmp_path / "study", []
    run_study(recipe, out, seeds=[0], on_status=lines.append)
    announced = [line for line in lines if "to go" in line]
    assert announced[0] == "teacher: training (4 runs to go)"
    assert announced[-1].startswith("runs/student_same_time/seed0: training (1 run to go, about ")
    world.skills["pkd"] = 0.6
    lines.clear()
    run_study(recipe, out, seeds=[0, 4], methods=["crosskd", "pkd"], on_status=lines.append)
    announced = [line.split(", about")[0].rstrip(")") for line in lines if "to go" in line]
    assert announced == [
        "runs/pkd/seed0: training (5 runs to go",
        "runs/student/seed4: training (4 runs to go",
        "runs/crosskd/seed4: training (3 runs to go",
        "runs/pkd/seed4: training (2 runs to go",
        "runs/student_same_time/seed4: training (1 run to go",
    ]


def test_a_control_that_was_trained_while_tuning_is_only_tested(recipe, world, tmp_path):
    lines = []
    run_study(recipe, tmp_path / "study", tune_lr=True, seeds=[0], on_status=lines.append)
    assert any(line.startswith("runs/student/seed0: testing (") for line in lines)
    assert any(line.startswith("runs/crosskd/seed0: training (") for line in lines)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, "lr 0.02, asked for is 0.5"),
        ({"epochs": 9}, "epochs 8, asked for is 9"),
        ({"methods": {"crosskd": {"depth": 1}}}, "arm crosskd .*, asked for is .*{'depth': 1}"),
    ],
)
@pytest.mark.parametrize("methods", [{}, {"crosskd": {}}])
def test_another_study_in_the_folder_is_refused(recipe, world, tmp_path, change, named, methods):
    out = tmp_path / "study"
    first = recipe.model_copy(update={"methods": methods})
    run_study(first, out, seeds=[0])
    before = (out / "study.json").read_bytes()
    with pytest.raises(UserError, match=f"study.json: .* {named}"):
        run_study(first.model_copy(update=change), out, seeds=[0])
    assert (out / "study.json").read_bytes() == before


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_study_rests_on_the_same_data(recipe, data_folder, world, tmp_path, split):
    folder, out = shutil.copytree(data_folder, tmp_path / "data"), tmp_path / "study"
    given = recipe.model_copy(update={"data": str(folder)})
    run_study(given, out, seeds=[0])
    path = folder / "annotations" / f"{split}.json"
    values = json.loads(path.read_text())
    values["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"study\.json: the {split} data .* changed since"):
        run_study(given, out, seeds=[0])


def test_a_damaged_study_is_named(recipe, world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, seeds=[0])
    (out / "study.json").write_text('{"recipe"')
    with pytest.raises(UserError, match=r"study\.json: damaged"):
        run_study(recipe, out, seeds=[0])


def test_one_study_at_a_time_in_a_folder(recipe, world, tmp_path, monkeypatch):
    out = tmp_path / "study"
    run_study(recipe, out, seeds=[0])
    monkeypatch.setattr(checkpoint, "LOCK_TRIES", 1)
    with (
        checkpoint.exclusive(out),
        pytest.raises(UserError, match="another process is writing there"),
    ):
        run_study(recipe, out, seeds=[0])
    run_study(recipe, out, seeds=[0])


def test_settings_that_change_no_result_may_change(recipe, world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, seeds=[0])
    run_study(recipe.model_copy(update={"workers": 1, "seed": 9, "log_every": 5}), out, seeds=[0])


def test_a_folder_with_something_else_is_refused(recipe, world, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("")
    monkeypatch.setattr("detdistill.study.compare.check_study", None)  # before that takes its time
    with pytest.raises(UserError, match=r"no study\.json"):
        run_study(recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["croskd"]}, "did you mean 'crosskd'"),
        ({"methods": ["crosskd", "pkd+pkd"]}, r"^pkd\+pkd names pkd more than once"),
        ({"methods": []}, "nothing to compare"),
        ({"seeds": []}, "nothing to compare"),
        ({"seeds": [-1]}, "from 0 on"),
        ({"teacher": "runs/absent"}, "runs/absent: no such teacher"),
        ({"teacher": "absent.pth"}, "absent.pth: no such teacher"),
        ({"teacher": "gfl_r5"}, "gfl_r5"),
        ({"teacher": None, "methods": ["tf_head", "crosskd"]}, "crosskd needs a teacher"),
    ],
)
def test_bad_input_leaves_nothing_behind(recipe, world, tmp_path, change, message):
    out = tmp_path / "study"
    with pytest.raises(UserError, match=message):
        run_study(recipe, out, **change)
    assert not out.exists() and world.trained == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16", "accelerator": "cpu"}, "precision fp16"),
        ({"accelerator": "cuda", "devices": 99}, "99 CUDA devices"),
        ({"trackers": ["trackio"]}, "trackio"),
    ],
)
def test_what_this_machine_lacks_is_told_before_a_study_is_fixed(
    recipe, world, tmp_path, monkeypatch, change, message
):
    monkeypatch.setitem(sys.modules, "trackio", None)  # not installed
    with pytest.raises(UserError, match=message):
        run_study(recipe.model_copy(update=change), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_test_split_with_nothing_to_find(recipe, world, tmp_path, data_folder):
    values = json.loads((data_folder / "annotations/test.json").read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(values | {"annotations": []}))
    explicit = {"test_images": str(data_folder / "images"), "test_annotations": str(empty)}
    with pytest.raises(UserError, match=r"empty\.json: no test image has a usable box"):
        run_study(recipe.model_copy(update=explicit), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_broken_image_is_found_before_any_training(recipe, world, tmp_path, data_folder, split):
    folder, out = shutil.copytree(data_folder, tmp_path / "mine"), tmp_path / "study"
    break_an_image(folder, split)
    with pytest.raises(UserError, match=BROKEN):
        run_study(recipe.model_copy(update={"data": str(folder)}), out)
    assert not out.exists() and world.trained == []


def test_a_new_study_tells_of_its_schedule(recipe, world, tmp_path):
    endless = recipe.model_copy(update={"warmup_steps": 10**6})
    with pytest.warns(UserNotice, match="warmup_steps 1000000 in a run of"):
        run_study(endless, tmp_path / "study")
    with warnings.catch_warnings(action="error", category=UserNotice):
        run_study(endless, tmp_path / "study")


def test_faults_of_the_test_split_are_told(recipe, world, tmp_path, data_folder, capsys):
    values = json.loads((data_folder / "annotations/test.json").read_text())
    values["annotations"].append({"id": 10**6, "image_id": 10**5, "category_id": 1})
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(values))
    explicit = {"test_images": str(data_folder / "images"), "test_annotations": str(odd)}
    run_study(recipe.model_copy(update=explicit), tmp_path / "study", seeds=[0])
    assert "odd.json: 1 fault: image 100000" in capsys.readouterr().err


def test_without_a_test_split(recipe, world, tmp_path, data_folder):
    explicit = {
        "data": None,
        "train_images": str(data_folder / "images"),
        "train_annotations": str(data_folder / "annotations/train.json"),
        "val_images": str(data_folder / "images"),
        "val_annotations": str(data_folder / "annotations/val.json"),
    }
    with pytest.raises(UserError, match="test"):
        run_study(recipe.model_copy(update=explicit), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_an_existing_teacher_is_tested_not_trained(recipe, world, tmp_path, monkeypatch):
    import detdistill.study.check as check

    run = tmp_path / "my_teacher"
    world.train(recipe, run.with_name("teacher"))
    run.with_name("teacher").rename(run)
    world.trained.clear()
    monkeypatch.setattr(check, "existing_teacher", lambda *_: check.create_detector("gfl_r18", 3))
    before = sorted(path.name for path in run.iterdir())
    arms = run_study(recipe, tmp_path / "study", teacher=str(run), seeds=[0])
    assert "teacher/teacher" not in world.trained
    assert sorted(path.name for path in run.iterdir()) == before, "the user's folder is his own"
    assert arms[0].seconds is None
    assert recipe_of(tmp_path / "study/runs/crosskd/seed0")["teacher"] == str(run)
    (run / "model.safetensors").write_text("another")
    with pytest.raises(UserError, match="the teacher changed since this study began"):
        run_study(recipe, tmp_path / "study", teacher=str(run), seeds=[0])


def test_equal_times_need_no_second_control(recipe, world, tmp_path):
    world.seconds["crosskd"] = 103
    arms = run_study(recipe, tmp_path / "study", seeds=[0])
    assert "student_same_time/seed0" not in world.trained
    assert arms[-1].runs == arms[1].runs
    assert "took no longer than the student alone" in (tmp_path / "study/results.md").read_text()


@pytest.mark.parametrize(("student", "epochs"), [(50, 24), (None, 12)])
def test_processor_time_counts_where_all_runs_know_it(recipe, world, tmp_path, student, epochs):
    world.processor_seconds = {"student": student, "crosskd": 150}
    arms = run_study(recipe, tmp_path / "study", seeds=[0])
    assert [run.epochs for run in arms[-1].runs] == [epochs]
    assert arms[1].seconds == 100, "what is told is the time of the clock"


def test_part_of_an_epoch_more_counts_as_one(recipe, world, tmp_path):
    world.seconds["crosskd"] = 113
    arms = run_study(recipe, tmp_path / "study", seeds=[0])
    assert [run.epochs for run in arms[-1].runs] == [9]  # of 8


def test_a_control_that_lacks_less_than_half_an_epoch_is_not_trained_again(recipe, world, tmp_path):
    """Studies of before had rounded to the nearest epoch."""
    world.seconds["crosskd"] = 118
    arms = run_study(recipe, tmp_path / "study", seeds=[0])
    assert [run.epochs for run in arms[-1].runs] == [10]  # 9.04 are needed
    path = tmp_path / "study/runs/student_same_time/seed0/recipe.yaml"
    path.write_text(path.read_text().replace("epochs: 10", "epochs: 9"))
    arms = run_study(recipe, tmp_path / "study", seeds=[0])
    assert [run.epochs for run in arms[-1].runs] == [9]
    assert not path.parent.with_name("seed0_9_epochs").exists()


def test_a_control_of_the_length_that_is_asked_for_is_never_outgrown(recipe, world, tmp_path):
    """Of 31.68 epochs 0.8 are noise, so that 31 do, and 32 would be the nearest."""
    world.seconds["crosskd"] = 198
    recipe = recipe.model_copy(update={"epochs": 16})
    run_study(recipe, tmp_path / "study", seeds=[0])
    world.trained.clear()
    arms = run_study(recipe, tmp_path / "study", seeds=[0])
    assert [run.epochs for run in arms[-1].runs] == [31] and world.trained == []


def test_a_slower_method_moves_the_same_time_control(recipe, world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, seeds=[0])
    world.seconds["crosskd+pkd"] = 200
    world.skills["crosskd+pkd"] = 0.7
    arms = run_study(recipe, out, seeds=[0], methods=["crosskd", "crosskd+pkd"])
    assert arms[-1].runs[0].epochs == 16
    assert (out / "runs/student_same_time/seed0_12_epochs/test.json").exists()
    # Leaving the slow one out again keeps the longer control.
    assert run_study(recipe, out, seeds=[0])[-1].runs[0].epochs == 16
    told = json.loads((out / "results.json").read_text())["verdict"][-1]
    assert "time of a slower method (2 x the epochs; CrossKD itself took 1.5 x the" in told
