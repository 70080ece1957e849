"""One run of a study: trained once, tested once, read back from its folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from detdistill.data import open_dataset
from detdistill.detectors import FPNDetector, load_detector
from detdistill.engine.build import WEIGHTS
from detdistill.engine.checkpoint import changed_settings, write_json, write_text
from detdistill.engine.run import finished_run
from detdistill.engine.train import train
from detdistill.errors import DivergedError, UserError
from detdistill.evaluation.coco import ap_gain_interval, coco_metrics
from detdistill.evaluation.run import detect_dataset
from detdistill.evaluation.speed import count_parameters
from detdistill.progress import Counts
from detdistill.recipe import Recipe, dump_recipe

STATUS = "run.json"
TEST = "test.json"
TEST_DETECTIONS = "test_detections.json"
TEST_GAIN = "test_gain.json"
DIVERGED = 3
"""Exit code of a run whose training diverged."""


@dataclass(frozen=True)
class RunScore:
    """What one finished run reached on the test split.

    Attributes:
        seed: of the run.
        folder: where it lies; holds `metrics.jsonl` and `test_detections.json`.
        numbers: the 12 COCO numbers, 0..1.
        per_class: AP of each class, 0..1, -1 where undefined.
        detector: registry name.
        parameters: of the detector.
        seconds: training time alone; None for weights that were trained elsewhere.
        epochs: how long it trained; None as above.
        gain_interval: of a distilled run: 95 % of its gains in AP (0..1) over the control of the
            same seed, over resampled test images.
        processor_seconds: training time of its process; None where that was not one thread on a
            CPU, or is not known.
    """

    seed: int
    folder: Path
    numbers: dict[str, float]
    per_class: dict[str, float]
    detector: str
    parameters: int
    seconds: float | None
    epochs: int | None
    gain_interval: tuple[float, float] | None = None
    processor_seconds: float | None = None


def comparable_times(*groups: Sequence[RunScore]) -> tuple[str, list[float]]:
    """The mean training time of each group of runs, in a measure that all of them have.

    That is the time of their processes, of which other work on the machine takes little, where
    all trained on one thread of a CPU, otherwise that of the clock.

    Returns:
        The measure, for a sentence, and the times in seconds.
    """
    measure = "processor time"
    times = [[run.processor_seconds for run in group] for group in groups]
    if any(time is None for group in times for time in group):
        measure = "time"
        times = [[run.seconds for run in group] for group in groups]
    return measure, [statistics.fmean(time or 0.0 for time in group) for group in times]


def train_and_test(recipe: Recipe, folder: Path) -> RunScore:
    """Trains (or resumes, or finds finished) one run and tests it once."""
    train_once(recipe, folder)
    tested = test_once(folder / WEIGHTS, recipe, folder, lambda: load_detector(folder))
    status = read_json(folder / STATUS)
    return RunScore(
        seed=recipe.seed,
        folder=folder,
        seconds=float(status["seconds"]),
        epochs=recipe.epochs,
        processor_seconds=status.get("processor_seconds"),
        **tested,
    )


def train_once(recipe: Recipe, folder: Path) -> None:
    """Trains (or resumes, or finds finished) one run."""
    if is_finished(recipe, folder):
        return
    if recipe.devices > 1:
        _train_in_processes(recipe, folder)
    else:
        train(recipe, folder, resume=True)


def adopt(folder: Path, place: Path) -> None:
    """Puts a copy of a finished run where the same run of a study would be trained."""
    if place.exists():
        return
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    os.replace(part, place)


def _train_in_processes(recipe: Recipe, folder: Path) -> None:
    """Trains on several devices, in a program of its own.

    The launcher of several processes starts the running program anew in each of them; that must
    be one training, not the whole study.
    """
    code = subprocess.run(worker_command(recipe, folder, "train"), check=False).returncode
    require_success(code, f"{folder}: training on {recipe.devices} devices failed, see above")


def worker_command(recipe: Recipe, folder: Path, task: Literal["train", "test"]) -> list[str]:
    """The program that carries out one run, its test too or not.

    The run's recipe is written beside its folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    plan = folder.with_name(f"{folder.name}.yaml")
    write_text(plan, dump_recipe(recipe))
    program = [sys.executable, "-m", "detdistill.study.worker"]
    return [*program, str(plan), str(folder), str(os.getpid()), task]


def require_success(code: int, message: str) -> None:
    """`UserError` for the exit code of a worker that failed; it may have told why itself."""
    if code:
        error = DivergedError(message) if code == DIVERGED else UserError(message)
        error.told = code in (2, DIVERGED)
        raise error


def is_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether this very run is done: opening the training data again would only cost time."""
    stored = folder / "recipe.yaml"
    same = stored.exists() and not changed_settings(stored, recipe)
    return same and finished_run(folder) is not None


def test_once(
    weights: Path, recipe: Recipe, folder: Path, load: Callable[[], FPNDetector]
) -> dict[str, Any]:
    """The test numbers of a weights file; a second call reads them back from `folder`.

    The file's checksum is stored beside them, so that numbers never outlive the weights.
    """
    checksum = file_sha256(weights)
    stored = read_json(folder / TEST) if (folder / TEST).exists() else {}
    if stored.get("sha256") != checksum:
        detector = load()
        dataset = open_dataset(recipe, "test")
        if dataset.faults:
            print(dataset.fault_summary(), file=sys.stderr)
        with Counts(f"{'/'.join(folder.parts[-2:])}: ") as counts:
            advance = counts.counter("test images", len(dataset))
            results = detect_dataset(detector, dataset, recipe, study_device(recipe), advance)
        metrics = coco_metrics(dataset.ground_truth(), results)
        stored = {
            "sha256": checksum,
            "split": "test",
            "numbers": metrics.numbers,
            "per_class": metrics.per_class,
            "detector": detector.name,
            "parameters": count_parameters(detector),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TEST_DETECTIONS, json.dumps(results))  # long: on one line
        write_json(folder / TEST, stored)
    return {key: stored[key] for key in ("numbers", "per_class", "detector", "parameters")}


def with_gain_interval(run: RunScore, control: RunScore, recipe: Recipe) -> RunScore:
    """The run with its interval, computed once and read back afterwards."""
    pair = [read_json(folder / TEST)["sha256"] for folder in (control.folder, run.folder)]
    path = run.folder / TEST_GAIN
    stored = read_json(path) if path.exists() else {}
    if stored.get("sha256") != pair:
        truth = open_dataset(recipe, "test").ground_truth()
        before, after = (read_json(r.folder / TEST_DETECTIONS) for r in (control, run))
        stored = {"sha256": pair, "interval": ap_gain_interval(truth, before, after)}
        write_json(path, stored)
    interval = stored["interval"]
    return replace(run, gain_interval=None if interval is None else tuple(interval))


def study_device(recipe: Recipe) -> torch.device:
    """Where a study tests and times its detectors."""
    wanted = recipe.accelerator
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The "step" or "eval" lines of a run in order of steps; of repeated steps the last counts.

    A resumed run may have logged a step twice, and a killed one may have left half a line.
    """
    path = folder / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("kind") == kind:
            found[entry["step"]] = entry
    return [found[step] for step in sorted(found)]


def read_json(path: Path) -> Any:
    """The content of a JSON file that a study wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"{path}: damaged, no longer JSON; put it back as it was, or give another --out folder"
        ) from None


def file_sha256(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
