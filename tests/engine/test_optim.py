"""The optimiser's groups, and the rate of a step."""

import pytest
import torch
from torch import nn

from detdistill import create_method
from detdistill.distill import Distiller
from detdistill.engine.optim import learning_rate, make_optimizer, set_rate
from tests.helpers import narrow


def settings_of(optimizer, model):
    """Factor of the rate and decay of every parameter, by name."""
    set_rate(optimizer, 1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def small_model():
    layers = {
        "conv": nn.Conv2d(3, 8, 3),
        "norms": nn.ModuleList([nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8)]),
        "frozen": nn.Linear(8, 2).requires_grad_(False),
        "out": nn.Linear(8, 2),
    }
    return nn.ModuleDict(layers)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_have_a_rate_and_a_decay_of_their_own(recipe, name):
    values = {"optimizer": name, "weight_decay": 0.1, "bias_lr_factor": 2, "bias_weight_decay": 0}
    model = small_model()
    found = settings_of(make_optimizer(model, recipe(**values)), model)
    norms = ("norms.0", "norms.1", "norms.2")
    assert found == {
        **{f"{layer}.weight": (1, 0.1) for layer in ("conv", "out", *norms)},
        **{f"{layer}.bias": (2, 0) for layer in ("conv", "out")},
        **{f"{layer}.bias": (1, 0) for layer in norms},
    }


def test_a_factor_alone_leaves_the_decay_of_biases(recipe):
    model = small_model()
    found = settings_of(make_optimizer(model, recipe(bias_lr_factor=3)), model)
    assert found["out.bias"] == (3, 1e-4) and found["norms.1.bias"] == (1, 1e-4)


@pytest.mark.parametrize("values", [{}, {"bias_lr_factor": 1, "bias_weight_decay": 1e-4}])
def test_there_is_one_group_where_biases_are_as_all(recipe, values):
    """In the model's order, by which the checkpoints of older versions number them."""
    model = Distiller(narrow())
    [group] = make_optimizer(model, recipe(**values)).param_groups
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert list(map(id, group["params"])) == list(map(id, trainable))
    assert group["weight_decay"] == 1e-4


def test_biases_of_a_method_learn_as_the_students(recipe):
    head = create_method("tf_head", roi_channels=32)
    model = Distiller(narrow("fcos_r18_gn"), methods={"tf_head": head})
    values = {"bias_lr_factor": 2, "bias_weight_decay": 0}
    found = settings_of(make_optimizer(model, recipe(**values)), model)
    assert found["student.logits.bias"] == (2, 0)
    own = {name: setting for name, setting in found.items() if name.startswith("methods.")}
    biases = {setting for name, setting in own.items() if name.endswith(".bias")}
    others = {setting for name, setting in own.items() if not name.endswith(".bias")}
    assert biases == {(2, 0)} and others == {(1, 1e-4)}


def test_a_group_without_a_factor_has_the_rate_itself():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    set_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_learning_rate(recipe):
    cosine = recipe(lr=0.1, batch_size=16, base_batch=8, warmup_steps=10, warmup_start=0.5)
    assert learning_rate(cosine, 0, 100, 10) == pytest.approx(0.1)  # 0.2, half of it at first
    assert learning_rate(cosine, 50, 100, 10) == pytest.approx(0.1)
    assert learning_rate(cosine, 100, 100, 10) == pytest.approx(0)
    step = recipe(lr=0.1, base_batch=4, warmup_steps=0, schedule="step", milestones=[4, 8])
    rates = [learning_rate(step, s, 100, 10) for s in (39, 40, 79, 80)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    ("warmup", "rates"), [("linear", [0.02, 0.06, 0.092, 0.1]), ("constant", [0.02] * 3 + [0.1])]
)
def test_a_warm_up_rises_or_stays(recipe, warmup, rates):
    values = {"warmup": warmup, "warmup_steps": 10, "warmup_start": 0.2}
    settings = recipe(lr=0.1, base_batch=4, schedule="step", milestones=[9], **values)
    found = [learning_rate(settings, step, 100, 10) for step in (0, 5, 9, 10)]
    assert found == pytest.approx(rates)
