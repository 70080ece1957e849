"""Which maps are compared, and that equal ones are found equal."""

import torch

from detdistill.analysis.pair import places_of
from detdistill.analysis.similarity import Similarity

STAGES = ["backbone", "pyramid", *(f"{b} {d}" for b in ("cls", "box") for d in (1, 2, 3, 4))]


def test_places_are_named_by_stage_and_stride(make_pair, look):
    sample = look(make_pair())
    places = places_of(sample.student, ends=True)
    assert places["backbone", "16"] is sample.student.backbone[16]
    assert places["pyramid", "64"] is sample.student.pyramid[3]
    towers = sample.student.dense.towers
    assert places["box 2", "8"] is towers["box"][0][2]
    assert places["cls end", "32"] is towers["cls"][2][4]
    assert ("cls end", "32") not in places_of(sample.student, ends=False)


def test_equal_models_are_alike(make_pair, look):
    part = Similarity(make_pair(seeds=(6, 6)))
    for index in range(3):
        part.add(look(make_pair(seeds=(6, 6)), index=index))
    found = part.numbers()["stages"]
    assert list(found) == STAGES
    assert list(found["backbone"]) == ["8", "16", "32"]
    for row in found.values():
        assert all(value is None or abs(value - 1) < 1e-6 for value in row.values())
    assert found["pyramid"]["128"] is None  # three positions are too few


def test_unlike_models_are_less_alike(make_pair, look):
    pair = make_pair(tower_channels=32)
    part = Similarity(pair)
    for index in range(4):
        part.add(look(pair, index=index))
    found = part.numbers()["stages"]
    assert list(found) == STAGES
    assert -1 <= found["cls 4"]["8"] < 0.9


def test_towers_of_unlike_depth_meet_at_their_ends_too(make_pair, look):
    pair = make_pair(tower_depth=2)
    part = Similarity(pair)
    part.add(look(pair))
    stages = ["backbone", "pyramid", "cls 1", "cls 2", "cls end", "box 1", "box 2", "box end"]
    assert list(part.numbers()["stages"]) == stages


def test_only_what_both_have_is_compared(make_pair):
    part = Similarity(make_pair())
    torch.manual_seed(0)
    level = torch.randn(1, 4, 5, 6)
    student = {("pyramid", "8"): level, ("box 1", "8"): level}
    part.compare({("pyramid", "8"): 2 * level, ("cls 1", "8"): level}, student, seed=0)
    assert list(part.meters) == [("pyramid", "8")]
    assert part.numbers()["stages"]["pyramid"]["8"] > 0.999


def test_positions_are_drawn_alike_from_both_sides(make_pair):
    """Maps with more positions than are drawn: the same ones must be taken from both."""
    part = Similarity(make_pair())
    torch.manual_seed(0)
    level = torch.randn(1, 4, 30, 30)
    part.compare({("pyramid", "8"): level}, {("pyramid", "8"): -level}, seed=3)
    assert part.numbers()["stages"]["pyramid"]["8"] > 0.999
    assert part.meters["pyramid", "8"].count == 128
