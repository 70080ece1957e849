"""One real training step, measured: every term, every gradient, the time and the memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.distill import Distiller, Method
from detdistill.doctor.finding import finite
from detdistill.engine.distributed import place
from detdistill.engine.optim import learning_rate, make_optimizer, set_rate
from detdistill.recipe import Recipe
from detdistill.structures import Batch

FIRST_STEPS = 20
"""Of the student alone before gradients are compared.

A fresh head lets next to nothing of the task's gradient through: on BCCD, CrossKD's gradient was
107 times the task's at step 0 and 3 times after 20 steps.
"""

FIRST_SECONDS = 60.0
"""After which no further of them is begun."""

FIRST_CLIP = 10.0
TIMED_STEPS = 3
ENOUGH_SECONDS = 10.0
"""Of timed steps, after which no further one is begun."""

PARTS = ("backbone", "fpn", "head")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = {"fp16": 1024.0}
"""Keeps small gradients from vanishing in float16."""


@dataclass(frozen=True)
class Norms:
    """Norms of a gradient, by part of the student."""

    backbone: float
    fpn: float
    head: float

    @property
    def body(self) -> float:
        """Of backbone and pyramid together, which every method reaches."""
        return math.hypot(self.backbone, self.fpn)

    @property
    def total(self) -> float:
        """Of the whole student."""
        return math.hypot(self.backbone, self.fpn, self.head)


@dataclass(frozen=True)
class Term:
    """A loss term of one batch: before and after its weight, and its gradient after it."""

    raw: float
    weighted: float
    gradient: Norms


@dataclass(frozen=True)
class Gradients:
    """What a batch does to the student.

    Attributes:
        task: gradient of the student's own losses together.
        methods: gradient of each method's terms together.
        task_terms: value of each of the student's own terms, weighted.
        terms: of the methods, by their full name.
        resting: terms that their schedule silences even where most of the method acts.
        iteration: the step of the schedules at which it was measured.
    """

    task: Norms
    methods: dict[str, Norms]
    task_terms: dict[str, float]
    terms: dict[str, Term]
    resting: frozenset[str]
    iteration: int


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        seconds: of an optimisation step, median.
        peak_bytes: of GPU memory; None on the CPU.
        finite: whether every term was finite at the recipe's precision.
    """

    seconds: float
    peak_bytes: int | None
    finite: bool


def full_strength(methods: Sequence[Method]) -> int:
    """The first step at which every method acts with its whole weight, as far as there is one.

    It may lie beyond the end of the run: what is asked is what a method does once it acts.
    """
    steps = [0]
    for method in methods:
        for schedule in method.schedules.values():
            last = math.inf if schedule.stop is None else schedule.stop - 1
            steps.append(int(min(schedule.start + schedule.warmup, last)))
    return max(steps)


def take_first_steps(
    distiller: Distiller, batches: Sequence[Batch], recipe: Recipe, device: torch.device
) -> int:
    """Trains a student without methods for a moment; returns the number of steps.

    The recipe's optimiser at half its rate, which is reached half-way: the run's own warm-up would
    change nothing in so few steps.
    """
    optimizer = make_optimizer(distiller, recipe)
    rate = 0.5 * recipe.lr * recipe.batch_size / recipe.base_batch
    scale, start, step = LOSS_SCALE.get(recipe.precision, 1.0), time.perf_counter(), 0
    while step < FIRST_STEPS and time.perf_counter() - start < FIRST_SECONDS:
        set_rate(optimizer, rate * min(1.0, 2 * (step + 1) / FIRST_STEPS))
        with _autocast(recipe, device):
            losses = distiller(batches[step % len(batches)].to(device))
        loss = torch.stack(list(losses.values())).sum() * scale
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in distiller.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        nn.utils.clip_grad_norm_(distiller.parameters(), FIRST_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


def measure_gradients(
    distiller: Distiller, batch: Batch, recipe: Recipe, iteration: int
) -> Gradients:
    """Terms and gradients of a batch; the student is left without gradients.

    Args:
        distiller: in training mode, on the batch's device.
        batch: prepared as for training.
        recipe: says the precision.
        iteration: the step that the schedules shall believe in.
    """
    distiller.iteration = iteration
    with _autocast(recipe, batch.images.device):
        weighted = distiller(batch)
    scale = LOSS_SCALE.get(recipe.precision, 1.0)
    parameters = {n: p for n, p in distiller.student.named_parameters() if p.requires_grad}
    own = {name: value for name, value in weighted.items() if name.startswith("task/")}
    together = torch.stack(list(own.values())).sum()
    task = _norms(parameters, _gradient(together, parameters, scale))
    methods, terms = {}, {}
    for method in distiller.methods:
        total = [torch.zeros_like(p) for p in parameters.values()]
        for name, value in weighted.items():
            if name.startswith(f"{method}/"):
                gradient = _gradient(value, parameters, scale)
                total = [a if b is None else a + b for a, b in zip(total, gradient, strict=True)]
                raw = float(distiller.raw[name])
                terms[name] = Term(raw, float(value.detach()), _norms(parameters, gradient))
        methods[method] = _norms(parameters, total)
    values = {name: float(value.detach()) for name, value in own.items()}
    return Gradients(task, methods, values, terms, distiller.resting, iteration)


def _gradient(
    value: Tensor, parameters: dict[str, nn.Parameter], scale: float
) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(parameters)
    wanted = list(parameters.values())
    found = torch.autograd.grad(value * scale, wanted, retain_graph=True, allow_unused=True)
    return [None if gradient is None else gradient / scale for gradient in found]


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    half = PRECISIONS.get(recipe.precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def _norms(parameters: dict[str, nn.Parameter], gradient: Sequence[Tensor | None]) -> Norms:
    squares = dict.fromkeys(PARTS, 0.0)
    for name, found in zip(parameters, gradient, strict=True):
        if found is not None:
            part = name.partition(".")[0]
            squares[part if part in PARTS else "head"] += float(found.double().square().sum())
    return Norms(**{part: math.sqrt(square) for part, square in squares.items()})


def measure_cost(
    distiller: Distiller, batch: Batch, recipe: Recipe, device: torch.device, iteration: int
) -> Cost:
    """Whole optimisation steps as the loop makes them, on a student that is thrown away after.

    Args:
        distiller: in training mode, on the device.
        batch: one process's share of a micro batch.
        recipe: precision, optimiser, accumulation, memory format.
        device: where it runs.
        iteration: the step that the schedules shall believe in.
    """
    if recipe.channels_last:
        distiller.to(memory_format=torch.channels_last)
    batch = place(batch, recipe, device)
    optimizer = make_optimizer(distiller, recipe)
    set_rate(optimizer, learning_rate(recipe, 0, total_steps=1, steps_per_epoch=1))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    good = _step(distiller, batch, recipe, optimizer, iteration)  # memory is got, kernels chosen
    while len(seconds) < TIMED_STEPS and sum(seconds) < ENOUGH_SECONDS:
        _wait(device)
        start = time.perf_counter()
        good &= _step(distiller, batch, recipe, optimizer, iteration)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Cost(statistics.median(seconds), peak, good)


def _step(
    distiller: Distiller,
    batch: Batch,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    iteration: int,
) -> bool:
    """One optimisation step; returns whether all terms were finite."""
    good = True
    for _ in range(recipe.accumulate):
        distiller.iteration = iteration
        with _autocast(recipe, batch.images.device):
            loss = torch.stack(list(distiller(batch).values())).sum()
        good &= bool(loss.detach().isfinite())
        (loss / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(distiller.parameters(), recipe.clip_norm)
    if good:
        optimizer.step()
    optimizer.zero_grad()
    return good


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradient_numbers(found: Gradients) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "iteration": found.iteration,
        "task_gradient": _norm_numbers(found.task),
        "method_gradients": {name: _norm_numbers(norms) for name, norms in found.methods.items()},
        "task_terms": {name: finite(value) for name, value in found.task_terms.items()},
        "terms": {
            name: {
                "raw": finite(term.raw),
                "weighted": finite(term.weighted),
                "gradient": _norm_numbers(term.gradient),
                "resting": name in found.resting,
            }
            for name, term in found.terms.items()
        },
    }


def _norm_numbers(norms: Norms) -> dict[str, float | None]:
    return {part: finite(getattr(norms, part)) for part in PARTS}
