"""What a CUDA device must do as the CPU does: `pytest -m gpu`."""

import json

import pytest
import torch

from detdistill import Distiller, create_method, load_detector
from detdistill.cli import main
from detdistill.data import generate_dataset
from detdistill.engine.train import train
from detdistill.export import export_onnx
from detdistill.recipe import Recipe
from tests.distill.test_every_method import FITTING, fitting_distiller, two_images
from tests.helpers import DENSE_R18, FAMILIES_R18, make_batch, narrow

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Convolutions in fp32, not in TF32, or nothing agrees to more than three digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "shapes"
    return generate_dataset(folder, train=16, val=4, test=4, size=64)


def recipe(data, **values):
    settings = {
        "student": "gfl_r18",
        "student_options": {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16},
        "data": str(data),
        "resize_short": [64],
        "resize_long": 64,
        "batch_size": 4,
        "workers": 1,
        "epochs": 2,
        "warmup_steps": 2,
        "log_every": 1,
        "accelerator": DEVICE,
    }
    return Recipe.model_validate({**settings, **values})


@pytest.mark.parametrize("name", DENSE_R18)
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_losses_and_gradients_are_those_of_the_cpu(name, counts):
    batch, found = make_batch(counts), []
    for device in ("cpu", DEVICE):
        detector, placed = narrow(name).to(device), batch.to(device)
        losses = detector.loss(detector(placed), placed.padded_targets())
        sum(losses.values()).backward()
        assert all(loss.device.type == device for loss in losses.values())
        norm = sum(p.grad.double().square().sum().cpu() for p in detector.parameters()).sqrt()
        found.append({**{term: loss.item() for term, loss in losses.items()}, "norm": norm.item()})
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES_R18)
def test_detections_are_those_of_the_cpu(name):
    detector, images = narrow(name).eval(), list(make_batch().images)
    here = detector.predict(images)
    there = detector.to(DEVICE).predict([image.to(DEVICE) for image in images])
    for one, two in zip(here, there, strict=True):
        assert two.boxes_xyxy.device.type == DEVICE
        assert len(one.scores) == len(two.scores)
        torch.testing.assert_close(one.scores, two.scores.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES_R18)
def test_half_precision_trains(name, precision):
    detector, batch = narrow(name).to(DEVICE), make_batch().to(DEVICE)
    with torch.autocast(DEVICE, precision):
        losses = detector.loss(detector(batch), batch.padded_targets())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for parameter_name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "family"), FITTING)
def test_every_method_trains(method, family, precision):
    distiller = fitting_distiller(method, f"{family}_r18").to(DEVICE)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.001)
    for seed in range(2):
        with torch.autocast(DEVICE, precision or torch.float16, enabled=precision is not None):
            terms = distiller(two_images(seed).to(DEVICE))
        assert all(value.isfinite() and value.device.type == DEVICE for value in terms.values())
        own = [value for name, value in terms.items() if name.startswith(f"{method}/")]
        assert own and all(value != 0 for value in own)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()


def test_a_distillation_term_is_that_of_the_cpu():
    found = []
    for device in ("cpu", DEVICE):
        pair = narrow("gfl_r18", seed=1), narrow("gfl_r34", seed=2)
        distiller = Distiller(*pair, {"crosskd": create_method("crosskd")}).train().to(device)
        terms = distiller(two_images().to(device))
        found.append({term: value.item() for term, value in terms.items()})
    assert found[1] == pytest.approx(found[0], rel=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_run_distils_and_is_read_on_the_cpu(data, tmp_path, precision, channels_last):
    train(recipe(data, max_steps=1), tmp_path / "teacher")
    taught = {"teacher": str(tmp_path / "teacher"), "methods": {"crosskd": {}}}
    settings = recipe(data, precision=precision, channels_last=channels_last, **taught)
    result = train(settings, tmp_path / "run")
    assert result.steps == 8
    assert {p.device.type for p in load_detector(tmp_path / "run").parameters()} == {"cpu"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_ends_with_the_same_weights(data, tmp_path, monkeypatch, precision):
    settings = recipe(data, deterministic=True, precision=precision, checkpoint_every=1)
    train(settings, tmp_path / "whole")
    from detdistill.engine.run import Run

    report = Run.report

    def die_at_five(run, rate, images_per_second):
        report(run, rate, images_per_second)
        if run.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "report", die_at_five)
        train(settings, tmp_path / "cut")
    train(settings, tmp_path / "cut", resume=True)
    one, two = (load_detector(tmp_path / name).state_dict() for name in ("whole", "cut"))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    torch.use_deterministic_algorithms(False)


def test_the_commands(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    widths = ["base_channels=8", "fpn_channels=16", "tower_channels=16"]
    narrowed = [part for width in widths for part in ("--set", f"student_options.{width}")]
    narrowed += [part for width in widths for part in ("--set", f"teacher_options.{width}")]
    narrowed += ["--set", "resize_short=[64]", "--set", "resize_long=64", "--set", "max_steps=2"]

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_code:
            main([*map(str, arguments)])
        assert not exit_code.value.code, capsys.readouterr().err

    pair = ("--teacher", "gfl_r18", "--student", "gfl_r18", "--methods", "crosskd")
    options = ("--seeds", "0,1", "--jobs", 2, "--data", data, "--out", "s")
    run("compare", *pair, *options, *narrowed)
    facts = json.loads((tmp_path / "s/results.json").read_text())["facts"]
    assert facts["device"] == torch.cuda.get_device_name()
    student, teacher = "s/runs/crosskd/seed0", "s/teacher"
    run("eval", "--weights", student, "--data", data, "--split", "test")
    run("predict", "--weights", student, data / "images" / "test_000000.jpg", "--out", "p")
    run("analyze", "--teacher", teacher, "--student", student, "--data", data, "--out", "a")
    run("doctor", "--teacher", teacher, "--student", "gfl_r18", "--data", data)


def test_an_exported_student_of_the_gpu(tmp_path):
    detector = narrow("gfl_r18").to(DEVICE).eval()
    export_onnx(detector, tmp_path / "student.onnx", size=(64, 64))
    assert (tmp_path / "student.onnx").exists()
