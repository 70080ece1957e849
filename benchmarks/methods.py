"""What each method costs: its step over the plain student's step and the teacher's pass.

    python benchmarks/methods.py
    python benchmarks/methods.py --methods head crosskd --device cuda --repeats 30

The teacher's pass ends where the method stops needing it, at the pyramid or at the head. HEAD also
stands over the student with an assistant that nothing teaches, and the teacher on as many boxes.

Time: all contenders of a row run in turn, and what is compared are medians of CPU time of this
process (synchronised wall clock on CUDA), so that other work on the machine counts for little.
Memory: the peak over what was held before any model was built: allocated on CUDA, resident in a
fresh process on a CPU (Linux), whose allocator is told to give back what is freed.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import Clock, DeviceClock, make_batch
from detdistill import Batch, Distiller, create_detector, create_method, list_methods

PLAIN = [("retinanet", "retinanet")]
PAIRS: dict[str, list[tuple[str, str | None]]] = {
    "crosskd": [("gfl", "gfl"), ("retinanet", "retinanet")],
    "crosskd_roi": [("faster_rcnn", "faster_rcnn")],
    "g_detkd": [("retinanet", "faster_rcnn")],
    "head": [("retinanet", "faster_rcnn")],
    "ld": [("gfl", "gfl")],
    "tf_head": [("retinanet", None)],
}
PROMPT = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # glibc keeps a large part of what is freed else
LATER = 5000  # steps; beyond every warm-up
STEP, PARTS, ASSISTED = "step", "parts", "assisted"
LINE = "{:<12} {:<34} {:<34} {:>5} {:>7}"
STUDENT, TEACHER = (0, "student"), (1, "teacher")
Contenders = dict[str, Callable[[], object]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list_methods(), choices=list_methods())
    parser.add_argument("--student", default="r18")
    parser.add_argument("--teacher", default="r50")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=8, help="per image")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)  # of a fresh process
    return parser.parse_args()


class Row:
    """One method with a pair of detectors: what runs, and what it is set against."""

    def __init__(
        self, options: argparse.Namespace, method: str, student: str, teacher: str | None
    ) -> None:
        self.options, self.method = options, method
        self.pair = (student, teacher)
        self.clock = Clock() if options.device == "cpu" else DeviceClock(options.device)
        batch = make_batch(options.batch, options.size, options.classes, options.boxes)
        self.batch: Batch = batch.to(options.device)

    def contenders(self, wanted: str) -> Contenders:
        """What has to run, by name; `wanted` is STEP, PARTS or ASSISTED.

        Each group holds one student and one teacher, for the sake of its memory.
        """
        student, teacher = self._detector(*STUDENT), self._detector(*TEACHER)
        given = {"akd": False, "ckd": False} if wanted == ASSISTED else {}
        method = create_method(self.method, **given)
        distiller = Distiller(student, teacher, {self.method: method})
        distiller.iteration = LATER
        if wanted == STEP:
            return {"step": self._training(distiller)}
        if wanted == ASSISTED:
            training = self._training(distiller)
            return {"assistant": training, "boxes": self._teacher_on_boxes(student, teacher)}
        parts = {"student": self._training(Distiller(student))}
        if teacher is not None:
            parts["teacher"] = self._teacher_pass(teacher, method.teacher_stage == "head")
        return parts

    def _detector(self, side: int, size: str) -> Any:
        """On the device; None for no teacher."""
        family, name = self.pair[side], getattr(self.options, size)
        if family is None:
            return None
        detector = create_detector(f"{family}_{name}", self.options.classes)
        return detector.to(self.options.device)

    def _training(self, distiller: Distiller) -> Callable[[], object]:
        distiller.to(self.options.device).train()
        parameters = [p for p in distiller.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

        def run() -> None:
            torch.stack(list(distiller(self.batch).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def _teacher_pass(self, teacher: Any, whole: bool) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> None:
            pyramid = teacher.pyramid(teacher.normalize(self.batch))
            if whole:
                teacher.head(pyramid)

        return run

    def _teacher_on_boxes(self, student: Any, teacher: Any) -> Callable[[], object]:
        """The teacher's pyramid and its RoI head on boxes drawn as HEAD draws them."""
        targets = self.batch.padded_targets()
        with torch.no_grad():
            proposals = student.propose(student(self.batch), targets.sizes)
        rois = teacher.sample(proposals, targets)

        @torch.no_grad()
        def run() -> None:
            teacher.roi(teacher.pyramid(teacher.normalize(self.batch)), rois)

        return run

    def times(self, against: list[str]) -> dict[str, float]:
        """The step's time over that of what it is set against, for each of `against`."""
        groups = {wanted: self.contenders(wanted) for wanted in (STEP, *against)}
        for repeat in range(self.options.repeats + 1):
            for wanted, functions in groups.items():
                for name, function in functions.items():
                    self.clock.run(f"{wanted} {name}", function)
            if repeat == 0:
                self.clock.seconds.clear()
        total = {
            wanted: sum(self.clock.milliseconds(f"{wanted} {name}") for name in functions)
            for wanted, functions in groups.items()
        }
        return {wanted: total[STEP] / total[wanted] for wanted in against}

    def peaks(self, against: list[str]) -> dict[str, float]:
        """The same of the peak memory."""
        peak = self._process_peak if self.options.device == "cpu" else self._cuda_peak
        found = {wanted: peak(wanted) for wanted in (STEP, *against)}
        return {wanted: found[STEP] / found[wanted] for wanted in against}

    def two_rounds(self, wanted: str) -> None:
        """Runs what `wanted` names twice: the second time optimisers have their state."""
        functions = self.contenders(wanted).values()
        for _ in range(2):
            for function in functions:
                function()

    def _cuda_peak(self, wanted: str) -> int:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.two_rounds(wanted)
        return torch.cuda.max_memory_allocated() - before

    def _process_peak(self, wanted: str) -> int:
        """Of a fresh process, whose peak is its own."""
        arguments = ["--peak", wanted, self.method, self.pair[0], str(self.pair[1])]
        for name in ("student", "teacher", "batch", "size", "classes", "boxes"):
            arguments += [f"--{name}", str(getattr(self.options, name))]
        command = [sys.executable, __file__, *arguments]
        environment = {**os.environ, **PROMPT}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout.split()[-1])


def own_peak(options: argparse.Namespace) -> int:
    """Bytes that this process took at most for two rounds of what `--peak` names."""
    wanted, method, student, teacher = options.peak
    row = Row(options, method, student, None if teacher == "None" else teacher)
    before = resident("VmRSS")
    row.two_rounds(wanted)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of "VmRSS", now, or "VmHWM", at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{key}:\s+(\d+)", status, re.MULTILINE)[1])


def main() -> None:
    """Prints a line for each method and pair as soon as it is measured; ratios alone."""
    options = parse_arguments()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.peak:
        print(own_peak(options))
        return
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, batch "
        f"{options.batch}, {options.size} px, {options.classes} classes, median of "
        f"{options.repeats}"
    )
    print(LINE.format("method", "student <- teacher", "over", "time", "memory"), flush=True)
    for method in options.methods:
        for student, teacher in PAIRS.get(method, PLAIN):
            row = Row(options, method, student, teacher)
            against = [PARTS, ASSISTED] if method == "head" else [PARTS]
            times, peaks = row.times(against), row.peaks(against)
            pair = f"{student}_{options.student} <- "
            pair += "none" if teacher is None else f"{teacher}_{options.teacher}"
            for wanted in against:
                over = "student" if teacher is None else "student + teacher"
                over = "with assistant + teacher on boxes" if wanted == ASSISTED else over
                numbers = f"{times[wanted]:.2f}", f"{peaks[wanted]:.2f}"
                print(LINE.format(method, pair, over, *numbers), flush=True)


if __name__ == "__main__":
    main()
