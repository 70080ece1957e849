"""Records: what can be read from them in two ways agrees."""

import torch

from detdistill.structures import flatten_maps, rows_of_maps


def test_rows_of_maps_are_those_of_the_flattened_maps():
    maps = [torch.randn(2, 3, 5, h, w) for h, w in ((4, 6), (2, 3), (1, 1))]
    rows = sum(3 * h * w for h, w in ((4, 6), (2, 3), (1, 1)))
    image, row = torch.ones(2, rows, dtype=torch.bool).nonzero(as_tuple=True)
    order = torch.randperm(len(row))
    image, row = image[order], row[order]
    found = rows_of_maps(maps, image, row)
    assert torch.equal(found, flatten_maps(maps)[image, row])


def test_no_rows_keep_the_maps_gradient():
    level = torch.randn(2, 1, 3, 2, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    found = rows_of_maps([level], none, none)
    found.sum().backward()
    assert found.shape == (0, 3) and not level.grad.any()
