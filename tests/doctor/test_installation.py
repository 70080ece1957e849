"""Each check on packages that are said to be there, and the whole on those that are."""

from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from detdistill.doctor import installation
from detdistill.doctor.installation import (
    Requirement,
    check_devices,
    check_extras,
    check_imports,
    check_installation,
    check_packages,
    older,
    parse_requirement,
)
from tests.doctor.conftest import levels

NEEDED = [Requirement("torch", "2.11", ""), Requirement("PyYAML", "", "")]
EXTRA = [Requirement("onnx", "1.20", "export"), Requirement("ruff", "0.14", "dev")]


def test_this_installation_works():
    section = check_installation()
    assert "problem" not in levels(section.findings)
    assert "torch" in section.findings[1].text
    assert section.numbers["versions"]["torch"] == metadata.version("torch")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("torch>=2.11", ("torch", "2.11", "")),
        ('onnx>=1.20; extra == "export"', ("onnx", "1.20", "export")),
        ("types-PyYAML; extra == 'dev'", ("types-PyYAML", "", "dev")),
        ('detdistill[export]; extra == "dev"', None),
    ],
)
def test_requirements_are_read(line, parts):
    assert parse_requirement(line) == (parts and Requirement(*parts))


@pytest.mark.parametrize(
    ("version", "floor", "expected"),
    [
        ("2.11.0", "2.11", False),
        ("2.14.1+cu130", "2.11", False),
        ("2.9.1", "2.11", True),
        ("2", "2.0", False),
        ("2.11.0a0+git", "2.11", False),
        ("0.19", "0.20", True),
    ],
)
def test_versions_are_compared_as_numbers(version, floor, expected):
    assert older(version, floor) is expected


def test_good_packages():
    [found] = check_packages(NEEDED, {"torch": "2.12", "PyYAML": "6"})
    assert found.level == "ok" and "torch 2.12" in found.text and "2 in all" in found.text


def test_old_and_missing_packages():
    old, missing = check_packages(NEEDED, {"torch": "2.3.0", "PyYAML": None})
    assert old.level == missing.level == "problem"
    assert "torch is 2.3.0" in old.text and '"torch>=2.11"' in old.advice
    assert "PyYAML is missing" in missing.text


def test_extras():
    [absent] = check_extras(EXTRA, {"onnx": None, "ruff": None})
    assert absent.level == "note" and "onnx" in absent.text
    assert 'pip install "detdistill[export]"' in absent.advice
    [present] = check_extras(EXTRA, {"onnx": "1.23", "ruff": None})
    assert present.level == "ok" and "onnx 1.23" in present.text


def test_packages_that_do_not_fit_each_other(monkeypatch):
    assert check_imports() == []

    def mismatch(name):
        if name == "torchvision.ops":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(installation.importlib, "import_module", mismatch)
    [found] = check_imports()
    assert found.level == "problem" and "nms does not exist" in found.text
    assert found in check_installation().findings


def test_sources_that_are_not_installed(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.metadata, "requires", none)
    found = check_installation().findings
    assert "problem" not in levels(found)
    assert any("is not installed" in finding.text for finding in found)


@pytest.mark.parametrize(
    ("major", "hip", "told"), [(7, None, False), (8, None, True), (7, "6.0", True)]
)
def test_bf16_that_torch_only_emulates_is_none(monkeypatch, major, hip, told):
    facts = SimpleNamespace(name="T4", major=major, total_memory=15 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.version, "hip", hip)
    [found] = check_devices()
    assert ("no bf16" not in found.text) is told


def test_a_driver_without_a_gpu_for_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    assert levels(check_devices()) == ["note"]
    monkeypatch.setattr(installation.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert levels(check_devices()) == ["warning", "note"]
