"""HEAD: whom its terms reach, which boxes count, what each pair gets, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from detdistill import HEAD, CrossKD, Distiller, UserError, create_method
from detdistill.detectors.base import FPNDetector
from detdistill.detectors.faster_rcnn import FasterRCNN
from detdistill.distill.adapters import mean_square
from detdistill.distill.method import Step
from detdistill.distill.projectors import CellProjector, cross_kind_loss, gather_cells
from detdistill.structures import GROUND_TRUTH, Proposals, TwoStageAssignment
from tests.helpers import make_batch, narrow

ASSISTANT = {"assistant_cls": 1.0, "assistant_box": 1.0}
REPPOINTS_TERMS = {
    **{"assistant_cls": 1.0, "assistant_box_init": 0.5, "assistant_box": 1.0},
    **{f"akd_{m}": 1.0 for m in ("tower_cls", "tower_box", "init", "cls", "refine")},
}
CASCADE_TERMS = {
    f"assistant_{term}_{stage}": weight
    for stage, weight in enumerate((1.0, 0.5, 0.25), 1)
    for term in ("cls", "box")
} | {f"akd_{stage}_{layer}": 1.0 for stage in (1, 2, 3) for layer in (1, 2)}
PAIRS = [
    ("retinanet", "faster_rcnn", {**ASSISTANT, "akd_1": 2.0, "akd_2": 2.0, "ckd": 2.0}),
    ("fcos", "faster_rcnn", {**ASSISTANT, "akd_1": 2.0, "akd_2": 2.0, "ckd": 1.0}),
    ("retinanet", "reppoints", REPPOINTS_TERMS),
    ("fcos", "reppoints", REPPOINTS_TERMS),
    ("faster_rcnn", "cascade_rcnn", CASCADE_TERMS),
]
NAMES = [pair[:2] for pair in PAIRS]
WARM = 2000


def distil(student, teacher, counts=(2, 1), iteration=WARM, **options):
    """A distiller after one step on a batch, and that step's terms."""
    models = [
        narrow(f"{n}_r18", seed=i) if isinstance(n, str) else n
        for i, n in enumerate((student, teacher))
    ]
    distiller = Distiller(*models, {"head": HEAD(**options)}).train()
    distiller.iteration = iteration
    return distiller, distiller(make_batch(counts))


def sum_of(losses, prefix):
    return sum(value for name, value in losses.items() if name.startswith(prefix))


def reached(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("student", "teacher", "weights"), PAIRS)
def test_published_terms_and_weights_of_each_pair(student, teacher, weights):
    distiller, losses = distil(student, teacher)
    assert distiller.methods["head"].weights == weights
    assert {name for name in losses if name.startswith("head/")} == {f"head/{t}" for t in weights}
    for term, weight in weights.items():
        raw = distiller.raw[f"head/{term}"].item()
        assert raw > 0 or term.startswith("assistant_box"), term
        assert losses[f"head/{term}"].item() == pytest.approx(raw * weight), term


@pytest.mark.parametrize(("student", "teacher"), NAMES)
def test_akd_reaches_the_students_pyramid_through_the_assistant(student, teacher):
    distiller, losses = distil(student, teacher)
    sum_of(losses, "head/akd").backward()
    for part in (distiller.student.backbone, distiller.student.fpn):
        assert reached(part)
    own = {k: v for k, v in distiller.student.named_children() if k not in ("backbone", "fpn")}
    assert not any(reached(part) for part in own.values())
    assert reached(distiller.methods["head"].link.assistant)
    assert all(reached(adapter) for adapter in distiller.methods["head"].link.adapters.values())
    assert all(p.grad is None for p in distiller.teacher.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "branches"),
    [
        ("retinanet", "faster_rcnn", {"cls"}),
        ("fcos", "faster_rcnn", {"cls"}),
        ("retinanet", "reppoints", {"cls", "box"}),
    ],
)
def test_ckd_reaches_the_students_towers(student, teacher, branches):
    distiller, losses = distil(student, teacher, ckd=True)
    sum_of(losses, "head/ckd").backward()
    towers = distiller.student.towers
    assert {branch for branch in towers if reached(towers[branch])} == branches
    assert reached(distiller.student.fpn)
    assert not reached(distiller.methods["head"].link.assistant)
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert not reached(distiller.student.logits)


def test_ckd_of_a_two_stage_student_reaches_its_shared_layers():
    distiller, losses = distil("faster_rcnn", "cascade_rcnn", ckd=True)
    assert distiller.methods["head"].weights["ckd"] == 2.0
    losses["head/ckd"].backward()
    [head] = distiller.student.roi_heads
    assert reached(head.shared) and not reached(head.logits)
    assert distiller.methods["head"].link.projector.bias is None


def test_dense_ckd_takes_the_middle_of_the_students_towers():
    distiller, losses = distil("retinanet", "reppoints", ckd=True)
    losses["head/ckd_cls"].backward()
    blocks = distiller.student.towers["cls"].blocks
    assert [reached(block) for block in blocks] == [True, True, False, False]


@pytest.mark.parametrize(("student", "teacher"), NAMES)
def test_every_parameter_learns_and_the_teacher_does_not(student, teacher):
    distiller, losses = distil(student, teacher)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    assistant = distiller.methods["head"].link.assistant
    assert all(p.requires_grad for p in assistant.parameters())


@pytest.mark.parametrize(("student", "teacher"), NAMES)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_finite_without_boxes(student, teacher, counts):
    distiller, losses = distil(student, teacher, counts)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in distiller.parameters())


def test_the_assistant_starts_as_the_teachers_head_and_goes_its_own_way():
    teacher = narrow("faster_rcnn_r18", seed=1)
    distiller, losses = distil("retinanet", teacher)
    [copied] = distiller.methods["head"].link.assistant.heads
    for key, value in teacher.roi_heads[0].state_dict().items():
        assert torch.equal(copied.state_dict()[key], value), key
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    sum(losses.values()).backward()
    torch.optim.SGD(distiller.parameters(), lr=0.1).step()
    assert not torch.equal(copied.logits.weight, teacher.roi_heads[0].logits.weight)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_dense_assistant_starts_as_the_teachers_head():
    teacher = narrow("reppoints_r18", seed=1)
    distiller, _ = distil("retinanet", teacher)
    copied = distiller.methods["head"].link.assistant.head.state_dict()
    wanted = {
        k: v for k, v in teacher.state_dict().items() if not k.startswith(("backbone", "fpn"))
    }
    assert set(copied) == set(wanted)
    assert all(torch.equal(copied[key], value) for key, value in wanted.items())


def test_the_student_leaves_as_it_came():
    student = narrow("retinanet_r18")
    keys = set(student.state_dict())
    distiller, _ = distil(student, "faster_rcnn")
    assert set(student.state_dict()) == keys
    others = {k for k in distiller.state_dict() if not k.startswith(("student.", "_extra_state"))}
    parts = {key.split(".")[3] for key in others}
    assert parts == {"assistant", "adapters", "projector"}
    assert all(key.startswith("methods.head.link.") for key in others)


@pytest.mark.parametrize("teacher", ["faster_rcnn", None])
def test_the_assistant_alone_runs_no_roi_head_of_a_teacher(teacher, monkeypatch):
    model = teacher and narrow(f"{teacher}_r18", seed=1)
    if model:
        monkeypatch.setattr(model, "roi", lambda *_: pytest.fail("the teacher's head ran"))
    distiller, losses = distil("retinanet", model, akd=False, ckd=False)
    assert distiller.methods["head"].weights == ASSISTANT
    sum_of(losses, "head/").backward()
    assert reached(distiller.student.fpn)
    assert not any(reached(tower) for tower in distiller.student.towers.values())
    assert not distiller.methods["head"].needs_teacher


@pytest.mark.parametrize(("student", "teacher"), NAMES)
def test_the_assistant_alone_knows_no_weight_of_a_teacher(student, teacher):
    assistants = []
    for seed in (1, 2):
        model = narrow(f"{teacher}_r18", seed=seed)
        torch.manual_seed(0)
        distiller, _ = distil(student, model, akd=False, ckd=False)
        assistants.append(distiller.methods["head"].link.assistant.state_dict())
    assert all(torch.equal(value, assistants[1][key]) for key, value in assistants[0].items())
    copied, _ = distil(student, model, akd=False, ckd=False, assistant_weights="teacher")
    copied = copied.methods["head"].link.assistant.state_dict()
    assert {k: v.shape for k, v in copied.items()} == {k: v.shape for k, v in assistants[1].items()}
    assert any(not torch.equal(value, assistants[1][key]) for key, value in copied.items())


def test_where_the_assistant_starts_can_be_chosen():
    teacher = narrow("faster_rcnn_r18", seed=1)
    for options, same in (
        ({}, True),
        ({"assistant_weights": "fresh"}, False),
        ({"akd": False, "ckd": False}, False),
        ({"akd": False, "ckd": False, "assistant_weights": "teacher"}, True),
    ):
        distiller, _ = distil("retinanet", teacher, **options)
        found = distiller.methods["head"].link.assistant.head(0).shared[0].weight
        assert torch.equal(found, teacher.roi_heads[0].shared[0].weight) == same, options
    with pytest.raises(UserError, match="teacher"):
        distil("retinanet", None, akd=False, ckd=False, assistant_weights="teacher")


def test_an_untrained_copy_needs_to_know_how_its_pattern_was_built():
    teacher = FasterRCNN(3, base_channels=8, fpn_channels=16, roi_channels=16)
    told = "head: the assistant starts untrained in the form of the teacher's head, but "
    with pytest.raises(UserError, match=told + "faster_rcnn_.* set assistant_weights to 'teacher'"):
        distil("retinanet", teacher, akd=False, ckd=False)
    distil("retinanet", teacher, akd=False, ckd=False, assistant_weights="teacher")


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"ckd": False}, {"akd_1", "akd_2"}),
        ({"akd": False, "ckd": True}, {"ckd"}),
        ({"akd_weight": 0.5, "ckd_weight": 3.0}, {"akd_1", "akd_2", "ckd"}),
    ],
)
def test_either_part_can_be_left_out(options, terms):
    distiller, losses = distil("retinanet", "faster_rcnn", **options)
    weights = distiller.methods["head"].weights
    assert set(weights) - set(ASSISTANT) == terms
    assert set(losses) - {"task/cls", "task/box"} == {f"head/{term}" for term in weights}
    assert weights.get("akd_2") == (options.get("akd_weight", 2.0) if "akd_2" in terms else None)
    assert weights.get("ckd") == (options.get("ckd_weight", 2.0) if "ckd" in terms else None)


def test_one_feature_is_zero_where_the_assistant_equals_the_teacher():
    """With adapters that change nothing and one pyramid for both, AKD has nothing to say."""
    teacher = narrow("faster_rcnn_r18", seed=1)
    distiller, _ = distil("retinanet", teacher)
    link = distiller.methods["head"].link
    for adapter in link.adapters.values():
        torch.nn.init.eye_(adapter.weight)
        torch.nn.init.zeros_(adapter.bias)
    batch = make_batch()
    with torch.no_grad():
        student = distiller.student(batch)
        step = SimpleNamespace(
            student=student,
            student_model=distiller.student,
            teacher=student,
            teacher_model=teacher,
            targets=batch.padded_targets(),
        )
        terms = link(step, {"akd", "ckd"})
    assert terms["akd_1"].item() == pytest.approx(0, abs=1e-12)
    assert terms["akd_2"].item() == pytest.approx(0, abs=1e-12)
    assert terms["ckd"] > 0


def rois_of(*origins):
    """One image per argument, each a list of origins."""
    tables = [torch.tensor(rows).reshape(-1, 4) for rows in origins]
    boxes = [torch.zeros(len(t), 4) for t in tables]
    return Proposals(boxes, [b[:, 0] for b in boxes], tables)


def step_of_dense(tower):
    """What CKD sees of a dense student's step: its class tower, as levels of depths."""
    return SimpleNamespace(student=SimpleNamespace(towers={"cls": tower}), student_model=None)


def test_gathering_by_hand():
    fine = torch.arange(2 * 3 * 2 * 4.0).reshape(2, 3, 2, 4)
    coarse = -torch.arange(2 * 3 * 1 * 2.0).reshape(2, 3, 1, 2)
    origin = torch.tensor([[1, 0, 1, 0], [0, 1, 2, 5], [0, 0, 3, 0]])
    image = torch.tensor([1, 0, 1])
    found = gather_cells([fine, coarse], image, origin)
    # Channel strides 8 and 2, image strides 24 and 6.
    assert found.tolist() == [[-7.0, -9.0, -11.0], [6.0, 14.0, 22.0], [27.0, 35.0, 43.0]]


def test_ckd_drops_the_ground_truth_and_reads_the_origin_of_the_rest():
    truth = [GROUND_TRUTH, 0, 0, 0]
    rois = rois_of([truth, [0, 1, 1, 0]], [truth, [1, 0, 0, 0], [0, 0, 1, 0]])
    maps = [torch.rand(2, 3, 2, 2), torch.rand(2, 3, 1, 1)]
    step = step_of_dense([[None, level] for level in maps])
    features = torch.rand(5, 4)
    project = CellProjector(3, 4, 1)
    cells = torch.stack((maps[0][0, :, 1, 1], maps[1][1, :, 0, 0], maps[0][1, :, 0, 1]))
    wanted = (project.linear(cells) - features[[1, 3, 4]]).square().mean()
    torch.testing.assert_close(cross_kind_loss(project, step, rois, features), wanted)


def test_ckd_of_ground_truth_alone_is_zero_and_tied():
    rois = rois_of([[GROUND_TRUTH, 0, 0, 0]])
    tower = torch.rand(1, 3, 2, 2, requires_grad=True)
    step = step_of_dense([[None, tower]])
    project = CellProjector(3, 4, 1)
    loss = cross_kind_loss(project, step, rois, torch.rand(1, 4))
    loss.backward()
    assert loss.item() == 0
    assert not tower.grad.any() and not project.linear.weight.grad.any()


def test_a_projection_for_each_anchor():
    project = CellProjector(2, 3, 4)
    cells, anchor = torch.rand(5, 2), torch.tensor([0, 3, 1, 3, 2])
    weights = project.linear.weight.reshape(4, 3, 2)
    biases = project.linear.bias.reshape(4, 3)
    wanted = torch.stack([weights[a] @ c + biases[a] for c, a in zip(cells, anchor, strict=True)])
    torch.testing.assert_close(project(cells, anchor), wanted)


@pytest.mark.parametrize(("student", "anchors"), [("retinanet", 9), ("fcos", 1)])
def test_the_per_anchor_projector_fits_the_students_anchors(student, anchors):
    distiller, losses = distil(student, "faster_rcnn", ckd_projector="per_anchor")
    projector = distiller.methods["head"].link.projector
    assert projector.linear.weight.shape == (anchors * 32, 16)
    losses["head/ckd"].backward()
    assert reached(projector) and reached(distiller.student.towers["cls"])


def test_mean_square_of_nothing_is_zero():
    assert mean_square(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0
    assert mean_square(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])).item() == 2.5


@pytest.mark.parametrize(
    ("student", "teacher", "shape"),
    [
        ("retinanet", "faster_rcnn", (24, 8, 1, 1)),
        ("retinanet", "reppoints", (24, 8, 1, 1)),
        ("faster_rcnn", "cascade_rcnn", (24, 8, 1, 1)),
    ],
)
def test_pyramids_of_unequal_width_meet_in_an_adapter(student, teacher, shape):
    distiller, losses = distil(
        narrow(f"{student}_r18", fpn_channels=8), narrow(f"{teacher}_r18", seed=1, fpn_channels=24)
    )
    sum_of(losses, "head/akd").backward()
    adapter = distiller.methods["head"].link.assistant.adapter
    assert tuple(adapter.weight.shape) == shape and reached(adapter)


def test_a_two_stage_student_lends_its_sample_and_meets_dense_teachers_too():
    distiller, losses = distil("faster_rcnn", "cascade_rcnn")
    assistant = distiller.methods["head"].link.assistant
    rois = Proposals([], [], [])
    own = TwoStageAssignment(dense=None, rois=rois)
    step = Step(None, None, distiller.student, None, None, own, iteration=0)
    assert assistant.boxes(step, 1000) is rois
    # P7, which the student lacks, is pooled.
    distiller, losses = distil("faster_rcnn", "reppoints")
    sum(losses.values()).backward()
    assert losses["head/akd_refine"] > 0


def test_the_number_of_proposals_bounds_what_is_drawn(monkeypatch):
    distiller, _ = distil("retinanet", "faster_rcnn", proposals=7)
    link, seen = distiller.methods["head"].link, []
    [head] = distiller.teacher.roi_heads
    pool = head.pool
    monkeypatch.setattr(head, "pool", lambda p, r: seen.append(r) or pool(p, r))
    distiller(make_batch((2, 1)))
    assert link.settings.proposals == 7
    assert [len(boxes) for boxes in seen[0].boxes_xyxy] == [9, 8]  # with the ground truth


def test_pre_activation_maps_of_another_method_change_nothing():
    student, teacher = narrow("retinanet_r18"), narrow("reppoints_r18", seed=1)
    torch.manual_seed(0)
    plain = Distiller(student, teacher, {"head": HEAD(ckd=True)}).train()
    plain.iteration = WARM
    wanted = plain(make_batch())
    both = Distiller(student, teacher, {"crosskd": CrossKD(align_on="pre_act")})
    both.methods["head"] = plain.methods["head"]
    both.iteration = WARM
    found = both.train()(make_batch())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_bfloat16_gives_about_the_same_terms():
    for names in (("retinanet", "faster_rcnn"), ("retinanet", "reppoints")):
        distiller, full = distil(*names)
        distiller.eval()
        full = distiller(make_batch())
        with torch.autocast("cpu", torch.bfloat16):
            half = distiller(make_batch())
        for name in full:
            if "akd" in name or "ckd" in name:
                assert half[name].item() == pytest.approx(full[name].item(), rel=0.05), name


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ("retinanet", None, {}, "head needs a teacher"),
        ("retinanet", None, {"akd": False}, "head needs a teacher"),
        ("faster_rcnn", None, {"akd": False, "ckd": False}, "has such a head itself"),
        ("faster_rcnn", "reppoints", {"ckd": True}, "class and box towers, which faster_rcnn_r18"),
        (
            "faster_rcnn",
            "cascade_rcnn",
            {"ckd": True, "ckd_projector": "per_anchor"},
            "which anchor",
        ),
        ("retinanet", "reppoints", {"ckd": True, "ckd_projector": "per_anchor"}, "use 'single'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(student, teacher, options, message):
    models = [name and narrow(f"{name}_r18", seed=i) for i, name in enumerate((student, teacher))]
    with pytest.raises(UserError, match=message) as caught:
        Distiller(*models, {"head": HEAD(**options)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_a_pair_of_one_family_is_sent_to_the_method_that_head_becomes(family):
    student, teacher = narrow(f"{family}_r18"), narrow(f"{family}_r18", seed=1)
    advice = "use the method 'feature' with adapter 'per_level' and transfer_head true"
    with pytest.raises(UserError, match=f"both {family}; .* {advice}"):
        Distiller(student, teacher, {"head": HEAD()})
    fitnet = create_method("feature", adapter="per_level", transfer_head=True)
    Distiller(student, teacher, {"feature": fitnet})
    assert len(fitnet.adapters) == len(student.strides)


def test_other_misfits_are_refused():
    teacher = narrow("faster_rcnn_r18", 5)
    with pytest.raises(UserError, match="has 5 classes, the student retinanet_r18 3"):
        Distiller(narrow("retinanet_r18"), teacher, {"head": HEAD()})
    student = narrow("retinanet_r18")
    student.strides = (16, 32, 64, 128, 256)
    with pytest.raises(UserError, match="an assistant reppoints stands on levels of strides"):
        Distiller(student, narrow("reppoints_r18", seed=1), {"head": HEAD()})
    with pytest.raises(UserError, match="option ckd_projector"):
        create_method("head", ckd_projector="double")
    with pytest.raises(UserError, match="ckd_projector is 'double'; expected 'single' or"):
        HEAD(ckd_projector="double")
    with pytest.raises(UserError, match="did you mean 'proposals'"):
        create_method("head", proposal=10)
    with pytest.raises(UserError, match="option proposals"):
        create_method("head", proposals=0)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_models_whose_heads_cannot_be_copied_are_refused(role):
    models = {"student": narrow("retinanet_r18"), "teacher": narrow("faster_rcnn_r18", seed=1)}
    models[role] = FPNDetector.__new__(FPNDetector)
    torch.nn.Module.__init__(models[role])
    models[role].name, models[role].family = "foreign", "foreign"
    with pytest.raises(UserError, match="which foreign does not allow"):
        HEAD().prepare(**models)
