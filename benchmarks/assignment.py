"""How much of a CPU training step goes to target assignment and to losses.

    python benchmarks/assignment.py
    python benchmarks/assignment.py --families retinanet --repeats 20

A step is taken apart: the loss runs on detached predictions, so that its own gradient is timed
apart from the network's. What is printed are medians of the CPU time of this process on one thread,
and the share of each part in its own step, so that it does not matter what else the machine does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import Clock, make_batch
from detdistill import Batch, create_detector
from detdistill.detectors import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.registry import FAMILIES
from detdistill.structures import DenseOutput

ONE_STAGE = [f for f in FAMILIES.names() if issubclass(FAMILIES.get(f), DenseDetector)]
NETWORK = ("forward", "backward", "optimiser")
TARGETS = ("assignment", "loss", "its backward")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=ONE_STAGE, choices=ONE_STAGE)
    parser.add_argument("--backbone", default="r18")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=8, help="per image")
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args()


def cut(output: DenseOutput) -> tuple[DenseOutput, list[tuple[Tensor, Tensor]]]:
    """The same output without a way back, and its tensors with those they were cut from."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def leaf(tensor: Tensor) -> Tensor:
        pairs.append((tensor, tensor.detach().requires_grad_()))
        return pairs[-1][1]

    found = output.predictions
    predictions = replace(
        found,
        logits=[leaf(level) for level in found.logits],
        boxes=[leaf(level) for level in found.boxes],
        quality=found.quality and [leaf(level) for level in found.quality],
    )
    features = {name: [leaf(level) for level in maps] for name, maps in output.features.items()}
    return replace(output, predictions=predictions, features=features), pairs


def step(
    detector: FPNDetector, optimizer: torch.optim.Optimizer, batch: Batch, run: Callable[..., Any]
) -> None:
    """One training step; `run(name, function)` sees each part."""
    output = run("forward", lambda: detector(batch))
    targets = batch.padded_targets()
    leaves, pairs = cut(output)
    assignment = run("assignment", lambda: detector.assign(leaves, targets))
    loss = run("loss", lambda: sum(detector.loss(leaves, targets, assignment).values()))
    run("its backward", loss.backward)
    reached = [(end, leaf.grad) for end, leaf in pairs if leaf.grad is not None]
    ends, gradients = zip(*reached, strict=True)
    run("backward", lambda: torch.autograd.backward(ends, gradients))
    run("optimiser", optimizer.step)
    optimizer.zero_grad()


def measure(options: argparse.Namespace, family: str) -> Clock:
    detector = create_detector(f"{family}_{options.backbone}", options.classes).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4, momentum=0.9)
    batch = make_batch(options.batch, options.size, options.classes, options.boxes)
    clock = Clock()
    for _ in range(2):
        step(detector, optimizer, batch, clock.run)
    clock.seconds.clear()
    for _ in range(options.repeats):
        step(detector, optimizer, batch, clock.run)
    return clock


def share(clock: Clock, names: tuple[str, ...]) -> float:
    """Median over the steps of the percentage that the parts take of their own step."""
    steps = list(zip(*clock.seconds.values(), strict=True))
    columns = [list(clock.seconds).index(name) for name in names]
    return 100 * median(sum(times[c] for c in columns) / sum(times) for times in steps)


def main() -> None:
    options, console = parse_arguments(), Console(width=130)
    torch.set_num_threads(1)
    table = Table("detector", *NETWORK, *TARGETS, "assignment %", "losses %", "both %")
    for family in options.families:
        clock = measure(options, family)
        milliseconds = [f"{clock.milliseconds(name):.1f}" for name in (*NETWORK, *TARGETS)]
        parts = (TARGETS[:1], TARGETS[1:], TARGETS)
        shares = [f"{share(clock, names):.1f}" for names in parts]
        table.add_row(f"{family}_{options.backbone}", *milliseconds, *shares)
    console.print(
        f"torch {torch.__version__}, 1 thread, batch {options.batch}, {options.size} px, "
        f"{options.classes} classes, {options.boxes} boxes per image; median of "
        f"{options.repeats} steps, ms of CPU time"
    )
    console.print(table)


if __name__ == "__main__":
    main()
