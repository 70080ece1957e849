"""The same student with and without distillation: trained, tested, set side by side."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detdistill.data import open_dataset
from detdistill.detectors import FPNDetector, load_detector
from detdistill.engine.build import teacher_file
from detdistill.engine.checkpoint import exclusive, write_json, write_text
from detdistill.errors import DivergedError
from detdistill.evaluation.speed import latency_ms
from detdistill.recipe import Recipe, read_yaml
from detdistill.study.between import (
    NOTE,
    difference_rows,
    difference_values,
    differences,
    ranking,
)
from detdistill.study.check import check_study, check_teacher_epochs, existing_teacher
from detdistill.study.jobs import Jobs
from detdistill.study.plan import (
    STUDY,
    is_new_study,
    open_study,
    record,
    scaled_epochs,
    study_facts,
)
from detdistill.study.report import write_report
from detdistill.study.runs import (
    RunScore,
    adopt,
    comparable_times,
    is_finished,
    read_log,
    study_device,
    test_once,
    train_and_test,
    with_gain_interval,
)
from detdistill.study.summary import Arm, control_of, paired_gains, verdicts, warnings
from detdistill.study.table import (
    as_markdown,
    format_time,
    markdown_table,
    print_table,
    table_notes,
)
from detdistill.study.tuning import tune, tuning_of

SAME_TIME = "student_same_time"
ALONE: dict[str, Any] = {"teacher": None, "teacher_options": {}, "methods": {}, "arms": {}}
"""Of a recipe for a run without distillation."""
_Wave = dict[str, Future[RunScore]]
"""The runs of one seed that can be carried out side by side, by arm."""


def compare(
    recipe: Recipe,
    out: Path,
    *,
    teacher: str | None,
    methods: Sequence[str],
    seeds: Sequence[int],
    teacher_epochs: int | None = None,
    tune_lr: bool = False,
    jobs: int = 1,
    on_status: Callable[[str], None] = print,
) -> list[Arm]:
    """Trains, tests and reports; called again, it continues where it stopped.

    Args:
        recipe: student, data and schedule of every arm; `methods` may hold method options and
            `arms` names for sets of methods.
        out: the study's folder: `runs/<arm>/seed<k>`, `results.json`, `results.md`, `report.html`.
        teacher: a run folder, a weights file, or a detector name; a named teacher is trained
            first, by the same recipe with `recipe.teacher_options`. None where no method needs one.
        methods: arms to add, e.g. ["crosskd", "crosskd+pkd"], or names of `recipe.arms`.
        seeds: each arm but the teacher runs once with each.
        teacher_epochs: of a teacher trained here, if not those of the recipe; refused where none
            is.
        tune_lr: whether to look for the learning rate at which the student alone does best on
            val, with the first seed; every run has that one then, in place of the recipe's.
        jobs: runs at once, each in a process of its own if more than one. They slow each other,
            so that times, and the same-time control that rests on them, are rougher.
        on_status: called with a line at each step of the study.

    Returns:
        The rows of the table: teacher if any, student, methods, student with the same training
        time.
    """
    methods, seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
    check_teacher_epochs(teacher, teacher_epochs)
    new = is_new_study(Path(out))
    inputs = check_study(recipe, teacher, methods, seeds, jobs, new, tune_lr)
    settings: dict[str, Any] = {"teacher": teacher, "teacher_epochs": teacher_epochs}
    settings |= {"tune_lr": tune_lr, "inputs": inputs, "jobs": jobs}
    settings |= {"recipe": recipe.model_dump(), "methods": methods, "seeds": seeds}
    with exclusive(Path(out)), Jobs(jobs).closing() as many:
        study = _Study(Path(out), recipe, open_study(Path(out), settings), many, on_status)
        if tune_lr:
            study.tune(seeds[0])
        arms = study.arms(teacher, teacher_epochs, methods, seeds)
        _write(study, arms)
    on_status(f"report: {study.out / 'report.html'}")
    return arms


@dataclass
class _Study:
    """Runs of one study in their order, with a note of progress for each."""

    out: Path
    recipe: Recipe
    state: dict[str, Any]
    jobs: Jobs
    on_status: Callable[[str], None]
    planned: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arms(
        self, teacher: str | None, epochs: int | None, methods: list[str], seeds: list[int]
    ) -> list[Arm]:
        """All runs, as the rows of the table."""
        arms = ("student", *methods, SAME_TIME)
        self.planned = {f"runs/{arm}/seed{seed}" for arm in arms for seed in seeds}
        if teacher is not None and teacher_file(teacher) is None:
            self.planned.add("teacher")
        teacher_score, weights = None, None
        if teacher is not None:
            teacher_score, weights = self.teacher(teacher, epochs)
        waves: Iterable[_Wave] = (self.start(seed, methods, weights) for seed in seeds)
        if self.jobs.count > 1:
            waves = list(waves)  # all of them at once
        scores: dict[str, list[RunScore]] = {}
        longer = []
        for seed, wave in zip(seeds, waves, strict=True):
            done = self.collect(wave)
            longer.append(self.jobs.start(self.same_time, self.control(seed), done))
            for name, score in done.items():
                scores.setdefault(name, []).append(score)
        scores[SAME_TIME] = [run.result() for run in longer]
        return _with_latency(_arms(teacher_score, scores), self.taught_by(weights), self)

    def tune(self, seed: int) -> None:
        """Gives the recipe the best rate for the student alone; looked for once in a study."""
        tuning = tuning_of(self.state)
        if tuning is None:
            # That with which it began, perhaps in a call before, with other seeds.
            seed = self.state.setdefault("tuning", {"seed": seed})["seed"]
            tuning = tune(self.recipe.lr, seed, lambda rates: self.val_aps(rates, seed))
            self.state["tuning"] = tuning.as_values()
            write_json(self.out / STUDY, self.state)
            self.on_status(f"learning rate {tuning.text}")
        self.recipe = self.recipe.model_copy(update={"lr": tuning.lr})
        adopt(self.out / _rate(tuning.lr), self.out / f"runs/student/seed{tuning.seed}")

    def val_aps(self, rates: Sequence[float], seed: int) -> list[float]:
        """Final AP on val of the student alone at each rate; -inf where it diverges."""
        recipes = [self.control(seed).model_copy(update={"lr": rate}) for rate in rates]
        runs = [self.jobs.start(self.val_ap, recipe) for recipe in recipes]
        return [run.result() for run in runs]

    def val_ap(self, recipe: Recipe) -> float:
        """Of one rate; test is not looked at."""
        name = _rate(recipe.lr)
        self.on_status(f"{name}: training the student alone, to choose the learning rate")
        self.record(name, "training")
        try:
            self.jobs.train(recipe, self.out / name)
        except DivergedError:
            ap = -math.inf
        else:
            ap = float(read_log(self.out / name, "eval")[-1]["metrics"]["AP"])
        self.record(name, "done")
        return ap

    def teacher(self, teacher: str, epochs: int | None) -> tuple[RunScore, str]:
        """The teacher's score and what a recipe calls it; a named one is trained first."""
        folder = self.own_teacher
        given = teacher_file(teacher)
        if given is not None:
            recipe = self.recipe.model_copy(update={"teacher": teacher})
            tested = test_once(given, recipe, folder, lambda: _existing_teacher(recipe))
            return RunScore(0, folder, seconds=None, epochs=None, **tested), teacher
        changes: dict[str, Any] = {
            **ALONE,
            "student": teacher,
            "student_options": self.recipe.teacher_options,
            "seed": 0,
        }
        recipe = self.recipe.model_copy(update=changes)
        scaled = scaled_epochs(recipe, epochs or recipe.epochs)
        score = self.run("teacher", scaled, train_and_test)  # nothing runs beside it
        self.tell_of_a_weak_teacher()
        return score, str(folder.resolve())

    def tell_of_a_weak_teacher(self) -> None:
        """Says, before anything is distilled, where one trained here is behind the student."""
        tuning = tuning_of(self.state)
        if tuning is None:
            return  # what the student has on val is not known yet
        own = float(read_log(self.own_teacher, "eval")[-1]["metrics"]["AP"])
        alone = tuning.aps[tuning.lr]
        if own <= alone:
            self.on_status(
                f"teacher: {100 * own:.1f} AP on val, the student alone has {100 * alone:.1f}: it "
                f"has little to teach at this learning rate and length. Better stop here, train "
                f"one on its own and give it by --teacher RUN"
            )

    @property
    def own_teacher(self) -> Path:
        """Where a teacher lies that is trained here, and the numbers of one that is not."""
        return self.out / "teacher"

    def taught_by(self, teacher: str | None) -> Recipe:
        """The recipe with its teacher if any; one trained here knows its options itself."""
        changes: dict[str, Any] = {"teacher": teacher}
        if teacher in (None, str(self.own_teacher.resolve())):
            changes["teacher_options"] = {}
        return self.recipe.model_copy(update=changes)

    def control(self, seed: int) -> Recipe:
        """The recipe of a student that learns alone."""
        return self.recipe.model_copy(update={**ALONE, "seed": seed})

    def start(self, seed: int, methods: list[str], teacher: str | None) -> _Wave:
        """Starts the control and the methods of one seed."""
        train, recipes = self.jobs.train_and_test, {"student": self.control(seed)}
        for name in methods:
            changes = {"methods": self.recipe.methods_of(name), "arms": {}, "seed": seed}
            recipes[name] = self.taught_by(teacher).model_copy(update=changes)
        return {
            name: self.jobs.start(self.run, f"runs/{name}/seed{seed}", recipe, train)
            for name, recipe in recipes.items()
        }

    def collect(self, wave: _Wave) -> dict[str, RunScore]:
        """Waits for the runs of one seed; those of methods get their interval over the control."""
        scores = {name: run.result() for name, run in wave.items()}
        control = scores.pop("student")
        taught = {
            name: with_gain_interval(run, control, self.recipe) for name, run in scores.items()
        }
        return {"student": control, **taught}

    def same_time(self, control: Recipe, scores: dict[str, RunScore]) -> RunScore:
        """A control that trains at least as long as the slowest distilled run of its seed took."""
        done = scores["student"]
        _, (own, *times) = comparable_times([done], *([score] for score in scores.values()))
        ratio = max(times) / own
        # Part of an epoch counts as one; a twentieth of the time is noise.
        epochs = max(control.epochs, math.ceil(control.epochs * (ratio - 0.05)))
        name = f"runs/{SAME_TIME}/seed{control.seed}"
        if epochs == control.epochs:
            with self.lock:
                self.planned.discard(name)
            return done
        folder = self.out / name
        if (folder / "recipe.yaml").exists():
            before = read_yaml(folder / "recipe.yaml")["epochs"]
            # A slower method has joined the study; those of before had rounded their epochs.
            if before < min(epochs, round(control.epochs * ratio)):
                os.replace(folder, folder.with_name(f"{folder.name}_{before}_epochs"))
                self.record(name, "outgrown")
            else:
                epochs = before
        return self.run(name, scaled_epochs(control, epochs), self.jobs.train_and_test)

    def run(self, name: str, recipe: Recipe, train: Callable[[Recipe, Path], RunScore]) -> RunScore:
        """One run, announced, trained or found finished, tested once."""
        if self.state["runs"].get(name) != "done":
            work = "testing" if is_finished(recipe, self.out / name) else "training"
            self.on_status(f"{name}: {work}{self._time_left()}")
            self.record(name, work)
        score = train(recipe, self.out / name)
        self.record(name, "done")
        with self.lock:
            self.seconds.append(_seconds(score))
        self.on_status(
            f"{name}: {100 * score.numbers['AP']:.1f} AP on test, "
            f"trained in {format_time(_seconds(score))}"
        )
        return score

    def record(self, name: str, progress: str) -> None:
        """Notes in `study.json` how far a run is."""
        with self.lock:
            record(self.out, self.state, name, progress)

    def _time_left(self) -> str:
        with self.lock:
            count = sum(self.state["runs"].get(name) != "done" for name in self.planned)
            left = f"{count} run{'s' if count > 1 else ''} to go"
            if not self.seconds:
                return f" ({left})"
            seconds = count * statistics.fmean(self.seconds) / self.jobs.count
            return f" ({left}, about {format_time(seconds)})"


def _rate(lr: float) -> str:
    """Name of a run that tries a learning rate."""
    return f"rates/lr{lr:g}"


def _seconds(score: RunScore) -> float:
    return score.seconds or 0.0


def _existing_teacher(recipe: Recipe) -> FPNDetector:
    return existing_teacher(recipe, open_dataset(recipe, "test").classes)


def _arms(teacher: RunScore | None, scores: dict[str, list[RunScore]]) -> list[Arm]:
    """Rows in the order of the table: teacher, student, methods, student with the same time."""
    first = [] if teacher is None else [Arm("teacher", "teacher", (teacher,))]
    same_time = Arm(SAME_TIME, "same_time", tuple(scores.pop(SAME_TIME)))
    control = Arm("student", "control", tuple(scores.pop("student")))
    taught = [Arm(name, "method", tuple(runs)) for name, runs in scores.items()]
    return [*first, control, *taught, same_time]


def _with_latency(arms: list[Arm], taught: Recipe, study: _Study) -> list[Arm]:
    """Times the teacher, if any, then the student; all students are the same network."""
    device = study_device(study.recipe)
    times = study.state["latency_ms"]
    if device.type not in times:
        image = open_dataset(study.recipe, "test").read(0)
        height, width = int(image.shape[1]), int(image.shape[2])
        models = {"student": load_detector(control_of(arms).runs[0].folder)}
        if taught.teacher is not None:
            models = {"teacher": _existing_teacher(taught), **models}
        times[device.type] = {
            name: latency_ms(detector, height, width, device, image=image)
            for name, detector in models.items()
        }
        write_json(study.out / STUDY, study.state)
    found = times[device.type]
    return [
        dataclasses.replace(arm, latency_ms=found[arm.name if arm.name in found else "student"])
        for arm in arms
    ]


def _write(study: _Study, arms: list[Arm]) -> None:
    """The results as JSON, Markdown and a page; then the table on standard output."""
    out, sentences, caveats = study.out, [*ranking(arms), *verdicts(arms)], warnings(arms)
    if tuning := tuning_of(study.state):
        caveats += tuning.warnings
    facts = study_facts(study.recipe, study.state)
    rows = [_arm_values(arm, control_of(arms), out) for arm in arms]
    results = {"verdict": sentences, "warnings": caveats, "arms": rows}
    between = differences(arms)
    results |= {"between": difference_values(between), "facts": facts}
    write_json(out / "results.json", results)
    lines = [*sentences, *(f"**Warning:** {caveat}" for caveat in caveats)]
    settings = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    parts = ["# Results", markdown_table(arms), "\n".join(lines), table_notes(arms)]
    if between:
        parts += ["## Method against method", as_markdown(difference_rows(between)), NOTE]
    parts += ["## Settings", settings]
    write_text(out / "results.md", "\n\n".join(parts) + "\n")
    write_report(out, study.recipe, arms, sentences, caveats, facts)
    print_table(arms, sentences, caveats)


def _arm_values(arm: Arm, control: Arm, out: Path) -> dict[str, Any]:
    """One arm as plain values, AP on the 0..1 scale as COCO has it."""
    values = dataclasses.asdict(arm) | {"title": arm.title}
    for run in values["runs"]:
        run["folder"] = os.path.relpath(run["folder"], out)
    if arm.kind in ("method", "same_time"):
        values["ap_gains"] = [gain / 100 for gain in paired_gains(arm, control)]
    return values
