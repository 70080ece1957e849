"""Random draws: their shares, and when nothing is random."""

import torch

from detdistill.parts.samplers import sample_balanced


def masks(*counts):
    """One row per image: so many positives, then so many negatives, then what is neither."""
    rows = [[1] * p + [2] * n + [0] * (120 - p - n) for p, n in counts]
    kinds = torch.tensor(rows)
    return kinds == 1, kinds == 2


def draw(positive, negative, seed=0):
    torch.manual_seed(seed)
    return sample_balanced(positive, negative, count=16, positive_fraction=0.25)


def test_positives_fill_their_share_and_negatives_the_rest():
    positive, negative = masks((10, 100), (2, 100), (0, 100), (10, 5), (0, 0))
    taken = draw(positive, negative)
    assert (taken & positive).sum(1).tolist() == [4, 2, 0, 4, 0]
    assert (taken & negative).sum(1).tolist() == [12, 14, 16, 5, 0]
    assert not (taken & ~positive & ~negative).any()


def test_what_is_no_more_than_wanted_is_taken_whatever_the_seed():
    positive, negative = masks((4, 12))
    for seed in range(5):
        assert torch.equal(draw(positive, negative, seed), positive | negative)


def test_every_one_can_be_drawn_and_a_seed_repeats_the_draw():
    positive, negative = masks((10, 100))
    seen = torch.stack([draw(positive, negative, seed) for seed in range(100)])
    assert torch.equal(seen.any(0), positive | negative)
    assert torch.equal(seen[7], draw(positive, negative, 7))
    # Each positive has a chance of 4/10; 100 draws have a deviation of 5.
    assert (seen.sum(0)[positive] - 40).abs().max() < 25


def test_no_anchors_at_all():
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    assert draw(nothing, nothing).shape == (2, 0)
