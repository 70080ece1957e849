"""PKD: what it measures, whom it reaches, and which pairs meet."""

import pytest
import torch

from detdistill import PKD, CrossKD, Distiller, UserError, create_method
from detdistill.detectors.registry import FAMILIES
from detdistill.distill.pkd import pattern_difference
from tests.helpers import make_batch, narrow

R18 = [f"{family}_r18" for family in FAMILIES.names()]


def distil(student, teacher, batch=None, **options):
    distiller = Distiller(student, teacher, {"pkd": PKD(**options)}).train()
    return distiller, distiller(batch or make_batch())["pkd/feature"]


def test_equals_one_minus_the_pearson_correlation():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    rows = [m.transpose(0, 1).flatten(1) for m in (student, teacher)]
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)])
    # Deviations are unbiased, so a mean over n elements is (n - 1) / n of the paper's.
    wanted = (1 - r).mean() * 39 / 40
    torch.testing.assert_close(pattern_difference(student, teacher), wanted, rtol=1e-4, atol=1e-6)


def test_unlike_pyramids_meet_by_order():
    batch, student, teacher = make_batch(), narrow("retinanet_r18"), narrow("faster_rcnn_r18", 3, 1)
    with pytest.raises(UserError, match=r"teacher's pyramid has .* or set match to 'order'$"):
        distil(student, teacher)
    _, loss = distil(student, teacher, batch, match="order", levels=3, weight=1.0)
    with torch.no_grad():
        levels = [model.pyramid(model.normalize(batch)).levels for model in (student, teacher)]
    wanted = 0
    for found, taught in list(zip(*levels, strict=True))[:3]:
        assert found.shape[-2] * 2 == taught.shape[-2] and found.shape[-1] * 2 == taught.shape[-1]
        grown = torch.nn.functional.interpolate(found, scale_factor=2, mode="bilinear")
        wanted += pattern_difference(grown, taught)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-6)
    student.strides = student.strides[:3]
    with pytest.raises(UserError, match="levels is 4, but retinanet_r18 has 3 pyramid levels"):
        distil(student, teacher, batch, match="order", levels=4)


def test_scale_and_offset_of_a_channel_do_not_count():
    level = torch.randn(2, 3, 4, 5)
    factor, offset = torch.rand(1, 3, 1, 1) + 0.5, torch.randn(1, 3, 1, 1)
    assert pattern_difference(level * factor + offset, level).item() == pytest.approx(0, abs=1e-9)


def test_one_element_and_dead_channels_stay_finite():
    lonely = torch.randn(1, 3, 1, 1, requires_grad=True)
    loss = pattern_difference(lonely, torch.randn(1, 3, 1, 1))
    loss.backward()
    assert loss.item() == 0 and not lonely.grad.any()
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    pattern_difference(dead, torch.randn(2, 3, 4, 4)).backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize("name", R18)
def test_reaches_pyramid_and_backbone_but_no_head(name):
    student, teacher = narrow(name), narrow(name, seed=1)
    _, loss = distil(student, teacher)
    assert loss.isfinite() and loss > 0
    loss.backward()
    for part in (student.fpn, student.backbone):
        assert all(p.grad is not None for p in part.parameters())
    heads = [p for n, p in student.named_parameters() if not n.startswith(("fpn.", "backbone."))]
    assert heads and all(p.grad is None for p in heads)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("family", "weight"),
    [
        *(("gfl", 6.0), ("retinanet", 2.0), ("fcos", 2.0), ("atss", 1.0)),
        *(("faster_rcnn", 6.0), ("reppoints", 6.0)),
        ("cascade_rcnn", 2.0),  # not published
    ],
)
def test_weights_by_the_teachers_family(family, weight):
    student = "faster_rcnn_r18" if family.endswith("rcnn") else "gfl_r18"
    distiller, loss = distil(narrow(student), narrow(f"{family}_r18", seed=1))
    assert distiller.methods["pkd"].weights == {"feature": weight}
    assert loss.item() == pytest.approx(distiller.raw["pkd/feature"].item() * weight)


def test_the_original_papers_setting_leaves_the_coarsest_level_out():
    student, teacher = narrow(), narrow(seed=1)
    distiller, loss = distil(student, teacher, weight=10.0, levels=4)
    batch = make_batch()
    with torch.no_grad():
        pyramids = [m.pyramid(m.normalize(batch)) for m in (student.train(), teacher)]
        pairs = list(zip(*pyramids, strict=True))[:4]
        wanted = 10 * sum(pattern_difference(*pair) for pair in pairs)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert distiller.methods["pkd"].levels == [0, 1, 2, 3]


def test_unequal_widths_meet_in_one_adapter_for_all_levels():
    student, teacher = narrow(fpn_channels=8), narrow(seed=1, fpn_channels=24)
    distiller, loss = distil(student, teacher)
    loss.backward()
    adapters = list(distiller.methods["pkd"].adapter.parameters())
    assert [tuple(p.shape) for p in adapters] == [(24, 8, 1, 1), (24,)]
    assert adapters[0].grad.any()
    assert not any("pkd" in key for key in student.state_dict())


def test_classes_need_not_agree_and_methods_combine():
    distil(narrow(num_classes=3), narrow(num_classes=5, seed=1))
    distiller = Distiller(narrow(), narrow(seed=1), {"crosskd": CrossKD(), "pkd": PKD()})
    losses = distiller(make_batch())
    assert {"crosskd/cls", "crosskd/box", "pkd/feature"} < set(losses)


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_needs_no_boxes(counts):
    _, loss = distil(narrow(), narrow(seed=1), make_batch(counts))
    assert loss > 0


def test_refusals():
    with pytest.raises(UserError, match="choose at least 1"):
        PKD(levels=0)
    with pytest.raises(UserError, match="has 5 pyramid levels"):
        Distiller(narrow(), narrow(seed=1), {"pkd": PKD(levels=6)})
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(narrow(), None, {"pkd": PKD()})
    with pytest.raises(UserError, match="did you mean 'weight'"):
        create_method("pkd", weigth=2.0)
    student = narrow()
    student.strides = (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match=r"pkd: the teacher's pyramid .* \[8, 16, 32, 64, 128\]"):
        Distiller(student, narrow(seed=1), {"pkd": PKD()})
