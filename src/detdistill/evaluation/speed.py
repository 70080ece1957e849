"""Speed and size of a detector."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from detdistill.detectors import FPNDetector
from detdistill.detectors.inference import eval_mode

WARM_UP = 3


def count_parameters(detector: nn.Module) -> int:
    """All parameters, trainable or not; buffers such as BatchNorm statistics are no parameters."""
    return sum(parameter.numel() for parameter in detector.parameters())


def latency_ms(
    detector: FPNDetector,
    height: int,
    width: int,
    device: torch.device | str,
    repeats: int = 20,
    image: Tensor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median milliseconds of the whole `predict` (NMS included) on one image.

    Args:
        detector: any detector; it is left on `device` and in its mode.
        height: pixels of the generated image.
        width: pixels of the generated image.
        device: where it runs.
        repeats: timed calls, after three that warm up.
        image: (3, h, w) uint8 to use instead of noise: on real content NMS has work to do.
        clock: seconds; `time.process_time` on a busy CPU.
    """
    device = torch.device(device)
    if image is None:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
    image = image.to(device)
    detector.to(device)
    seconds = []
    with torch.no_grad(), eval_mode(detector):
        for _ in range(WARM_UP + repeats):
            start = clock()
            detector.predict([image])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - start)
    return 1000 * statistics.median(seconds[WARM_UP:])
