"""Which methods fit the pair, and what they add to it while it trains."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from detdistill.detectors import FPNDetector
from detdistill.distill import Distiller, Method, create_method
from detdistill.distill.schedule import NamedSchedule, named_schedules
from detdistill.doctor.finding import Finding
from detdistill.errors import UserError

Arm = Mapping[str, Mapping[str, Any]]
"""Methods that act together, by name, with their options."""


@dataclass(frozen=True)
class Fit:
    """Whether an arm fits.

    Attributes:
        name: of the arm.
        reason: the method's own sentence where it does not fit; "" where it does.
        helpers: what it adds for the time of training.
        schedules: when its methods act.
        lacks_teacher: whether it does not fit because there is no teacher.
    """

    name: str
    reason: str = ""
    helpers: str = ""
    schedules: Sequence[NamedSchedule] = ()
    lacks_teacher: bool = False


def build_arm(student: FPNDetector, teacher: FPNDetector | None, arm: Arm) -> Distiller:
    """A distiller on a copy of the student: a method may change it, or copy a head into it.

    Raises:
        UserError: when the arm does not fit the pair.
    """
    return Distiller(copy.deepcopy(student), teacher, create_methods(arm))


def create_methods(arm: Arm) -> dict[str, Method]:
    """The methods of an arm, not prepared for any pair yet."""
    return {name: create_method(name, **options) for name, options in arm.items()}


def methods_of(distiller: Distiller) -> dict[str, Method]:
    """The prepared methods of a distiller."""
    return cast("dict[str, Method]", dict(distiller.methods.items()))


def check_fit(student: FPNDetector, teacher: FPNDetector | None, name: str, arm: Arm) -> Fit:
    """Puts an arm together once."""
    try:
        distiller = build_arm(student, teacher, arm)
    except UserError as error:
        needed = any(method.needs_teacher for method in create_methods(arm).values())
        return Fit(name, reason=str(error), lacks_teacher=teacher is None and needed)
    schedules = named_schedules(methods_of(distiller))
    return Fit(name, helpers=describe_helpers(distiller.methods), schedules=schedules)


def describe_helpers(methods: nn.Module) -> str:
    """What prepared methods have beside the student, adapters and assistants, in a few words."""
    adapters: Counter[str] = Counter()
    assistants = others = total = 0
    for name, module in methods.named_modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        total += size
        if size and ("adapter" in name or "projector" in name):
            adapters[_describe(module)] += 1
        elif "assistant" in name:
            assistants += size
        else:
            others += size
    if not total:
        return "adds nothing"
    parts = [f"{count} x {kind}" if count > 1 else kind for kind, count in adapters.items()]
    if assistants:
        parts.append(f"assistants of {_millions(assistants)} parameters")
    if others:
        parts.append(f"other layers of {_millions(others)} parameters")
    return f"adds {', '.join(parts)}, for training alone ({_millions(total)} parameters)"


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return f"{height}x{width} convolution {module.in_channels} to {module.out_channels}"
    if isinstance(module, nn.Linear):
        return f"linear layer {module.in_features} to {module.out_features}"
    return type(module).__name__


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else str(count)


def check_pair(fits: Sequence[Fit], asked: bool, advice: str) -> list[Finding]:
    """A line for each arm, but one for all methods that give the same reason.

    Args:
        fits: of all arms.
        asked: whether the user named them; else all methods that there are were tried.
        advice: for one that was asked for and does not fit, or where none fits.
    """
    findings = []
    waiting = [fit.name for fit in fits if fit.lacks_teacher and not asked]
    if waiting:
        findings.append(Finding("note", f"for want of a teacher not tried: {', '.join(waiting)}"))
    for fit, text in zip(fits, _reasons(fits), strict=True):
        if fit.name in waiting:
            continue
        if not fit.reason:
            findings.append(Finding("ok", f"{fit.name} fits; it {fit.helpers}"))
        if text:
            findings.append(Finding("problem", text, advice) if asked else Finding("note", text))
    if all(fit.reason for fit in fits) and not waiting and not asked:
        findings.append(Finding("problem", "no method fits this pair", advice))
    return findings


def _reasons(fits: Sequence[Fit]) -> list[str]:
    """Why each does not fit; "" where it fits, or where that was said with an earlier one.

    A method's sentence begins with its name; what stands after a colon may hold for several.
    """
    methods: dict[str, dict[str, None]] = {}  # of each such reason, once each
    for fit in fits:
        method, _, reason = fit.reason.partition(": ")
        if method.isidentifier():
            methods.setdefault(reason, {})[method] = None
    texts = []
    for fit in fits:
        method, _, reason = fit.reason.partition(": ")
        if not method.isidentifier():
            texts.append(fit.reason and f"does not fit: {fit.reason}")
            continue
        names = list(methods.pop(reason, {}))
        verb = "does" if len(names) == 1 else "do"
        texts.append(f"{verb} not fit: {', '.join(names)}: {reason}" if names else "")
    return texts
