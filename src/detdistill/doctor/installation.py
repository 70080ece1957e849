"""Whether the packages are there and work, and what the machine can do.

Nothing is imported before it is tried, so that a broken installation can still be told about.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from detdistill import __version__
from detdistill.doctor.finding import Finding, Section, few

PACKAGE = "detdistill"
SHOWN = ("torch", "torchvision", "timm")
TRIED = {"torch": "torch", "torchvision": "torchvision.ops", "timm": "timm"}
"""What is imported of the packages that a mismatch breaks; torchvision's operators do it first."""

DEVELOPMENT = "dev"


@dataclass(frozen=True)
class Requirement:
    """A line of the package's own metadata: `extra` is "" for what is always needed."""

    name: str
    floor: str
    extra: str


def check_installation() -> Section:
    """Python, packages, extras, devices."""
    python = f"Python {platform.python_version()}, detdistill {__version__}"
    section = Section("installation", "Installation", [Finding("ok", python)])
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        lines = []
        section.findings.append(
            Finding(
                "note",
                "detdistill runs from its sources and is not installed, so what it needs is not "
                "known here",
                "in its folder: pip install -e .",
            )
        )
    requirements = [r for r in map(parse_requirement, lines) if r is not None]
    versions = {r.name: version_of(r.name) for r in requirements}
    section.findings += check_packages(requirements, versions)
    section.findings += check_extras(requirements, versions)
    broken = check_imports()
    section.findings += broken or check_devices()
    section.numbers = {"python": platform.python_version(), "versions": versions}
    return section


def parse_requirement(line: str) -> Requirement | None:
    """`torch>=2.11; extra == "dev"` in its parts; None for the package itself."""
    name = re.match(r"[\w.-]+", line)
    floor = re.search(r">=\s*([\w.]+)", line)
    extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
    if name is None or name[0] == PACKAGE:
        return None
    return Requirement(name[0], floor[1] if floor else "", extra[1] if extra else "")


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def older(version: str, floor: str) -> bool:
    """Whether a version lies below another; what follows the numbers (`+cpu`) is left out."""
    found, wanted = (
        [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]
        for text in (version, floor)
    )
    length = max(len(found), len(wanted))
    return [*found, *[0] * (length - len(found))] < [*wanted, *[0] * (length - len(wanted))]


def check_packages(
    requirements: list[Requirement], versions: dict[str, str | None]
) -> list[Finding]:
    """Whether each needed package is there and new enough."""
    needed = [r for r in requirements if not r.extra]
    findings = []
    for requirement in needed:
        version = versions[requirement.name]
        floor = f">={requirement.floor}" if requirement.floor else ""
        if version is None or (requirement.floor and older(version, requirement.floor)):
            found = "is missing" if version is None else f"is {version}"
            findings.append(
                Finding(
                    "problem",
                    f"{requirement.name} {found}; needed is {requirement.name}{floor}",
                    f'pip install --upgrade "{requirement.name}{floor}"',
                )
            )
    if needed and not findings:
        shown = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
        text = f"{', '.join(shown)}, and the other packages it needs ({len(needed)} in all)"
        findings.append(Finding("ok", text))
    return findings


def check_extras(requirements: list[Requirement], versions: dict[str, str | None]) -> list[Finding]:
    """Which optional parts are installed; the tools for developers are left out."""
    findings = []
    for extra in sorted({r.extra for r in requirements} - {"", DEVELOPMENT}):
        names = [r.name for r in requirements if r.extra == extra]
        missing = [name for name in names if versions[name] is None]
        if missing:
            text = f"the optional part {extra!r} is not installed ({few(missing)})"
            findings.append(Finding("note", text, f'pip install "{PACKAGE}[{extra}]"'))
        else:
            shown = ", ".join(f"{name} {versions[name]}" for name in names)
            findings.append(Finding("ok", f"the optional part {extra!r} is installed: {shown}"))
    return findings


def check_imports() -> list[Finding]:
    """Whether the packages that must fit each other can be used."""
    for name, module in TRIED.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a mismatched binary raises nearly anything
            reason = " ".join(str(error).split())[:160]
            return [
                Finding(
                    "problem",
                    f"{name} cannot be used ({type(error).__name__}: {reason})",
                    "torch, torchvision and timm must fit each other: pip install --upgrade "
                    "torch torchvision timm",
                )
            ]
    return []


def check_devices() -> list[Finding]:
    """GPUs and what they can do, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    findings = []
    if shutil.which("nvidia-smi") is not None:
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        findings.append(
            Finding(
                "warning",
                f"an NVIDIA driver is installed, but torch {torch.__version__} (built {built}) "
                f"finds no GPU",
                "install the torch that fits the driver: https://pytorch.org/get-started/locally",
            )
        )
    text = (
        f"no CUDA device: everything runs on the CPU ({os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads){_cpu_bf16(torch)}"
    )
    return [*findings, Finding("note", text)]


def _gpu(torch: Any, index: int) -> Finding:
    facts = torch.cuda.get_device_properties(index)
    native = torch.version.hip or facts.major >= 8  # torch counts emulation, too
    bf16 = "bf16 and fp16" if native else "fp16, no bf16"
    memory = f"{facts.total_memory / 2**30:.0f} GiB"
    return Finding("ok", f"GPU {index}: {facts.name}, {memory}, {bf16}")


def _cpu_bf16(torch: Any) -> str:
    """Whether precision bf16 is worth a try here; nothing where torch cannot tell."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is None:
        return ""
    found = ask()
    if found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"):
        return "; it has instructions for bf16, see precision"
    return "; it has no instructions for bf16, which would be slower than fp32"
