"""What a `Distiller` is made of, and what it refuses."""

import pytest
import safetensors.torch
import torch
from torchvision.models.detection import retinanet_resnet50_fpn

import detdistill as dd
from tests.helpers import make_batch, narrow


def pair(name="gfl_r18"):
    return narrow(name), narrow(name, seed=1)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"crosskd": dd.CrossKD}, r"crosskd is <class .*; expected a method such as create_method"),
        ({"crosskd": "crosskd"}, "crosskd is 'crosskd'; expected a method"),
        ([dd.PKD()], "expected methods by name"),
        ({"task": dd.PKD()}, "no method can be called 'task'"),
        ({"a.b": dd.PKD()}, "no method can be called 'a.b'"),
        ({"pkd": dd.PKD(weight=-1.0)}, "pkd has the weights {'feature': -1.0}"),
        ({"crosskd": dd.CrossKD(cls_weight=float("nan"))}, "crosskd has the weights {'cls': nan}"),
    ],
)
def test_what_is_no_method_is_refused(methods, message):
    with pytest.raises(dd.UserError, match=message):
        dd.Distiller(*pair(), methods)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dd.CrossKD(box_loss="l1"), "crosskd: box_loss is 'l1'; expected 'kl' or"),
        (lambda: dd.PredictionMimicking(box_loss="l1"), "mimic: box_loss is 'l1'"),
        (lambda: dd.CrossKD(temperature=0), "crosskd: temperature is 0; expected a number above 0"),
        (lambda: dd.RM(temperature=-1.0), "rm: temperature is -1.0"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_given(make, message):
    with pytest.raises(dd.UserError, match=message):
        make()


def test_a_model_without_stages_is_refused():
    raw = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(dd.UserError, match=r"the student is a RetinaNet, .* as_detector"):
        dd.Distiller(raw)
    with pytest.raises(dd.UserError, match="the teacher is a RetinaNet"):
        dd.Distiller(narrow(), raw, {"pkd": dd.PKD()})


def test_a_method_keeps_the_settings_of_one_pair():
    method = dd.CrossKD()
    dd.Distiller(*pair("fcos_r18"), {"crosskd": method})
    with pytest.raises(dd.UserError, match="crosskd was prepared for another pair"):
        dd.Distiller(*pair("retinanet_r18"), {"crosskd": method})


def test_a_former_teacher_is_no_student_by_accident():
    student, teacher = pair()
    dd.Distiller(student, teacher, {"crosskd": dd.CrossKD()})
    with pytest.raises(dd.UserError, match="no parameter of the student is trainable"):
        dd.Distiller(teacher, student, {"crosskd": dd.CrossKD()})


def test_its_state_is_tensors_alone_and_holds_the_iteration(tmp_path):
    distiller = dd.Distiller(*pair(), {"crosskd": dd.CrossKD()})
    for _ in range(3):
        distiller(make_batch())
    distiller.eval()(make_batch())
    assert distiller.iteration == 3  # training steps alone
    safetensors.torch.save_file(distiller.state_dict(), tmp_path / "state.safetensors")
    state = safetensors.torch.load_file(tmp_path / "state.safetensors")
    other = dd.Distiller(*pair(), {"crosskd": dd.CrossKD()})
    other.load_state_dict(state)
    assert other.iteration == 3
    other.load_state_dict({**state, "_extra_state": {"iteration": 7}})  # as it was stored once
    assert other.iteration == 7


def test_a_distilled_step_needs_no_gradient_of_the_teacher():
    student, teacher = pair()
    distiller = dd.Distiller(student, teacher, {"crosskd": dd.CrossKD()})
    torch.stack(list(distiller(make_batch()).values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
