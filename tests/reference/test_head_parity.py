"""HEAD's numbers, recomputed; tolerances and batch as in `test_parity`.

The published run took 100 proposals per image and sampled them all, so that nothing was random.
"""

import numpy as np
import pytest
import torch

from detdistill import HEAD, Distiller, load_detector
from detdistill.detectors.checkpoints import rename_mmdetection
from tests.reference import synthetic_checkpoint as synthetic
from tests.reference import test_parity as parity

_two_threads = parity._two_threads

OPTIONS = {
    "head_assistant_retinanet_r18": {"akd": False, "ckd": False, "assistant_weights": "teacher"},
    "head_akd_retinanet_r18_faster_rcnn_r50": {"ckd": False},
    "head_retinanet_r18_faster_rcnn_r50": {},
}
TERMS = {
    "loss_cls_rpn": "task/cls",
    "loss_bbox_rpn": "task/box",
    "loss_cls": "head/assistant_cls",
    "loss_bbox": "head/assistant_box",
    "loss_mimic_rcnn_aux": "head/akd_1",
    "loss_mimic_rcnn": "head/akd_2",
    "loss_cross": "head/ckd",
}
ADAPTERS = {
    "akd_first_fc": "link.adapters.akd_1",
    "akd_second_fc": "link.adapters.akd_2",
    "ckd": "link.projector.linear",
}
PUBLISHED_ADAPTERS = dict(
    zip([f"_distiller._adapts.{i}" for i in (0, 1, 5)], ADAPTERS.values(), strict=True)
)
CASES = [
    *((name, case) for name in OPTIONS for case in ("two", "one_empty")),
    ("head_akd_retinanet_r18_faster_rcnn_r50", "two_iteration_500"),
    ("head_retinanet_r18_faster_rcnn_r50", "two_iteration_500"),
]


def tensors(facts):
    return synthetic.state_dict(facts["shapes"], facts["seed"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Student and teacher of a file; both stay for its cases."""
    path, made = tmp_path_factory.mktemp("checkpoints") / "checkpoint.pth", {}

    def build(name):
        if name not in made:
            made.clear()
            facts = parity.manifest(name)
            # The published student calls its RetinaNet head an RPN.
            student = {
                key.replace("rpn_head.", "bbox_head."): value
                for key, value in tensors(facts["student"]).items()
            }
            states = {"retinanet_r18": student, "faster_rcnn_r50": tensors(facts["teacher"])}
            models = []
            for detector, state in states.items():
                torch.save({"meta": {}, "state_dict": state}, path)
                models.append(load_detector(detector, path))
                path.unlink()  # hundreds of megabytes
            made[name] = models
        return made[name]

    return build


def distiller_of(pair, monkeypatch, name):
    student, teacher = pair(name)
    student.zero_grad()
    for model in (student, teacher):
        monkeypatch.setattr(model, "normalize", lambda b: b.images)
    distiller = Distiller(student, teacher, {"head": HEAD(proposals=100, **OPTIONS[name])})
    method = distiller.methods["head"]
    facts = parity.manifest(name)["adapters"]
    for key, value in tensors(facts).items() if facts["shapes"] else ():
        layer, _, kind = key.partition(".")
        method.get_parameter(f"{ADAPTERS[layer]}.{kind}").data.copy_(value)
    return distiller.train()


def own_name(published):
    """The name inside the distiller of a parameter of the published one."""
    layer, _, kind = published.rpartition(".")
    if layer in PUBLISHED_ADAPTERS:
        return f"methods.head.{PUBLISHED_ADAPTERS[layer]}.{kind}"
    if published.startswith("roi_head."):
        name = rename_mmdetection(published)
        return f"methods.head.link.assistant.{name.removeprefix('roi_')}"
    return f"student.{rename_mmdetection(published.replace('rpn_head.', 'bbox_head.'))}"


@pytest.mark.parametrize(("name", "case"), CASES, scope="module")
def test_head_losses_and_gradients(pair, monkeypatch, name, case):
    distiller = distiller_of(pair, monkeypatch, name)
    facts = parity.manifest(name)["cases"][case]
    distiller.iteration = facts["iteration"]
    losses = distiller(parity.batch(case.removesuffix("_iteration_500")))
    sum(losses.values()).backward()
    wanted = {TERMS[k]: v for k, v in facts["losses"].items() if k != "acc"}
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(wanted, rel=1e-4)
    teacher = distiller.teacher  # none is kept for the assistant alone
    assert teacher is None or all(p.grad is None for p in teacher.parameters())
    parameters, norms = dict(distiller.named_parameters()), facts["grad_norm"]
    whole = np.sqrt(sum(norm**2 for norm in norms.values()))
    for published, norm in norms.items():
        # In double: a float32 norm of the 12.8 million entries of one layer is off by a thousandth.
        gradient = parameters.pop(own_name(published)).grad.double()
        allowed = 1e-3 * max(norm, 1e-3 * whole)
        assert gradient.norm().item() == pytest.approx(norm, abs=allowed), published
    assert all(p.grad is None for p in parameters.values()), "a frozen parameter has a gradient"


@pytest.mark.parametrize(
    ("name", "case"), [nc for nc in CASES if "iteration" not in nc[1]], scope="module"
)
def test_proposals_and_where_they_came_from(pair, monkeypatch, name, case):
    distiller, wanted = distiller_of(pair, monkeypatch, name), parity.samples(name)
    with torch.no_grad():
        output = parity.run(distiller.student)
    targets = parity.batch(case).padded_targets()
    found = distiller.student.propose(output, targets.sizes, max_per_image=100)
    sampled = distiller.methods["head"].link.assistant.head(0).sample(found, targets)
    origins = wanted[f"{case}.roi_origin"]
    for image in (0, 1):
        published = wanted[f"{case}.proposals{image}"]
        # By origin: scores that are equal but for rounding may change places.
        own, theirs = (np.lexsort(np.asarray(o).T) for o in (found.origin[image], published[:, 5:]))
        np.testing.assert_array_equal(found.origin[image][own], published[theirs, 5:])
        np.testing.assert_allclose(found.boxes_xyxy[image][own], published[theirs, :4], atol=0.05)
        np.testing.assert_allclose(found.scores[image][own], published[theirs, 4], atol=1e-4)
        rows = origins[origins[:, 0] == image, 1:].astype(int)
        assert_boxes_by_origin(
            (sampled.boxes_xyxy[image].numpy(), sampled.origin[image].numpy()),
            (wanted[f"{case}.rois{image}"], rows),
        )


def assert_boxes_by_origin(found, published):
    """Boxes and origins (R, 4), in any order; the origin of ground truth is its number."""
    boxes, origins = zip(*(_by_origin(*side) for side in (found, published)), strict=True)
    np.testing.assert_array_equal(*origins)
    np.testing.assert_allclose(*boxes, atol=0.05)


def _by_origin(boxes, origin):
    order = np.lexsort(origin.T)
    return boxes[order], origin[order]


@pytest.mark.parametrize("name", OPTIONS, scope="module")
def test_pyramid_of_the_student(pair, name):
    with torch.no_grad():
        output = parity.run(pair(name)[0].eval())
    parity.assert_sampled("fpn", output.pyramid, parity.samples(name))
