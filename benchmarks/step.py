"""Times a distillation step against the student's step and the teacher's forward pass.

    python benchmarks/step.py --family gfl
    python benchmarks/step.py --family retinanet --device cuda --repeats 50

All contenders run in turn within one process, and what is compared are ratios of their medians.
Beside them stands torchvision's own RetinaNet training step on the same backbone, batch and size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common import DeviceClock, make_batch
from detdistill import Batch, CrossKD, Distiller, create_detector

TORCHVISION = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="gfl", choices=["atss", "fcos", "gfl", "retinanet"])
    parser.add_argument("--student", default="r18", choices=sorted(TORCHVISION))
    parser.add_argument("--teacher", default="r50")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=8, help="per image")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    return parser.parse_args()


class Contender:
    """A module that turns a batch into a dict of losses, and its optimiser."""

    def __init__(self, module: nn.Module, forward: Callable[[Batch], dict[str, Any]]) -> None:
        self.forward = forward
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step(self, batch: Batch, precision: str, clock: DeviceClock, split: bool) -> None:
        with torch.autocast(clock.device, torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.stack(list(self.forward(batch).values())).sum()
        if split:
            clock.run("  backward", loss.backward)
        else:
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def torchvision_retinanet(options: argparse.Namespace) -> RetinaNet:
    backbone = resnet_fpn_backbone(
        backbone_name=TORCHVISION[options.student],
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(backbone, options.classes, min_size=options.size, max_size=options.size)


def make_contenders(
    options: argparse.Namespace, layout: torch.memory_format
) -> tuple[dict[str, Contender], Distiller]:
    def ours(short: str) -> Any:
        detector = create_detector(f"{options.family}_{short}", options.classes)
        return detector.to(options.device).to(memory_format=layout)

    plain = Distiller(ours(options.student)).train()
    distiller = Distiller(ours(options.student), ours(options.teacher), {"crosskd": CrossKD()})
    distiller.to(options.device).to(memory_format=layout).train()
    other = torchvision_retinanet(options).to(options.device).to(memory_format=layout).train()

    def run_other(batch: Batch) -> dict[str, Any]:
        return other(
            [image.float() / 255 for image in batch.images], [dict(t) for t in batch.targets]
        )

    contenders = {
        "student step": Contender(plain, plain),
        "distillation step": Contender(distiller, distiller),
        "torchvision RetinaNet step": Contender(other, run_other),
    }
    return contenders, distiller


def measure(
    options: argparse.Namespace, precision: str, layout: torch.memory_format
) -> DeviceClock:
    clock = DeviceClock(options.device)
    batch = make_batch(options.batch, options.size, options.classes, options.boxes)
    batch = batch.to(options.device)
    batch = Batch(batch.images.contiguous(memory_format=layout), batch.sizes, batch.targets)
    contenders, distiller = make_contenders(options, layout)

    teacher = distiller.teacher
    assert teacher is not None

    @torch.no_grad()
    def teach() -> None:
        with torch.autocast(clock.device, torch.bfloat16, enabled=precision == "bf16"):
            teacher.head(teacher.pyramid(teacher.normalize(batch)))

    def round_of_all(split: bool) -> None:
        for name, contender in contenders.items():
            clock.run(name, partial(contender.step, batch, precision, clock, split=False))
        clock.run("teacher forward", teach)

    round_of_all(split=False)
    round_of_all(split=False)
    clock.seconds.clear()
    for _ in range(options.repeats):
        round_of_all(split=False)
    split_distillation(clock, contenders["distillation step"], distiller, batch, precision)
    return clock


def split_distillation(
    clock: DeviceClock,
    contender: Contender,
    distiller: Distiller,
    batch: Batch,
    precision: str,
) -> None:
    """Separate steps with a clock at every stage; the clocks themselves cost a little."""
    student, method = distiller.student, distiller.methods["crosskd"]
    for owner, name, label in (
        (student, "normalize", "  student normalize"),
        (student, "pyramid", "  student pyramid"),
        (student, "head", "  student head"),
        (student, "assign", "  assignment"),
        (student, "loss", "  task losses"),
        (distiller, "_run_teacher", "  teacher"),
        (method, "forward", "  CrossKD"),
    ):
        clock.watch(owner, name, label)
    for _ in range(5):
        contender.step(batch, precision, clock, split=True)


def main() -> None:
    """Prints one table per precision and layout, then the ratios."""
    options, console = parse_arguments(), Console(width=100)
    console.print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, "
        f"{options.family}_{options.student} <- {options.family}_{options.teacher}, batch "
        f"{options.batch}, {options.size} px, {options.classes} classes, "
        f"median of {options.repeats}"
    )
    totals: dict[str, float] = {}
    for precision in options.precision:
        for layout in (torch.contiguous_format, torch.channels_last):
            clock = measure(options, precision, layout)
            title = f"{precision}, {str(layout).removeprefix('torch.')}"
            table = Table("what", "ms", title=title)
            for name in clock.seconds:
                table.add_row(name, f"{clock.milliseconds(name):.1f}")
            console.print(table)
            ms = clock.milliseconds
            parts = ms("student step") + ms("teacher forward")
            totals[title] = ms("distillation step")
            console.print(
                f"distillation step / (student step + teacher forward) = "
                f"{ms('distillation step') / parts:.3f}\n"
                f"student step / torchvision RetinaNet step = "
                f"{ms('student step') / ms('torchvision RetinaNet step'):.3f}\n"
            )
    slow = totals.get("fp32, contiguous_format")
    for title, milliseconds in totals.items():
        if slow is not None:
            console.print(f"{title}: {slow / milliseconds:.2f} x the speed of plain fp32")


if __name__ == "__main__":
    main()
