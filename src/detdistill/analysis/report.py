"""One page about a pair, and its numbers as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from detdistill.analysis.run import Findings
from detdistill.analysis.sections import (
    conflict_section,
    imitation_section,
    left_out,
    ranks_section,
    similarity_section,
)
from detdistill.analysis.words import (
    Numbers,
    caveats,
    main_level,
    mean_similarity,
    percent,
    plain,
    summarise,
)
from detdistill.data import DetectionDataset
from detdistill.drawing.page import cards, facts_list, page, verdict, warnings
from detdistill.engine.checkpoint import write_text


def write_analysis(
    out: Path, findings: Findings, dataset: DetectionDataset, facts: Mapping[str, str]
) -> list[str]:
    """Writes `analysis.json` and `report.html` into a folder.

    Args:
        out: an existing folder.
        findings: what was measured.
        dataset: of which the images are named.
        facts: what else the page and the file say of the analysis, by name.

    Returns:
        What was found, in sentences.
    """
    numbers = findings.numbers()
    sentences = summarise(numbers)
    template = Template((files("detdistill.analysis") / "report.html").read_text(encoding="utf-8"))
    title = f"What {findings.pair.student.name} and its teacher disagree on"
    body = template.substitute(
        title=html.escape(title),
        verdict=verdict(sentences),
        warnings=warnings(caveats(numbers)),
        cards=cards(_cards(numbers)),
        facts=facts_list(facts),
        **_sections(findings, numbers, dataset),
    )
    write_text(
        out / "analysis.json", json.dumps({"about": dict(facts), **numbers}, indent=1) + "\n"
    )
    write_text(out / "report.html", page(title, body))
    return sentences


def _sections(findings: Findings, numbers: Numbers, dataset: DetectionDataset) -> dict[str, str]:
    found = {name: left_out(reason) for name, reason in findings.left_out.items()}
    found["similarity"] = found.pop("assistant", "") + similarity_section(numbers["similarity"])
    if findings.conflict is not None:
        found["conflict"] = conflict_section(findings.conflict, numbers["conflict"], dataset)
    if findings.ranks is not None:
        found["ranks"] = ranks_section(findings.ranks, numbers["ranks"], dataset)
    if findings.imitation is not None:
        found["imitation"] = imitation_section(findings.imitation, numbers["imitation"], dataset)
    return found


def _cards(numbers: Numbers) -> list[tuple[str, str, str]]:
    conflict, ranks, imitation = (numbers[name] for name in ("conflict", "ranks", "imitation"))
    entries = []
    if conflict is not None:
        share = percent(conflict["positives"]["share"])
        entries.append(("target conflict", share, "of the positives"))
    if ranks is not None:
        share = percent(ranks["all"]["best_differs_share"])
        entries.append(("best candidate differs", share, "of the objects"))
    if imitation is not None:
        level = main_level(imitation)
        unit = f"rank correlation, stride {level['stride']}"
        entries.append(("feature and prediction gaps", plain(level["spearman"]), unit))
    row = numbers["similarity"]["stages"].get("pyramid", {})
    entries.append(("similarity of the pyramids", plain(mean_similarity(row)), "mean CKA"))
    return entries
