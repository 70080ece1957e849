"""What the measured step says: dead terms, gradients out of proportion, weights to try, cost."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

from detdistill.distill import Method
from detdistill.doctor.finding import Finding, counted, few
from detdistill.doctor.step import Cost, Gradients
from detdistill.study.table import aligned, format_time

TOO_STRONG, TOO_WEAK = 100.0, 0.001
"""A method's gradient into backbone and pyramid, in units of the task's, that is worth a word.

Between them lie the published weights: measured on a small student, from its 10th step to the end
of its training, were 0.003 (rm) to 60 (pkd).
"""

WEIGHT = "weight"


def ratio(own: float, task: float) -> float:
    """Of two norms; NaN where the second is 0 or one is not finite."""
    return own / task if task > 0 and math.isfinite(own) and math.isfinite(task) else math.nan


def check_plain(
    found: Sequence[Gradients], cost: Cost, total_steps: int, first_steps: int
) -> list[Finding]:
    """The student alone, after some first steps: its own terms and what it costs.

    Of several batches the first speaks; a term that is 0 is 0 in all of them.
    """
    terms, task = found[0].task_terms, found[0].task
    values = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
    norms = f"backbone {task.backbone:.2g}, pyramid {task.fpn:.2g}, head {task.head:.2g}"
    text = (
        f"the student alone, after {first_steps} steps: {values}; gradient: {norms}; "
        f"{describe_cost(cost, None, total_steps)}"
    )
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad or not cost.finite or not math.isfinite(task.total):
        shown = few(bad) if bad else "a loss or its gradient"
        advice = (
            "look at the boxes of the data section; on fp16 try --set precision=bf16; else a "
            "lower lr"
        )
        return [Finding("problem", f"the student alone: {shown} is not finite", advice)]
    dead = [name for name in terms if all(batch.task_terms[name] == 0 for batch in found)]
    if dead:
        text = f"the student alone: exactly 0 on {counted(len(found), 'batch')}: {few(dead)}"
        advice = "look above whether the objects get positive anchors or points"
        return [Finding("problem", text, advice)]
    if task.body == 0:
        advice = "check frozen_stages and the sizes of the boxes: nothing of it would learn"
        return [Finding("problem", f"{text}; nothing reaches backbone or pyramid", advice)]
    return [Finding("ok", text)]


def describe_cost(cost: Cost, plain: Cost | None, total_steps: int) -> str:
    """Time of a step, what that is to the student alone, and the whole run; memory on a GPU."""
    text = f"{cost.seconds:.2g} s a step"
    if plain is not None:
        text += f" ({cost.seconds / plain.seconds:.1f} times the student alone)"
    text += f", about {format_time(cost.seconds * total_steps)} for {total_steps} steps"
    if cost.peak_bytes is not None:
        text += f", {cost.peak_bytes / 2**30:.1f} GiB of GPU memory"
    return text


def check_arm(
    name: str,
    methods: Mapping[str, Method],
    found: Sequence[Gradients],
    cost: Cost,
    plain: Cost,
    total_steps: int,
    *,
    trained: bool,
) -> list[Finding]:
    """An arm's step.

    Args:
        name: of the arm.
        methods: prepared.
        found: of one or more batches; the first speaks, a term that is 0 is 0 in all of them.
        cost: of the arm.
        plain: of the student alone.
        total_steps: of the run.
        trained: whether the teacher is; of one that is not, only what is not finite is told.
    """
    first = found[0]
    text = f"{name}: {describe_cost(cost, plain, total_steps)}"
    non_finite = _not_finite(name, first, cost)
    if non_finite:
        return [Finding("ok", text, details=term_table(first)), *non_finite]
    findings = []
    for method in methods:
        strength = ratio(first.methods[method].body, first.task.body)
        text += f"; gradient of {method} {strength:.2g} times the task's"
        if trained or not methods[method].needs_teacher:
            findings += _check_zeros(method, found)
            findings += _check_strength(method, methods[method], first)
    return [Finding("ok", text, details=term_table(first)), *findings]


def term_table(found: Gradients) -> tuple[str, ...]:
    """Each term raw and weighted, and its gradient by part in units of the task's."""
    rows = [["term", "raw", "weighted", "gradient: backbone", "pyramid", "head"]]
    for name, term in found.terms.items():
        row = [name, f"{term.raw:.3g}", f"{term.weighted:.3g}"]
        if name in found.resting:
            row[1:3] = ["resting", "0"]
        own, task = term.gradient, found.task
        shares = [ratio(getattr(own, p), getattr(task, p)) for p in ("backbone", "fpn", "head")]
        rows.append([*row, *("-" if math.isnan(share) else f"{share:.2g}" for share in shares)])
    return tuple(aligned(rows).splitlines())


def _not_finite(name: str, found: Gradients, cost: Cost) -> list[Finding]:
    bad = [
        term
        for term, value in found.terms.items()
        if not (math.isfinite(value.weighted) and math.isfinite(value.gradient.total))
    ]
    if bad:
        text = f"{few(bad)}: the term or its gradient is not finite on a real batch"
        advice = "leave the method out, and check the teacher's weights with detdistill eval"
        return [Finding("problem", text, advice)]
    if not cost.finite:
        text = f"{name}: a term was not finite any more after a few steps on the same batch"
        return [Finding("problem", text, "a lower lr or weight; on fp16 --set precision=bf16")]
    return []


def _check_zeros(method: str, found: Sequence[Gradients]) -> list[Finding]:
    own = [term for term in found[0].terms if term.startswith(f"{method}/")]
    own = [term for term in own if term not in found[0].resting]
    dead = [term for term in own if all(g.terms[term].raw == 0 for g in found)]
    if not dead:
        return []
    text = f"{few(dead)}: exactly 0 on {counted(len(found), 'batch')}, so it teaches nothing"
    advice = (
        "check the teacher's AP above, and that the boxes get positive anchors; leave a term out "
        "that cannot act"
    )
    return [Finding("problem" if dead == own else "warning", text, advice)]


def _check_strength(name: str, method: Method, found: Gradients) -> list[Finding]:
    strength = ratio(found.methods[name].body, found.task.body)
    own = {term: value for term, value in found.terms.items() if term.startswith(f"{name}/")}
    if math.isnan(strength) or TOO_WEAK <= strength <= TOO_STRONG:
        return []
    if strength == 0:
        if not any(value.weighted for value in own.values()):
            return []  # dead or resting, which is told elsewhere
        text = f"{name}: its terms are not 0, but none of their gradient reaches the student's body"
        return [Finding("problem", text, "check frozen_stages and the method's settings")]
    strongest = max(own, key=lambda term: own[term].gradient.body)
    how = "drowns the labels" if strength > TOO_STRONG else "is next to nothing beside the labels"
    text = (
        f"{name}: its gradient into backbone and pyramid is {strength:.2g} times the task's, "
        f"which {how}; most of it comes from {strongest}"
    )
    term = strongest.removeprefix(f"{name}/")
    return [Finding("warning", text, suggest_weight(name, method, term, strength))]


def suggest_weight(name: str, method: Method, term: str, strength: float) -> str:
    """The option to change, and the value at which the term would weigh about as the task."""
    options, own = _weight_options(method), weight_option(method, term)
    if term in getattr(method, "truth_terms", ()) or not options:
        return f"{term} has no weight to change; compare this method with another one"
    value = float(f"{method.weights[term] / strength:.1g}")
    if own is None:
        where = f"one of --set methods.{name}.{' or '.join(options)} (docs/methods.md says which)"
        return f"try {term} with a weight of {value:g}, by {where}"
    return (
        f"try --set methods.{name}.{own}={value:g}, at which it would weigh about as the task, "
        f"beside the published weight: detdistill compare tells which is better"
    )


def weight_option(method: Method, term: str) -> str | None:
    """The keyword that sets a term's weight: `cls_weight` of `cls`, `akd_weight` of `akd_1`."""
    options = _weight_options(method)
    words = [f"{word}_{WEIGHT}" for word in [term, *term.split("_")]]
    return next((word for word in [*words, WEIGHT] if word in options), None)


def _weight_options(method: Method) -> list[str]:
    keywords = inspect.signature(type(method).__init__).parameters
    return [key for key in keywords if key == WEIGHT or key.endswith(f"_{WEIGHT}")]
