"""The training loop, for plain and for distilled runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric

from detdistill.data import make_train_batches
from detdistill.engine.build import build
from detdistill.engine.checkpoint import (
    check_inputs,
    check_run,
    exclusive,
    load_checkpoint,
    start_run,
)
from detdistill.engine.distributed import all_image_ids, launch, one_voice, place
from detdistill.engine.optim import learning_rate, set_rate
from detdistill.engine.run import Run, RunResult, finished_run
from detdistill.recipe import Recipe
from detdistill.structures import Batch


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> RunResult:
    """Trains `recipe.student`, with its methods if it has any, into the run folder `out`.

    Args:
        recipe: every setting.
        out: run folder; it must be new unless `resume`.
        resume: go on from `last.ckpt`; a finished run returns at once.

    Raises:
        UserError: for unusable input, before anything is written; for a non-finite loss.
    """
    fabric = launch(recipe)
    with one_voice(), ExitStack() as stack:
        return _train(recipe, out, resume, fabric, stack)


def _train(recipe: Recipe, out: Path, resume: bool, fabric: Fabric, stack: ExitStack) -> RunResult:
    first, old = fabric.is_global_zero, out.is_dir()
    if first:
        if old:  # before its checkpoint is read
            stack.enter_context(exclusive(out))
        check_run(out, recipe, resume)
    finished: RunResult | None = fabric.broadcast(finished_run(out) if resume else None)
    if finished is not None:
        return finished
    parts = build(recipe)
    batches = make_train_batches(
        parts.train, recipe, rank=fabric.global_rank, world_size=fabric.world_size
    )
    state = load_checkpoint(out / "last.ckpt")
    check_inputs(out, state, parts.inputs)
    run = Run(recipe, out, fabric, parts, batches, state)
    run.look_ahead(resume)
    # Whatever can be wrong with the input has shown by now, and nothing is written yet.
    fabric.barrier()
    if first:
        if not old:
            stack.enter_context(exclusive(out))
        start_run(out, recipe, resume)
    fabric.barrier()
    stack.enter_context(closing(run))
    run.open()
    return run.finish() if run.step >= run.total_steps else _loop(run)


def _loop(run: Run) -> RunResult:
    """Trains to the last step."""
    run.say_faults()
    run.say_schedules()
    run.check_teacher()
    run.module.train()
    with closing(run.batches.batches(run.step)) as batches:
        while run.step < run.total_steps:
            start, worked = time.perf_counter(), time.process_time()
            rate = _optimize(run, batches)
            run.step += 1
            seconds = time.perf_counter() - start
            run.add_time(seconds, time.process_time() - worked)
            run.report(rate, run.recipe.batch_size / seconds)
        _prove(run, next(batches))
    run.compare_with_teacher()
    return run.finish()


def _optimize(run: Run, batches: Iterator[Batch]) -> float:
    """One optimisation step; returns its learning rate."""
    recipe = run.recipe
    rate = learning_rate(recipe, run.step, run.total_steps, run.steps_per_epoch)
    set_rate(run.optimizer, rate)
    for micro in range(recipe.accumulate):
        _backward(run, next(batches), last=micro == recipe.accumulate - 1)
    run.keep_checkpoint()  # the losses of its weights were finite
    for warning in run.window.end_step():
        run.display.say(f"warning: {warning}")
    if recipe.clip_norm is not None:
        run.fabric.clip_gradients(
            run.module, run.optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return rate


def _backward(run: Run, batch: Batch, last: bool) -> None:
    """Forward, guards, backward of one micro batch."""
    with run.fabric.no_backward_sync(run.module, enabled=not last):
        terms = _forward(run, batch)
        run.fabric.backward(torch.stack(list(terms.values())).sum() / run.recipe.accumulate)


def _forward(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """The weighted terms of a micro batch; `UserError` where one is not finite."""
    batch = place(batch, run.recipe, run.fabric.device)
    run.distiller.iteration = run.step
    terms: dict[str, torch.Tensor] = run.module(batch)
    _watch(run, terms, batch.image_ids)
    return terms


@torch.no_grad()
def _prove(run: Run, batch: Batch) -> None:
    """Sees the loss after the last update, as the next step does after every other.

    It leaves no trace in the student: statistics of BatchNorm, which it moves, are put back.
    """
    buffers = {name: buffer.clone() for name, buffer in run.distiller.named_buffers()}
    _forward(run, batch)
    for name, buffer in run.distiller.named_buffers():
        buffer.copy_(buffers[name])
    run.keep_checkpoint()


def _watch(run: Run, terms: dict[str, torch.Tensor], image_ids: Sequence[int]) -> None:
    raw = run.distiller.raw
    values = torch.stack([t.detach().float() for t in [*terms.values(), *raw.values()]])
    if run.fabric.world_size > 1:  # a mean, which is non-finite everywhere if anywhere
        values = cast(torch.Tensor, run.fabric.all_reduce(values, reduce_op="mean"))
    numbers = values.tolist()
    weighted = dict(zip(terms, numbers, strict=False))
    plain = dict(zip(raw, numbers[len(terms) :], strict=True))
    if not all(map(math.isfinite, weighted.values())):
        image_ids = all_image_ids(image_ids)
    run.window.add(plain, weighted, run.step, image_ids, run.distiller.resting)
