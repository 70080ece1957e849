"""Runs that are killed, and runs of several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from detdistill import load_detector
from detdistill.engine.train import train
from detdistill.recipe import dump_recipe
from tests.helpers import BROKEN, break_an_image


def command(recipe, out, folder, *more):
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    verb = "distill" if recipe.methods else "train"
    arguments = [sys.executable, "-m", "detdistill.cli", verb, "--recipe", str(file)]
    if verb == "train":
        arguments += ["--detector", recipe.student]
    return [*arguments, "--out", str(out), *more]


def environment(threads=1):
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}


def run(arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_batch_system_ends_all_processes_of_a_run_together(recipe, tmp_path):
    settings = recipe(epochs=1000, workers=2, log_every=1, eval_every=1000)
    out = tmp_path / "run"
    with subprocess.Popen(
        command(settings, out, tmp_path),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and '"step"' in metrics.read_text()):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        told = process.communicate()[1]
    assert process.returncode == 130, told
    assert "this goes on from the last checkpoint: detdistill train" in told
    assert "Traceback" not in told and "DataLoader worker" not in told


@pytest.mark.slow
def test_killed_ten_times_and_resumed_ends_with_the_same_bits(recipe, tmp_path):
    settings = recipe(epochs=60, workers=2, checkpoint_every=5, eval_every=20, log_every=5)
    run(command(settings, tmp_path / "whole", tmp_path))
    out, chance = tmp_path / "killed", random.Random(0)
    kills, done = 0, False
    while not done:
        arguments = command(settings, out, tmp_path, *(["--resume"] if out.exists() else []))
        process = subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kills == 10:
            assert process.wait() == 0
            break
        wait = 5 + 4 * chance.random()
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < wait:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        done = (out / "run.json").exists() and json.loads((out / "run.json").read_text())["done"]
    assert kills == 10, f"the run ended after {kills} kills: make it longer"
    one, two = load_detector(tmp_path / "whole"), load_detector(out)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


def terms(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["weighted"] for record in records if record["kind"] == "step"]


def test_two_processes_give_the_losses_of_one(recipe, tmp_path):
    narrow = {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16}
    values = {
        "student_options": {**narrow, "norm_eval": True, "reduce": "global"},
        "teacher": str(tmp_path / "teacher"),
        "group_by_aspect": False,
    }
    train(recipe(max_steps=1, seed=3, student_options=narrow), tmp_path / "teacher")
    # Alignment statistics and the box normaliser are each process's own, as published.
    comparable = {"crosskd": {"align": False, "box": False}}
    for name, devices in (("one", 1), ("two", 2)):
        settings = recipe(**values, methods=comparable, max_steps=10, devices=devices)
        run(command(settings, tmp_path / name, tmp_path))
    one, two = terms(tmp_path / "one"), terms(tmp_path / "two")
    assert len(one) == len(two) == 10
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)

    settings = recipe(**values, methods={"crosskd": {}}, max_steps=1, devices=2)
    run(command(settings, tmp_path / "published", tmp_path))
    [published] = terms(tmp_path / "published")
    assert set(published) == {"task/cls", "task/box", "task/dfl", "crosskd/cls", "crosskd/box"}
    assert published["crosskd/cls"] > 0 and published["crosskd/box"] > 0


@pytest.mark.slow
def test_two_processes_resume_with_their_own_random_states(recipe, tmp_path):
    """The checkpoint in the middle is a copy from the run that was never stopped."""
    options = {"base_channels": 8, "fpn_channels": 16, "roi_channels": 32}
    settings = recipe(
        student="faster_rcnn_r18",
        student_options=options,
        devices=2,
        epochs=10,
        eval_every=10,
        checkpoint_every=5,
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    process = subprocess.Popen(
        command(settings, whole, tmp_path), env=environment(), stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (whole / "last.ckpt").exists():
        time.sleep(0.01)
    resumed.mkdir()
    for name in ("recipe.yaml", "last.ckpt"):
        shutil.copy(whole / name, resumed / name)
    assert process.wait() == 0
    state = torch.load(resumed / "last.ckpt", weights_only=True)
    assert state["step"] < 30, "the copy came late: make the run longer"
    one, two = (of_process["cpu"] for of_process in state["random"])
    assert not torch.equal(one, two)
    run(command(settings, resumed, tmp_path, "--resume"))
    one, two = load_detector(whole), load_detector(resumed)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


def occupy(out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    return "is no run folder and not empty"


@pytest.mark.parametrize("found_by", ["the first process alone", "one in the middle"])
def test_several_processes_say_one_sentence(recipe, data, tmp_path, found_by):
    folder, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    sentence = occupy(out) if found_by == "the first process alone" else BROKEN
    if sentence == BROKEN:
        break_an_image(folder, "train")  # a single process finds it in the middle of its run
    settings = recipe(data=str(folder), cache="none", devices=2, workers=1)
    done = subprocess.run(
        command(settings, out, tmp_path),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("detdistill: ")]
    assert done.returncode == 2
    assert len(told) == 1 and sentence in told[0]
    assert "Traceback" not in done.stderr
