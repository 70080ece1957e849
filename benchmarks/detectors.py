"""The tables of docs/detectors.md: parameters, FLOPs, latency, and which methods fit.

    python benchmarks/detectors.py
    python benchmarks/detectors.py --backbones r18 --repeats 20

It prints Markdown. FLOPs are two per multiply-add of convolutions (deformable ones included) and
matrix products; pooling of boxes, normalisation, activations and NMS are not counted.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from detdistill import UserError, create_detector
from detdistill.detectors import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.registry import FAMILIES
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill import METHODS, create_method
from detdistill.evaluation.speed import count_parameters, latency_ms
from detdistill.structures import Proposals, Pyramid

SIZES = ((800, 1333), (320, 320))  # (h, w)
NARROW = {"base_channels": 16, "fpn_channels": 64, "tower_channels": 64, "roi_channels": 256}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES.names(), choices=FAMILIES.names())
    parser.add_argument("--backbones", nargs="+", default=["r18", "r50", "mobilenetv2", "swin_t"])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def deformable_flops(*shapes: Any, out_shape: Any, **_: Any) -> int:
    """Of the matrix product in a deformable convolution; its interpolation is not counted."""
    _, weight = shapes[:2]
    batch, _, height, width = out_shape
    flops: int = 2 * batch * height * width * torch.Size(weight).numel()
    return flops


def count_flops(detector: FPNDetector, size: tuple[int, int]) -> float:
    """GFLOPs of backbone, pyramid and head, and of all RoI heads on the proposals of an image."""
    height, width = (-(-side // 32) * 32 for side in size)
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: deformable_flops}
    )
    with torch.no_grad(), counter:
        pyramid = detector.pyramid(torch.zeros(1, 3, height, width, device="meta"))
        detector.head(pyramid)
        if isinstance(detector, TwoStageDetector):
            run_roi_heads(detector, pyramid, size)
    return float(counter.get_total_flops()) / 1e9


def run_roi_heads(detector: TwoStageDetector, pyramid: Pyramid, size: tuple[int, int]) -> None:
    """Each RoI head on as many random boxes as the RPN may propose.

    On real memory: which level a box is pooled from depends on its values.
    """
    heads = detector.roi_heads.to_empty(device="cpu")
    maps = [torch.zeros(level.shape) for level in pyramid]
    corners = torch.rand(detector.test_proposals, 2, 2) * torch.tensor([size[1], size[0]])
    boxes = torch.cat((corners.amin(1), corners.amax(1)), 1)
    origin = torch.zeros(len(boxes), 4, dtype=torch.int64)
    proposals = Proposals([boxes], [torch.ones(len(boxes))], [origin])
    for stage in range(len(heads)):
        detector.roi(Pyramid(maps, pyramid.strides), proposals, stage)


def row(name: str, options: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    detector = create_detector(name, arguments.classes, **options).eval()
    parameters = count_parameters(detector) / 1e6
    latency = latency_ms(
        detector, *SIZES[1], "cpu", repeats=arguments.repeats, clock=time.process_time
    )
    detector.to("meta")
    flops = [f"{count_flops(detector, size):.1f}" for size in SIZES]
    shown = f"`{name}`" + (", narrow" if options else "")
    return [shown, f"{parameters:.1f}", *flops, f"{latency:.0f}"]


def narrow(family: str) -> dict[str, Any]:
    """The options of `NARROW` that a family has."""
    known = create_detector(f"{family}_r18", 1).options
    return {key: value for key, value in NARROW.items() if key in known}


def fits(method: str, student: FPNDetector, teacher: FPNDetector) -> bool:
    """Whether the method's own check takes the pair."""
    try:
        create_method(method).prepare(student, teacher)
    except UserError:
        return False
    return True


def which_teachers(method: str, family: str, detectors: dict[str, FPNDetector]) -> str:
    """The families that can teach a student by a method, in words."""
    student = detectors[family]
    if not METHODS.get(method).needs_teacher:
        return "needs none" if fits(method, student, student) else "-"
    return in_words({n for n, t in detectors.items() if fits(method, student, t)}, family)


def in_words(found: set[str], family: str) -> str:
    """Names of families, short where they are a group."""
    known = set(FAMILIES.names())
    one_stage = {name for name in known if issubclass(FAMILIES.get(name), DenseDetector)}
    groups = {
        "-": set(),
        "any": known,
        "own": {family},
        "any other": known - {family},
        "one-stage": one_stage,
        "two-stage": known - one_stage,
    }
    for words, group in groups.items():
        if found == group:
            return words
    return min(", ".join(sorted(found)), f"any but {', '.join(sorted(known - found))}", key=len)


def print_row(cells: list[str]) -> None:
    """One row of a Markdown table, at once: a table takes minutes."""
    print(f"| {' | '.join(cells)} |", flush=True)


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    print(
        f"{arguments.classes} classes; torch {torch.__version__}; latency: CPU time of one thread, "
        f"median of {arguments.repeats}, on {processor()}, which may have been busy.\n"
    )
    gflops = [f"GFLOPs, {height}x{width}" for height, width in SIZES]
    print_row(["detector", "parameters, M", *gflops, "ms, 320x320"])
    print_row(["---"] + ["---:"] * 4)
    for family in arguments.families:
        for backbone in arguments.backbones:
            print_row(row(f"{family}_{backbone}", {}, arguments))
        print_row(row(f"{family}_r18", narrow(family), arguments))
    print()
    detectors = {f: create_detector(f"{f}_r18", 1, **narrow(f)) for f in FAMILIES.names()}
    print_row(["method", *arguments.families])
    print_row(["---"] * (1 + len(arguments.families)))
    for method in METHODS.names():
        teachers = (which_teachers(method, family, detectors) for family in arguments.families)
        print_row([f"`{method}`", *teachers])


if __name__ == "__main__":
    main()
