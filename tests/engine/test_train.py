"""Runs: what they leave, how they stop, how they go on."""

import json
import shutil
import warnings

import pytest
import torch
from PIL import Image

import detdistill.engine.train as engine
from detdistill import Distiller, UserError, create_detector, load_detector, save_detector
from detdistill.engine import checkpoint
from detdistill.engine.train import train
from detdistill.errors import UserNotice
from tests.helpers import BROKEN, break_an_image


def lines(out, kind):
    text = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, text) if record["kind"] == kind]


def weights(out):
    return load_detector(out).state_dict()


def assert_same_weights(one, two):
    for key, value in weights(one).items():
        assert torch.equal(value, weights(two)[key]), key


@pytest.fixture
def teacher(recipe, tmp_path):
    train(recipe(max_steps=1, seed=5), tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_run_leaves_all_its_files(recipe, tmp_path):
    out = tmp_path / "run"
    result = train(recipe(), out)
    assert result.steps == 6
    names = {path.name for path in out.iterdir()}
    assert names == {
        "recipe.yaml",
        "metrics.jsonl",
        "run.json",
        "last.ckpt",
        "model.safetensors",
        "model.json",
        "best.safetensors",
        "best.json",
    }
    steps = lines(out, "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]["raw"]) == {"task/cls", "task/box", "task/dfl"}
    assert steps[0]["weighted"]["task/box"] == pytest.approx(2 * steps[0]["raw"]["task/box"])
    assert steps[0]["loss"] == pytest.approx(sum(steps[0]["weighted"].values()))
    evals = lines(out, "eval")
    assert [record["epoch"] for record in evals] == [1, 2]
    assert len(evals[0]["metrics"]) == 12
    student = load_detector(out)
    assert student.input_size == (64, 64)
    assert student.classes is not None and len(student.classes) == student.num_classes


def test_a_distilled_run_logs_its_terms_and_saves_the_student_alone(recipe, teacher, tmp_path):
    out = tmp_path / "run"
    train(recipe(teacher=teacher, methods={"crosskd": {"depth": 2}}), out)
    record = lines(out, "step")[-1]
    assert {"crosskd/cls", "crosskd/box"} < set(record["raw"])
    assert record["weighted"]["crosskd/box"] == pytest.approx(4 * record["raw"]["crosskd/box"])
    plain = tmp_path / "plain"
    train(recipe(max_steps=1), plain)
    assert set(weights(out)) == set(weights(plain))
    state = torch.load(out / "last.ckpt", weights_only=True)
    assert state["distiller"].pop("_extra_state") == 6
    assert all(key.startswith("student.") for key in state["distiller"])
    facts = json.loads((out / "model.json").read_text())
    assert facts["provenance"]["methods"] == {"crosskd": {"depth": 2}}


def test_a_teacher_that_nothing_learns_from_costs_nothing(recipe, teacher, tmp_path, monkeypatch):
    given = {"max_steps": 1, "student": "retinanet_r18", "teacher": teacher}
    alone = {"akd": False, "ckd": False}  # reads the form of the teacher's head, or its weights
    for name, options in (("fresh", alone), ("copy", alone | {"assistant_weights": "teacher"})):
        out = tmp_path / name
        train(recipe(**given, methods={"head": options}), out)
        assert lines(out, "teacher") == [], "it was evaluated"
    assert json.loads((out / "model.json").read_text())["provenance"]["teacher"] == teacher
    monkeypatch.setattr("detdistill.engine.build.load_detector", None)  # loading it would fail
    out = tmp_path / "tf_head"
    train(recipe(**given, methods={"tf_head": {}}), out)
    assert json.loads((out / "model.json").read_text())["provenance"]["teacher"] is None


class StopError(Exception):
    pass


@pytest.mark.parametrize(("optimizer", "stop"), [("sgd", 1), ("adamw", 3), ("sgd", 4)])
def test_a_resumed_run_ends_with_the_same_bits(
    recipe, teacher, tmp_path, monkeypatch, stop, optimizer
):
    settings = recipe(
        teacher=teacher,
        methods={"crosskd": {}},
        optimizer=optimizer,
        lr=0.001,
        checkpoint_every=1,
        color_jitter=0.3,
        scale_jitter=[0.7, 1.3],
    )
    train(settings, tmp_path / "whole")
    report = engine.Run.report

    def interrupt(run, *args):
        report(run, *args)
        if run.step == stop:
            raise StopError

    monkeypatch.setattr(engine.Run, "report", interrupt)
    with pytest.raises(StopError):
        train(settings, tmp_path / "resumed")
    monkeypatch.setattr(engine.Run, "report", report)
    train(settings, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    for kind in ("step", "eval"):
        one, two = (lines(tmp_path / name, kind) for name in ("whole", "resumed"))
        keys = ("step", "loss") if kind == "step" else ("step", "metrics")
        assert [[r[k] for k in keys] for r in one] == [[r[k] for k in keys] for r in two]


TWO_STAGE = {
    "student": "faster_rcnn_r18",
    "student_options": {"base_channels": 8, "fpn_channels": 16, "roi_channels": 32},
}


def test_a_resumed_two_stage_run_draws_the_same_proposals(recipe, tmp_path, monkeypatch):
    train(recipe(**TWO_STAGE), tmp_path / "whole")
    drawn = torch.rand(3)
    settings = stopped_after_two(recipe, tmp_path / "resumed", monkeypatch, **TWO_STAGE)
    train(settings, tmp_path / "resumed", resume=True)
    assert torch.equal(torch.rand(3), drawn)  # a draw more or less would show here
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_a_resumed_run_remembers_the_vectors_of_its_teacher(recipe, tmp_path, monkeypatch):
    teacher = create_detector("faster_rcnn_r18", 10, **TWO_STAGE["student_options"])
    save_detector(teacher, tmp_path / "teacher.safetensors")
    values = {
        **{"student": "retinanet_r18", "teacher": str(tmp_path / "teacher.safetensors")},
        **{"methods": {"g_detkd": {"samples": 8, "sgfi": False}}, "max_steps": 4},
    }
    train(recipe(**values), tmp_path / "whole")
    settings = stopped_after_two(recipe, tmp_path / "resumed", monkeypatch, **values)
    state = torch.load(tmp_path / "resumed" / "last.ckpt", weights_only=True)
    known = state["distiller"]["methods.g_detkd.contrast.memory._extra_state"]
    assert known.shape == (2 * 4 * 8, 1 + 32)  # two steps of four images
    train(settings, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    one, two = (lines(tmp_path / name, "step") for name in ("whole", "resumed"))
    assert [record["raw"] for record in one] == [record["raw"] for record in two]


def test_a_checkpoint_with_one_random_state_still_resumes(recipe, tmp_path, monkeypatch):
    train(recipe(max_steps=4), tmp_path / "whole")
    out = tmp_path / "resumed"
    settings = stopped_after_two(recipe, out, monkeypatch, max_steps=4)
    state = torch.load(out / "last.ckpt", weights_only=True)
    [state["random"]] = [of_process["cpu"] for of_process in state["random"]]
    torch.save(state, out / "last.ckpt")
    train(settings, out, resume=True)
    assert_same_weights(tmp_path / "whole", out)


def test_a_run_from_before_biases_had_settings_goes_on(recipe, tmp_path, monkeypatch):
    train(recipe(max_steps=4), tmp_path / "whole")
    out = tmp_path / "resumed"
    settings = stopped_after_two(recipe, out, monkeypatch, max_steps=4)
    state = torch.load(out / "last.ckpt", weights_only=True)
    [group] = state["optimizer"]["param_groups"]
    del group["lr_factor"]
    torch.save(state, out / "last.ckpt")
    newer = ("bias_lr_factor", "bias_weight_decay", "warmup:")
    stored = (out / "recipe.yaml").read_text().splitlines(keepends=True)
    older = [line for line in stored if not line.startswith(newer)]
    assert len(older) == len(stored) - len(newer)
    (out / "recipe.yaml").write_text("".join(older))
    train(settings, out, resume=True)
    assert_same_weights(tmp_path / "whole", out)


@pytest.mark.parametrize("known", [True, False])
def test_processor_time_goes_on_after_a_stop_if_it_was_known(recipe, tmp_path, monkeypatch, known):
    settings = stopped_after_two(recipe, tmp_path, monkeypatch, max_steps=4)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert 0 < state["processor_seconds"]
    state["processor_seconds"] = 1000.0
    if not known:
        del state["processor_seconds"]
    torch.save(state, tmp_path / "last.ckpt")
    train(settings, tmp_path, resume=True)
    found = json.loads((tmp_path / "run.json").read_text())["processor_seconds"]
    assert 1000 < found < 2000 if known else found is None


def test_biases_learn_at_their_own_rate_also_after_a_stop(recipe, tmp_path, monkeypatch):
    step, rates = torch.optim.SGD.step, []

    def watched(optimizer, *args, **kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    values = {
        **{"lr": 0.01, "base_batch": 4, "max_steps": 4, "schedule": "step", "milestones": [1]},
        **{"warmup": "constant", "warmup_start": 0.5, "bias_lr_factor": 2, "bias_weight_decay": 0},
    }
    train(recipe(**values), tmp_path / "whole")
    told = [record["lr"] for record in lines(tmp_path / "whole", "step")]
    assert told == pytest.approx([0.005, 0.005, 0.01, 0.001])  # warm-up of 2 steps, epochs of 3
    assert rates == [[rate, rate, 2 * rate] for rate in told]  # weights, norms' biases, biases
    settings = stopped_after_two(recipe, tmp_path / "resumed", monkeypatch, **values)
    rates.clear()
    train(settings, tmp_path / "resumed", resume=True)
    assert len(rates) == 2
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_processes_that_would_go_on_from_different_steps(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    settings = stopped_after_two(recipe, out, monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("detdistill.engine.run.gathered", lambda step: [step, 0])
    with pytest.raises(UserError, match=r"different steps, \[2, 0\]; .* share the folder"):
        train(settings, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_finished_run_returns_at_once(recipe, tmp_path, monkeypatch):
    first = train(recipe(max_steps=2), tmp_path / "run")
    monkeypatch.setattr(engine, "_loop", lambda run: pytest.fail("trained again"))
    again = train(recipe(max_steps=2), tmp_path / "run", resume=True)
    assert again == first


def test_a_setting_that_is_newer_than_the_run_had_its_default(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe(max_steps=2), out)
    stored = out / "recipe.yaml"
    assert "drop_empty: false\n" in stored.read_text()
    stored.write_text(stored.read_text().replace("drop_empty: false\n", ""))
    train(recipe(max_steps=2), out, resume=True)
    with pytest.raises(UserError, match="holds a run with drop_empty: False, now it is True"):
        train(recipe(max_steps=2, drop_empty=True), out, resume=True)


def test_a_finished_run_needs_no_checkpoint(recipe, tmp_path):
    out = tmp_path / "run"
    first = train(recipe(max_steps=2), out)
    (out / "last.ckpt").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert train(recipe(max_steps=2), out, resume=True) == first
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def stopped_after_two(recipe, out, monkeypatch, **values):
    """A run with a checkpoint of step 2, and its recipe."""
    report, settings = engine.Run.report, recipe(checkpoint_every=1, **values)

    def interrupt(run, *args):
        report(run, *args)
        if run.step == 3:
            raise StopError

    monkeypatch.setattr(engine.Run, "report", interrupt)
    with pytest.raises(StopError):
        train(settings, out)
    monkeypatch.setattr(engine.Run, "report", report)
    return settings


def without(key):
    def change(file):
        state = torch.load(file, weights_only=True)
        del state[key]
        torch.save(state, file)

    return change


def with_another_optimizer(file):
    state = torch.load(file, weights_only=True)
    state["optimizer"]["param_groups"] *= 2
    torch.save(state, file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:5000]),
        lambda file: torch.save([1, 2], file),
        without("optimizer"),
        with_another_optimizer,
    ],
    ids=["empty", "cut off", "another object", "a key is missing", "another optimiser"],
)
def test_a_damaged_checkpoint_is_named_and_nothing_changes(recipe, tmp_path, monkeypatch, damage):
    out = tmp_path / "run"
    settings = stopped_after_two(recipe, out, monkeypatch)
    damage(out / "last.ckpt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    settings = settings.model_copy(update={"log_every": 2})
    with pytest.raises(UserError, match=r"last\.ckpt: not a checkpoint of this run, or damaged"):
        train(settings, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_goes_on_with_its_own_data_only(recipe, tmp_path, monkeypatch, data, split):
    folder, out = shutil.copytree(data, tmp_path / "mine"), tmp_path / "run"
    settings = stopped_after_two(recipe, out, monkeypatch, data=str(folder))
    path = folder / "annotations" / f"{split}.json"
    text = path.read_text()
    values = json.loads(text)
    values["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"its {split} data .*{split}\.json.* changed since"):
        train(settings, out, resume=True)
    path.write_text(text)
    assert train(settings, out, resume=True).steps == 6


def test_a_run_goes_on_with_its_own_teacher_only(recipe, teacher, tmp_path, monkeypatch):
    out = tmp_path / "run"
    values = {"teacher": teacher, "methods": {"crosskd": {}}}
    settings = stopped_after_two(recipe, out, monkeypatch, **values)
    train(recipe(max_steps=1, seed=6), tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "teacher/model.safetensors")
    with pytest.raises(UserError, match="its teacher changed since this run began"):
        train(settings, out, resume=True)


def test_accumulated_micro_batches_run_and_keep_the_step_count(recipe, tmp_path):
    result = train(recipe(accumulate=2, max_steps=3), tmp_path / "run")
    assert result.steps == 3


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_number_formats_train(recipe, teacher, tmp_path, settings):
    values = {"teacher": teacher, "methods": {"crosskd": {}}, "max_steps": 2, **settings}
    train(recipe(**values), tmp_path / "run")
    train(recipe(teacher=teacher, methods={"crosskd": {}}, max_steps=2), tmp_path / "plain")
    one, two = (lines(tmp_path / name, "step")[0]["loss"] for name in ("run", "plain"))
    assert one == pytest.approx(two, rel=0.03)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    loss = Distiller.forward

    def poisoned(distiller, batch):
        terms = loss(distiller, batch)
        if distiller.iteration == 3:
            terms["task/box"] = terms["task/box"] * float("nan")
        return terms

    monkeypatch.setattr(Distiller, "forward", poisoned)
    with pytest.raises(UserError, match=r"task/box is nan at step 2, images \[") as error:
        train(recipe(checkpoint_every=1), out)
    assert "the last good checkpoint is" in str(error.value)
    # Not 2: it was the loss of these weights that was not finite.
    assert torch.load(out / "last.ckpt", weights_only=True)["step"] == 1
    assert not (out / "model.safetensors").exists()


def test_weights_that_exploded_never_replace_a_good_checkpoint(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    step = torch.optim.SGD.step

    def explode(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        if (out / "last.ckpt").exists():
            optimizer.param_groups[0]["params"][-1].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.SGD, "step", explode)
    with pytest.raises(UserError, match=r"scales\.4\.scale is no longer finite after step 2"):
        train(recipe(checkpoint_every=1), out)
    assert torch.load(out / "last.ckpt", weights_only=True)["step"] == 1
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("max_steps", [2, 6])
def test_a_checkpoint_counts_when_its_loss_was_finite(recipe, tmp_path, monkeypatch, max_steps):
    """A huge step leaves finite weights, of which only the next loss shows what they are."""
    out, step, steps = tmp_path / "run", torch.optim.SGD.step, []

    def explode(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        steps.append(len(steps))
        if len(steps) == 2:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.data.mul_(1e30)

    monkeypatch.setattr(torch.optim.SGD, "step", explode)
    with pytest.raises(UserError, match=r"is nan at step 2, images .* last good checkpoint is"):
        train(recipe(checkpoint_every=1, max_steps=max_steps), out)
    assert torch.load(out / "last.ckpt", weights_only=True)["step"] == 1
    assert not (out / "last.ckpt.next").exists() and not (out / "model.safetensors").exists()


def test_a_run_that_explodes_at_once_has_no_checkpoint_to_name(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Distiller, "forward", lambda *_: {"task/box": torch.tensor(float("nan"))})
    with pytest.raises(
        UserError, match=r"task/box is nan at step 0, .* there is no checkpoint yet"
    ):
        train(recipe(), tmp_path / "run")


def test_the_loss_after_the_last_step_leaves_no_trace(recipe, tmp_path, monkeypatch):
    train(recipe(max_steps=2), tmp_path / "seen")
    monkeypatch.setattr(engine, "_prove", lambda run, batch: run.keep_checkpoint())
    train(recipe(max_steps=2), tmp_path / "unseen")
    assert_same_weights(tmp_path / "seen", tmp_path / "unseen")


def test_a_broken_val_image_is_found_before_training(recipe, data, tmp_path, monkeypatch):
    folder, out = shutil.copytree(data, tmp_path / "mine"), tmp_path / "run"
    file = break_an_image(folder, "val")
    settings = recipe(data=str(folder), max_steps=1)
    with pytest.raises(UserError, match=BROKEN):
        train(settings, out)
    assert not out.exists()
    Image.new("RGB", (64, 64)).save(file)
    train(settings, out)
    monkeypatch.setattr("detdistill.engine.run.look_ahead", lambda *_: pytest.fail("looked again"))
    train(settings, tmp_path / "one_of_a_study", resume=True)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"warmup_steps": 6},
            "warmup_steps 6 in a run of 6: .* never reached; --set warmup_steps=1",
        ),
        (
            {"schedule": "step", "milestones": [2, 3]},
            r"milestones \[2, 3\].* never lowered there; --set milestones=\[1\]",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_told(recipe, tmp_path, values, told):
    with pytest.warns(UserNotice, match=told):
        train(recipe(**values), tmp_path / "run")
    with warnings.catch_warnings(action="error", category=UserNotice):  # a trial
        train(recipe(**values, max_steps=1), tmp_path / "trial")


def test_a_val_split_of_training_images_is_told(recipe, tmp_path, data):
    folder = shutil.copytree(data, tmp_path / "same")
    shutil.copy(folder / "annotations/train.json", folder / "annotations/val.json")
    with pytest.warns(UserNotice, match=r"(\d+) of \1 val images are training images, too"):
        train(recipe(data=str(folder), max_steps=1), tmp_path / "run")


def test_sizes_that_no_image_can_have_are_refused(recipe, tmp_path):
    told = "resize_short 640 is never reached, since resize_long is 544; --set resize_long=1066"
    with pytest.raises(UserError, match=told):
        train(recipe(resize_short=[320, 640], resize_long=544), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_faults_are_listed_in_full(recipe, tmp_path, data):
    folder = shutil.copytree(data, tmp_path / "faulty")
    path = folder / "annotations" / "train.json"
    values = json.loads(path.read_text())
    for i in range(5):
        values["annotations"][i]["bbox"] = [1, 1, -4, 4]
    path.write_text(json.dumps(values))
    train(recipe(data=str(folder), max_steps=1), tmp_path / "run")
    assert len((tmp_path / "run" / "faults.txt").read_text().splitlines()) == 5


def test_refusals_write_nothing(recipe, tmp_path):
    out = tmp_path / "run"
    for values, message in (
        ({"student": "gfl_r81"}, "did you mean 'gfl_r18'"),
        ({"student_options": {"fpn_chanels": 1}}, "did you mean 'fpn_channels'"),
        ({"methods": {"crosskd": {}}}, "needs a teacher"),
        ({"teacher": str(tmp_path / "no"), "methods": {"crosskd": {}}}, "no such weights"),
        ({"precision": "fp16"}, "fp16 needs a CUDA device"),
        ({"data": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe(**values), out)
        assert not out.exists()


def test_another_run_in_the_folder_is_refused(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe(max_steps=1), out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds another run"):
        train(recipe(max_steps=1), out)
    with pytest.raises(UserError, match=r"run with lr: 0\.02, now it is 0\.5"):
        train(recipe(max_steps=1, lr=0.5), out, resume=True)
    assert (out / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="no run folder and not empty"):
        train(recipe(max_steps=1), tmp_path / "mine")


def test_one_run_at_a_time_in_a_folder(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    settings = stopped_after_two(recipe, out, monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(checkpoint, "LOCK_TRIES", 1)
    with (
        checkpoint.exclusive(out),
        pytest.raises(UserError, match="another process is writing there"),
    ):
        train(settings, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert train(settings, out, resume=True).steps == 6
