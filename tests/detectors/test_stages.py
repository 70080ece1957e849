"""The contract says what the code reads."""

from itertools import product

import pytest
from torch import nn
from torchvision.models import detection

from detdistill import Distiller, UserError, as_detector, create_method
from detdistill.detectors.stages import DenseHead, Detector, RoIStages, lacking
from tests.detectors import test_two_stage_views as two_stage_views
from tests.detectors.test_views import BUILD
from tests.helpers import DENSE_R18, TWO_STAGE_R18, make_batch, narrow

MEMBERS = lacking(object(), Detector, DenseHead)


class Hidden(nn.Module):
    """A detector of which nothing but some members can be read."""

    def __init__(self, detector):
        super().__init__()
        self.inside = detector


def only(detector, members):
    """The detector with these members alone."""
    shown = {name: property(lambda self, name=name: getattr(self.inside, name)) for name in members}
    return type("Shown", (Hidden,), shown)(detector)


@pytest.mark.parametrize("name", DENSE_R18 + TWO_STAGE_R18)
def test_every_family_keeps_the_contract(name):
    kind = DenseHead if name in DENSE_R18 else RoIStages
    assert lacking(narrow(name), Detector, kind) == []


@pytest.mark.parametrize("build", [*BUILD.values(), two_stage_views.v1])
def test_every_view_keeps_the_contract(build):
    view = as_detector(build())
    kind = RoIStages if build is two_stage_views.v1 else DenseHead
    assert lacking(view, Detector, kind) == []


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *product(
            ["crosskd", "mimic", "rm", "pfi", "soft_label", "pkd", "feature"],
            ["atss", "retinanet"],
        ),
        ("ld", "gfl"),
    ],
)
def test_methods_read_nothing_beyond_the_contract(method, family):
    members = [*MEMBERS, "reg_max"] if family == "gfl" else MEMBERS
    student, teacher = (only(narrow(f"{family}_r18", seed=seed), members) for seed in (0, 1))
    distiller = Distiller(student, teacher, {method: create_method(method)})
    sum(distiller(make_batch()).values()).backward()
    assert student.inside.fpn.lateral[0].weight.grad.any()


@pytest.mark.parametrize("absent", ["grid", "reduce", "quality_tower", "classes", "decode"])
def test_a_part_that_is_missing_is_named(absent):
    teacher = only(narrow(), [name for name in MEMBERS if name != absent])
    with pytest.raises(UserError, match=f"gfl_r18 lacks {absent} of .*derive it from Dense"):
        Distiller(narrow(), teacher, {"crosskd": create_method("crosskd")})


def test_a_model_is_called_by_its_class():
    model = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    for method, sentence in (
        ("crosskd", r"a dense teacher; FCOS lacks .*, \.\.\. of .*as_detector$"),
        ("crosskd_roi", r"faster_rcnn; FCOS has none"),
    ):
        student = narrow("faster_rcnn_r18") if method == "crosskd_roi" else narrow()
        with pytest.raises(UserError, match=sentence):
            create_method(method).prepare(student, model)
