"""The state of a run, and what it writes: log lines, evaluations, checkpoints, students."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric

from detdistill import __version__
from detdistill.data import TrainBatches
from detdistill.data.transforms import eval_size
from detdistill.detectors import FPNDetector, save_detector
from detdistill.detectors.classes import known_classes
from detdistill.distill import Distiller, Method
from detdistill.distill.schedule import named_schedules
from detdistill.engine.ahead import look_ahead
from detdistill.engine.build import Parts
from detdistill.engine.checkpoint import (
    drop_next_checkpoint,
    keep_next_checkpoint,
    last_good,
    unusable_checkpoint,
    write_json,
    write_next_checkpoint,
    write_text,
)
from detdistill.engine.distributed import gathered, random_states, restore_random_state
from detdistill.engine.log import MetricsFile, RunDisplay, TermWindow
from detdistill.engine.optim import make_optimizer, run_length
from detdistill.engine.trackers import Tracker, curves, open_trackers
from detdistill.errors import DivergedError, UserError
from detdistill.evaluation.coco import CocoMetrics
from detdistill.evaluation.run import evaluate_dataset, knows_classes
from detdistill.recipe import Recipe


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: with `model.safetensors`, `best.safetensors`, `metrics.jsonl`, `recipe.yaml`.
        seconds: spent training, without evaluation.
        steps: optimisation steps.
        best_ap: best AP on val, 0..1.
    """

    folder: Path
    seconds: float
    steps: int
    best_ap: float | None


def finished_run(folder: Path) -> RunResult | None:
    """What a finished run in a folder left; None if there is none, or not all of it.

    Its `last.ckpt` may be gone: only `--resume` of an unfinished run needs it.
    """
    files = [folder / name for name in ("run.json", "model.safetensors", "model.json")]
    if not all(file.exists() for file in files):
        return None
    try:
        status = json.loads(files[0].read_text(encoding="utf-8"))
        best = None if status["best_ap"] < 0 else float(status["best_ap"])
        result = RunResult(folder, float(status["seconds"]), int(status["steps"]), best)
    except (ValueError, KeyError, TypeError):
        return None
    return result if status["done"] else None


class Run:
    """One run: its state and what is done to it."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        fabric: Fabric,
        parts: Parts,
        batches: TrainBatches,
        state: dict[str, Any] | None,
    ) -> None:
        """Sets up the models, and goes on from the state of a checkpoint if there is one."""
        self.recipe, self.out, self.fabric, self.parts = recipe, out, fabric, parts
        self._checkpoint, self._unproven = out / "last.ckpt", False
        self.distiller: Distiller = parts.distiller
        if recipe.channels_last:
            self.distiller.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(self.distiller, recipe)
        self.module, self.optimizer = fabric.setup(self.distiller, optimizer)
        self.distiller.to(fabric.device)  # the teacher, which Fabric does not see
        self.batches = batches
        self.steps_per_epoch = len(batches)
        self.total_steps = run_length(recipe, self.steps_per_epoch)
        self.step, self.seconds = 0, 0.0
        # On a GPU the processor only waits, and threads that wait for each other count as work.
        counts = fabric.device.type == "cpu" and torch.get_num_threads() == 1
        self.processor_seconds = 0.0 if counts else None
        self.best_ap, self.val_ap, self.teacher_ap = -1.0, -1.0, -1.0  # -1: not known
        torch.manual_seed(recipe.seed + 1 + fabric.global_rank)
        if state is not None:
            try:
                self._restore(state)
            except torch.OutOfMemoryError:
                raise  # the checkpoint is as good as before
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise unusable_checkpoint(self._checkpoint, type(error).__name__) from None
        self._refuse_unequal_steps()
        self.metrics: MetricsFile | None = None
        self.trackers: list[Tracker] = []
        self.window = TermWindow(out)
        title = "/".join(out.parts[-2:])
        self.display = RunDisplay(title, self.total_steps, self.step, quiet=not self.speaks)

    def look_ahead(self, resume: bool) -> None:
        """Before anything is written, unless the run goes on, or is one of a study that did it."""
        if self.speaks and not resume:
            splits = [self.parts.train, self.parts.val]
            look_ahead(self.recipe, self.steps_per_epoch, self.total_steps, *splits)

    def open(self) -> None:
        """From here on the run writes into its folder and shows how far it is."""
        if self.speaks:
            self.metrics = MetricsFile(self.out / "metrics.jsonl", self.step)
            self.trackers = open_trackers(self.recipe, self.out, self.step)
        self.display.open()

    @property
    def speaks(self) -> bool:
        """Whether this is the first of all processes, which alone writes."""
        return self.fabric.is_global_zero

    def check_teacher(self) -> None:
        """The teacher's AP on val, once: most distillation that fails has a teacher that does."""
        teacher = self.distiller.teacher
        if teacher is None or not self.speaks or self.teacher_ap >= 0:
            return
        if not knows_classes(teacher, self.parts.val):  # features alone may be of use
            self.display.say(f"teacher {teacher.name} has other classes; its AP is not measured")
            return
        metrics = self._measure(teacher, "val images by the teacher")
        self.teacher_ap = metrics.numbers["AP"]
        self._write("teacher", split="val", metrics=metrics.numbers)
        cut = ""
        if (known := known_classes(teacher)) > teacher.num_classes:
            cut = f", {teacher.num_classes} of its {known} classes"
        self.display.say(f"teacher {teacher.name}{cut}, val AP {100 * self.teacher_ap:.1f}")
        shown = eval_size(self.recipe)
        if teacher.input_size is not None and teacher.input_size != shown:
            sizes = teacher.input_size, shown
            own, here = (f"short side {short}, long {long}" for short, long in sizes)
            self.display.say(f"the teacher was trained at {own}; this run shows images at {here}")
        if 0 <= self.teacher_ap < 0.01:
            self.display.say("warning: the teacher finds next to nothing on this data")

    def compare_with_teacher(self) -> None:
        """A student that passes its teacher in val AP may have outgrown it: said, not refused."""
        if 0 <= self.teacher_ap < self.best_ap:
            self.display.say(
                f"warning: the teacher's val AP {100 * self.teacher_ap:.1f} is below the student's "
                f"{100 * self.best_ap:.1f}; a better teacher may help more"
            )

    def say_faults(self) -> None:
        """Faulty annotations: a line now, all of them in `faults.txt`."""
        datasets = (self.parts.train, self.parts.val)
        faults = [fault for dataset in datasets for fault in dataset.faults]
        if faults and self.speaks:
            write_text(self.out / "faults.txt", "\n".join(faults) + "\n")
            for dataset in datasets:
                if dataset.faults:
                    self.display.say(f"{dataset.fault_summary()} (all: {self.out / 'faults.txt'})")

    def say_schedules(self) -> None:
        """Methods that do not reach their full weights in this run, or do not act at all."""
        methods = cast("dict[str, Method]", dict(self.distiller.methods.items()))
        for name, options, schedule in named_schedules(methods):
            full = schedule.start + schedule.warmup
            end, why = self.total_steps, f"this run has {self.total_steps} steps"
            if schedule.stop is not None and schedule.stop <= end:
                end, why = schedule.stop, f"it stops at step {schedule.stop}"
            if full >= end:
                first = f"{name} acts from step {schedule.start}, with full weights from {full}"
                self.display.say(
                    f"warning: {first}, but {why}; lower "
                    f"{options}{'warmup' if schedule.warmup else 'start'}"
                )

    def report(self, rate: float, images_per_second: float) -> None:
        """Log line, evaluation and checkpoint, when due."""
        recipe, end = self.recipe, self.step == self.total_steps
        if self.step % recipe.log_every == 0 or end:
            raw, weighted = self.window.take()
            self.display.step(self.step, raw, weighted, images_per_second)
            self._write(
                "step",
                lr=rate,
                loss=sum(weighted.values()),
                raw=raw,
                weighted=weighted,
                seconds=self.seconds,
                images_per_second=images_per_second,
            )
        due = end or self.step % (recipe.eval_every * self.steps_per_epoch) == 0
        if due or self.step % recipe.checkpoint_every == 0:
            self._refuse_non_finite()
            if due:
                self._evaluate()
            self._save()

    def _write(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            place = {"step": self.step, "epoch": self.step / self.steps_per_epoch}
            self.metrics.write({"kind": kind, **place, **values})
        for tracker in self.trackers:
            tracker.log(curves(kind, values), self.step)

    def _evaluate(self) -> None:
        """AP on val by the first process; the best student so far is kept."""
        if self.speaks:
            metrics = self._measure(self.distiller.student, "val images")
            numbers = metrics.numbers
            self._write(
                "eval",
                split="val",
                metrics=numbers,
                per_class=metrics.per_class,
                seconds=self.seconds,
            )
            self.val_ap = ap = numbers["AP"]
            found = f"val AP {100 * ap:.1f}, AP50 {100 * numbers['AP50']:.1f}"
            self.display.say(f"step {self.step}, {found if ap >= 0 else 'val holds no boxes'}")
            if ap > self.best_ap:
                self.best_ap = ap
                self._save_student("best", ap)
        self.fabric.barrier()
        self.module.train()

    def _measure(self, detector: FPNDetector, what: str) -> CocoMetrics:
        val = self.parts.val
        with self.display.counting(what, len(val)) as advance:
            return evaluate_dataset(detector, val, self.recipe, self.fabric.device, advance)

    def _save_student(self, stem: str, ap: float) -> None:
        recipe = self.recipe
        provenance = {
            "detdistill": __version__,
            "torch": torch.__version__,
            "step": self.step,
            "val_ap": ap,
            "seed": recipe.seed,
            "teacher": self.parts.teacher,
            "methods": recipe.methods,
        }
        path = self.out / f"{stem}.safetensors"
        save_detector(self.distiller.student, path, provenance=provenance)

    def _save(self) -> None:
        """The resume checkpoint: student, adapters, optimiser, random state.

        It is the next one until `keep_checkpoint`: weights can be finite and yet such that their
        loss is not.
        """
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "best_ap": self.best_ap,
            "val_ap": self.val_ap,
            "teacher_ap": self.teacher_ap,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "random": random_states(self.fabric.device),
            "inputs": self.parts.inputs,
        }
        if self.speaks:
            write_next_checkpoint(self._checkpoint, state)
            self._unproven = True

    def add_time(self, seconds: float, processor_seconds: float) -> None:
        """The time of a step: that of the clock, and of this process."""
        self.seconds += seconds
        if self.processor_seconds is not None:
            self.processor_seconds += processor_seconds

    def keep_checkpoint(self) -> None:
        """Called when the loss of the present weights was finite: they are worth keeping."""
        if self._unproven:
            keep_next_checkpoint(self._checkpoint)
            self._unproven = False
            self._write_status(done=False)

    def close(self) -> None:
        """Ends the display; a checkpoint whose loss was never seen goes."""
        self.display.close()
        for tracker in self.trackers:
            tracker.close()
        if self._unproven:
            drop_next_checkpoint(self._checkpoint)

    def _refuse_non_finite(self) -> None:
        """A good checkpoint is never replaced by weights that an exploded step left."""
        for name, value in self.distiller.state_dict().items():
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                raise DivergedError(
                    f"{name} is no longer finite after step {self.step}; {last_good(self.out)}; "
                    f"try a lower lr or clip_norm"
                )

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        if self.processor_seconds is not None:  # a checkpoint of before does not know it
            self.processor_seconds = state.get("processor_seconds")
        self.best_ap, self.val_ap = state["best_ap"], state["val_ap"]
        self.teacher_ap = state["teacher_ap"]
        self.distiller.load_state_dict(state["distiller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        rank, device = self.fabric.global_rank, self.fabric.device
        restore_random_state(state["random"], rank, device)

    def _refuse_unequal_steps(self) -> None:
        """Machines that do not share the folder would not find the same checkpoint in it."""
        steps = gathered(self.step)
        if len(set(steps)) > 1:
            raise UserError(
                f"{self.out}: the processes would go on from different steps, {steps}; all "
                f"machines need the same last.ckpt: share the folder, or copy the file to each"
            )

    def _write_status(self, done: bool) -> None:
        status = {
            "done": done,
            "steps": self.step,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "best_ap": self.best_ap,
        }
        write_json(self.out / "run.json", status)

    def finish(self) -> RunResult:
        """Writes the final student; doing it again changes nothing."""
        if self.speaks:
            self._save_student("model", self.val_ap)
            self._write_status(done=True)
        best_ap = self.fabric.broadcast(self.best_ap)  # the first process evaluates
        best = best_ap if best_ap >= 0 else None
        return RunResult(self.out, self.seconds, self.step, best)
