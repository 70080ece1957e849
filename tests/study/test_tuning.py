"""The learning rate that is best for the student alone: what is tried, and a study at it."""

import json
import math
import shutil

import pytest
import yaml

from detdistill.errors import DivergedError, UserError
from detdistill.recipe import Recipe
from detdistill.study.runs import DIVERGED, require_success
from detdistill.study.tuning import Tuning, tune
from detdistill.study.worker import main
from tests.study.fabricated_study import run_study


def tried(best, diverging=math.inf):
    """The rounds in which rates are tried from 1 on, and what comes out."""
    rounds = []

    def measure(rates):
        rounds.append(list(rates))
        return [-math.inf if r >= diverging else 0.5 - abs(math.log2(r / best)) for r in rates]

    return rounds, tune(1.0, 3, measure)


def test_rates_are_tried_on_while_the_best_is_the_last_one():
    rounds, tuning = tried(best=1.0)
    assert rounds == [[0.5, 1.0, 2.0]] and tuning.lr == 1.0 and tuning.warnings == []
    rounds, tuning = tried(best=4.0)
    assert rounds == [[0.5, 1.0, 2.0], [4.0], [8.0]] and tuning.lr == 4.0
    rounds, tuning = tried(best=0.2)
    assert rounds == [[0.5, 1.0, 2.0], [0.25], [0.125]] and tuning.lr == 0.25


def test_an_end_of_all_that_was_tried_is_told():
    for best, end in ((64.0, "largest"), (1 / 64, "smallest")):
        rounds, tuning = tried(best)
        assert len(rounds) == 3 and tuning.lr == (8.0 if end == "largest" else 0.125)
        [warning] = tuning.warnings
        assert f"is the {end} that was tried" in warning


def test_rates_at_which_training_diverges():
    rounds, tuning = tried(best=4.0, diverging=1.9)
    assert rounds == [[0.5, 1.0, 2.0]] and tuning.lr == 1.0 and tuning.warnings == []
    assert tuning.text.endswith("seed 3: 0.5 (-250.0), 1 (-150.0), 2 (diverged)")
    assert Tuning.of_values(json.loads(json.dumps(tuning.as_values()))) == tuning
    with pytest.raises(DivergedError, match=r"at each learning rate from 0\.5 to 2; begin lower"):
        tried(best=1.0, diverging=0.0)


def test_of_equal_rates_the_smallest_is_taken():
    assert Tuning(0, {2.0: 0.3, 1.0: 0.3, 0.5: 0.1}).lr == 1.0
    tuning = tune(1.0, 0, lambda rates: [0.0] * len(rates))  # all alike: none leads further
    assert tuning.lr == 0.5 and len(tuning.aps) == 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_at_the_tuned_rate(recipe, world, tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setattr("detdistill.study.jobs.Jobs._in_a_process", lambda *given: None)
    world.best_lr, out = 2 * recipe.lr, tmp_path / "study"
    run_study(recipe, out, tune_lr=True, jobs=jobs)
    rates = [f"lr{recipe.lr * factor:g}" for factor in (0.5, 1, 2, 4)]
    assert sorted(run for run in world.trained if "rates" in run) == sorted(
        f"rates/{rate}" for rate in rates
    )
    assert not list((out / "rates").rglob("test*.json"))  # chosen on val alone
    assert "student/seed0" not in world.trained and "student/seed1" in world.trained
    for run in ("teacher", "runs/student/seed0", "runs/crosskd/seed1"):
        lr = yaml.safe_load((out / run / "recipe.yaml").read_text())["lr"]
        assert lr == pytest.approx(2 * recipe.lr), run
    results = json.loads((out / "results.json").read_text())
    assert results["facts"]["learning rate"].startswith(f"{2 * recipe.lr:g}; AP of the student")
    assert results["warnings"] == [] and "learning rate" in (out / "results.md").read_text()


@pytest.mark.parametrize("skill", [0.4, 0.9])
def test_a_teacher_that_is_behind_is_told_before_anything_is_distilled(
    recipe, world, tmp_path, skill
):
    world.skills["teacher"], lines = skill, []
    run_study(recipe, tmp_path / "study", tune_lr=True, seeds=[0], on_status=lines.append)
    told = [i for i, line in enumerate(lines) if "AP on val, the student alone has" in line]
    assert len(told) == (skill == 0.4)
    first = next(i for i, line in enumerate(lines) if "runs/crosskd/seed0: training" in line)
    assert all(i < first and "--teacher RUN" in lines[i] for i in told)


def test_a_tuned_study_goes_on(recipe, world, tmp_path):
    out = tmp_path / "study"
    world.die_at = f"rates/lr{2 * recipe.lr:g}"
    with pytest.raises(KeyboardInterrupt):
        run_study(recipe, out, tune_lr=True)
    with pytest.raises(UserError, match="tune_lr True, asked for is False"):
        run_study(recipe, out)
    world.die_at = "crosskd/seed0"
    with pytest.raises(KeyboardInterrupt):
        run_study(recipe, out, tune_lr=True)
    world.die_at, world.best_lr, before = None, 100.0, len(world.trained)
    run_study(recipe, out, tune_lr=True, seeds=[1, 0])  # other seeds change no choice
    assert not any("rates" in run for run in world.trained[before:])
    tuned = json.loads((out / "study.json").read_text())["tuning"]
    assert tuned["seed"] == 0 and len(tuned["val_ap"]) == 4


def test_tuning_goes_on_with_the_seed_that_it_began_with(recipe, world, tmp_path):
    out = tmp_path / "study"
    world.die_at = f"rates/lr{recipe.lr:g}"
    with pytest.raises(KeyboardInterrupt):
        run_study(recipe, out, tune_lr=True)
    world.die_at = None
    run_study(recipe, out, tune_lr=True, seeds=[1])
    for rate in (out / "rates").iterdir():
        assert yaml.safe_load((rate / "recipe.yaml").read_text())["seed"] == 0, rate
    assert json.loads((out / "study.json").read_text())["tuning"]["seed"] == 0


def test_val_must_hold_what_the_choice_is_made_by(recipe, world, tmp_path, data_folder):
    folder, out = shutil.copytree(data_folder, tmp_path / "mine"), tmp_path / "study"
    val = folder / "annotations/val.json"
    val.write_text(json.dumps(json.loads(val.read_text()) | {"annotations": []}))
    changed = recipe.model_copy(update={"data": str(folder)})
    with pytest.raises(UserError, match=r"val\.json: no val image has a usable box.*--tune-lr"):
        run_study(changed, out, tune_lr=True)
    assert not out.exists()
    run_study(changed, out)


def test_a_study_of_which_every_rate_diverges(recipe, world, tmp_path):
    world.too_high = 0.0
    with pytest.raises(DivergedError, match="diverged at each learning rate"):
        run_study(recipe, tmp_path / "study", tune_lr=True)


def test_a_worker_tells_its_study_that_it_diverged(tmp_path, monkeypatch, capsys):
    def explode(recipe, folder, resume):
        raise DivergedError("task/cls is nan at step 3")

    monkeypatch.setattr("detdistill.study.worker.train", explode)
    monkeypatch.setattr("detdistill.study.worker.end_with_parent", lambda process: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(Recipe(data="anywhere").model_dump()))
    code = main([str(tmp_path / "run.yaml"), str(tmp_path / "run"), "1", "train"])
    assert code == DIVERGED and "task/cls is nan" in capsys.readouterr().err
    with pytest.raises(DivergedError) as caught:
        require_success(code, "run: training failed")
    assert caught.value.told
