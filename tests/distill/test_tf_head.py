"""TF-HEAD: assistants without a teacher, what they teach, and that they leave no trace."""

import pytest
import torch

from detdistill import TFHEAD, Distiller, UserError, create_method, load_detector, save_detector
from detdistill.detectors.registry import FAMILIES
from detdistill.distill.adapters import mean_square, mean_square_of_levels
from detdistill.distill.projectors import gather_cells
from tests.helpers import make_batch, narrow

FCOS = {f"fcos_{term}": 0.5 for term in ("cls", "box", "quality")}
RETINANET = {f"retinanet_{term}": 1.0 for term in ("cls", "box")}
RCNN = {f"rcnn_{term}": 1.0 for term in ("cls", "box")}
STUDENTS = [
    ("retinanet", {**FCOS, **RCNN, "ckd_fcos": 1.0, "ckd_rcnn": 1.3}),
    ("fcos", {**RETINANET, **RCNN, "ckd_retinanet": 1.0, "ckd_rcnn": 1.3}),
    ("faster_rcnn", {**FCOS, **RETINANET, "ckd_fcos": 1.0, "ckd_retinanet": 1.0}),
]
NAMES = [student for student, _ in STUDENTS]
WARM = 2000


def distil(student, counts=(2, 1), iteration=WARM, **options):
    """A distiller after one step on a batch, and that step's terms."""
    student = narrow(f"{student}_r18") if isinstance(student, str) else student
    distiller = Distiller(student, None, {"tf_head": TFHEAD(**options)}).train()
    distiller.iteration = iteration
    return distiller, distiller(make_batch(counts))


def sum_of(losses, *prefixes):
    return sum(
        v for k, v in losses.items() if k.startswith(tuple(f"tf_head/{p}" for p in prefixes))
    )


def reached(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("student", "weights"), STUDENTS)
def test_published_terms_and_weights_of_each_student(student, weights):
    distiller, losses = distil(student)
    assert distiller.methods["tf_head"].weights == weights
    assert {name for name in losses if name.startswith("tf_head/")} == {
        f"tf_head/{term}" for term in weights
    }
    for term, weight in weights.items():
        raw = distiller.raw[f"tf_head/{term}"].item()
        assert raw > 0 or term == "rcnn_box", term
        assert losses[f"tf_head/{term}"].item() == pytest.approx(raw * weight), term


@pytest.mark.parametrize("student", NAMES)
def test_what_the_assistants_learn_reaches_the_pyramid_and_no_tower(student):
    distiller, losses = distil(student)
    sum_of(losses, "fcos", "retinanet", "rcnn").backward()
    for part in (distiller.student.backbone, distiller.student.fpn):
        assert reached(part)
    own = {k: v for k, v in distiller.student.named_children() if k not in ("backbone", "fpn")}
    assert not any(reached(part) for part in own.values())
    assert all(reached(a) for a in distiller.methods["tf_head"].assistants.values())


@pytest.mark.parametrize("student", NAMES)
def test_ckd_reaches_the_student_and_no_assistant(student):
    distiller, losses = distil(student)
    sum_of(losses, "ckd").backward()
    method = distiller.methods["tf_head"]
    assert not any(reached(a) for a in method.assistants.values())
    assert all(reached(p) for p in method.projectors.values())
    tower = distiller.student.rpn.tower if student == "faster_rcnn" else None
    assert reached(tower or distiller.student.towers["cls"])
    assert reached(distiller.student.fpn)
    if tower is None:
        assert not reached(distiller.student.towers["box"])


@pytest.mark.parametrize("name", FAMILIES.names())
@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0)])
def test_every_family_learns_from_it_on_any_batch(name, counts):
    distiller, losses = distil(name, counts)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    for parameter_name, parameter in distiller.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_dense_ckd_by_its_formula():
    distiller, losses = distil("retinanet", assistants=("fcos",))
    method, student = distiller.methods["tf_head"], distiller.student
    with torch.no_grad():
        output = student(make_batch())
        taught = method.assistants["fcos"](output.pyramid)
        own = [maps[-1] for maps in output.towers["cls"]]
        found = [method.projectors["fcos"](level) for level in own]
        wanted = [maps[-1] for maps in taught.towers["cls"]]
        by_hand = sum((f - w).square().mean() for f, w in zip(found, wanted, strict=True))
    torch.testing.assert_close(losses["tf_head/ckd_fcos"].detach(), by_hand)
    torch.testing.assert_close(mean_square_of_levels(found, wanted), by_hand)


def test_box_ckd_by_its_formula():
    distiller, losses = distil("retinanet", assistants=["rcnn"], ckd_projector="single")
    method, student = distiller.methods["tf_head"], distiller.student
    batch = make_batch()
    targets = batch.padded_targets()
    with torch.no_grad():
        output = student(batch)
        head = method.assistants["rcnn"].head(0)
        rois = head.sample(student.propose(output, targets.sizes), targets)
        features = head.roi(output.pyramid, rois).features[-1]
        origin, own = torch.cat(rois.origin), ~torch.cat(rois.from_truth)
        maps = [level[-1] for level in output.towers["cls"]]
        cells = gather_cells(maps, rois.image_index[own], origin[own])
        wanted = mean_square(method.projectors["rcnn"].linear(cells), features[own]) * 1.3
    assert 0 < own.sum() < len(own)
    torch.testing.assert_close(losses["tf_head/ckd_rcnn"].detach(), wanted, rtol=1e-4, atol=1e-6)


def test_the_projector_is_per_anchor_as_published():
    projectors = {n: distil(n)[0].methods["tf_head"].projectors["rcnn"] for n in NAMES[:2]}
    assert {n: p.anchors for n, p in projectors.items()} == {"retinanet": 9, "fcos": 1}


def test_the_fcos_assistant_is_the_improved_form():
    head = distil("retinanet")[0].methods["tf_head"].assistants["fcos"].head
    assert (head.radius, head.norm_on_bbox, head.box_loss) == (1.5, True, "giou")
    assert head.quality_tower == "box"
    assert not hasattr(head, "backbone") and not hasattr(head, "fpn")


def test_all_terms_warm_up_and_only_ckd_stops():
    method = create_method("tf_head", stop=58640)
    Distiller(narrow("retinanet_r18"), None, {"tf_head": method})
    factors = {0: (0, 0), 500: (0.25, 0.25), 2000: (1, 1), 58639: (1, 1), 58640: (1, 0)}
    for iteration, (truth, ckd) in factors.items():
        found = method.factors(iteration)
        assert {found[t] for t in (*FCOS, *RCNN)} == {truth}, iteration
        assert {found[t] for t in ("ckd_fcos", "ckd_rcnn")} == {ckd}, iteration
    assert TFHEAD().schedule.stop is None
    assert TFHEAD(assistant_warmup=False).assistant_warmup is False


def test_after_the_early_stop_the_assistants_still_learn(monkeypatch):
    distiller = Distiller(
        narrow("retinanet_r18"), None, {"tf_head": create_method("tf_head", stop=3000)}
    ).train()
    distiller.iteration = 3000
    for projector in distiller.methods["tf_head"].projectors.values():
        monkeypatch.setattr(projector, "forward", lambda *_: pytest.fail("CKD was computed"))
    losses = distiller(make_batch())
    assert distiller.resting == {"tf_head/ckd_fcos", "tf_head/ckd_rcnn"}
    assert losses["tf_head/fcos_cls"] > 0 and losses["tf_head/ckd_fcos"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"assistants": ("rcnn",), "ckd": False}, set(RCNN)),
        ({"assistants": ["fcos"]}, {*FCOS, "ckd_fcos"}),
        ({"ckd": False}, {*FCOS, *RCNN}),
        ({"dense_weight": 0.2, "rcnn_weight": 0.3}, {*FCOS, *RCNN, "ckd_fcos", "ckd_rcnn"}),
    ],
)
def test_parts_can_be_chosen(options, terms):
    distiller, losses = distil("retinanet", **options)
    weights = distiller.methods["tf_head"].weights
    assert set(weights) == terms
    assert {k for k in losses if k.startswith("tf_head")} == {f"tf_head/{t}" for t in terms}
    assert weights.get("ckd_rcnn", 1.3) == options.get("rcnn_weight", 1.3)
    assert weights.get("ckd_fcos", 1.0) == options.get("dense_weight", 1.0)


def test_a_training_step_moves_assistants_and_the_students_file_knows_nothing(tmp_path):
    student = narrow("retinanet_r18")
    keys = set(student.state_dict())
    distiller, losses = distil(student)
    before = {k: v.clone() for k, v in distiller.methods.state_dict().items()}
    sum(losses.values()).backward()
    torch.optim.SGD(distiller.parameters(), lr=0.1).step()
    after = distiller.methods.state_dict()
    parts = {".".join(k.split(".")[1:3]) for k, v in before.items() if not torch.equal(after[k], v)}
    assert parts == {f"{a}.{k}" for a in ("assistants", "projectors") for k in ("fcos", "rcnn")}
    assert {f"methods.{key}" for key in after} < set(distiller.state_dict())
    assert set(student.state_dict()) == keys
    save_detector(student, tmp_path / "model.safetensors")
    assert set(load_detector(tmp_path).state_dict()) == keys


def test_assistants_come_back_from_a_resume_checkpoint():
    distiller, _ = distil("retinanet")
    again, _ = distil("retinanet")
    again.load_state_dict(distiller.state_dict())
    for key, value in distiller.methods.state_dict().items():
        assert torch.equal(again.methods.state_dict()[key], value), key
    assert again.iteration == distiller.iteration == WARM + 1


def test_equal_seeds_give_the_student_that_plain_training_starts_from():
    plain = narrow("retinanet_r18").state_dict()
    distilled = distil("retinanet", iteration=0)[0].student.state_dict()
    weights = [key for key in plain if "running" not in key and "tracked" not in key]
    assert all(torch.equal(plain[key], distilled[key]) for key in weights)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ("retinanet", {"assistants": ["retinanet"]}, r"choose from \['fcos', 'rcnn'\]"),
        ("fcos", {"assistants": ("rcnn", "fcos")}, "'fcos' is no other kind of head than fcos_r18"),
        ("faster_rcnn", {"assistants": ["rcnn"]}, "no other kind of head than faster_rcnn_r18"),
        ("cascade_rcnn", {"assistants": ["rcnn"]}, "no other kind of head than cascade_rcnn_r18"),
        ("retinanet", {"assistants": []}, "at least one"),
        ("retinanet", {"assistants": ["fcos", "fcos"]}, "at most once"),
    ],
)
def test_what_cannot_work_is_refused_before_training(student, options, message):
    with pytest.raises(UserError, match=message) as caught:
        Distiller(narrow(f"{student}_r18"), None, {"tf_head": TFHEAD(**options)})
    assert "\n" not in str(caught.value)


def test_the_boxes_head_can_be_as_small_as_the_student():
    method = TFHEAD(assistants=["rcnn"], roi_channels=24, roi_samples=8)
    Distiller(narrow("retinanet_r18"), None, {"tf_head": method})
    head = method.assistants["rcnn"].head(0)
    assert (head.shared[-1].out_features, head.samples) == (24, 8)
    assert method.projectors["rcnn"].linear.out_features % 24 == 0


def test_options_by_name():
    assert create_method("tf_head", assistants=["rcnn"]).wanted == ["rcnn"]
    assert create_method("tf_head", assistants=("fcos", "rcnn")).wanted == ("fcos", "rcnn")
    assert not create_method("tf_head").needs_teacher
    for options, message in (
        ({"assistants": ["gfl"]}, "option assistants"),
        ({"assistants": "fcos"}, "option assistants"),
        ({"assistant": ["fcos"]}, "did you mean 'assistants'"),
        ({"rcnn_weight": -1.0}, "from 0 on"),
    ):
        with pytest.raises(UserError, match=message):
            create_method("tf_head", **options)
    with pytest.raises(UserError, match="assistants is 'gfl'; expected 'fcos' or"):
        TFHEAD(assistants=["gfl"])
    student = narrow("retinanet_r18")
    student.strides = (32, 64, 128, 256, 512)
    with pytest.raises(UserError, match="an assistant fcos stands on levels of strides"):
        Distiller(student, None, {"tf_head": TFHEAD()})
