"""Reproducible stand-ins for published detector checkpoints.

`state_dict(shapes, seed)` fills every tensor of a checkpoint from its name, its shape and a seed,
with NumPy's frozen legacy generator, so that the result is the same on every machine. `images()`
and `targets()` give the batch that the reference values in this folder were computed on.
"""

import hashlib

import numpy as np
import torch

CLASSIFIERS = ("retina_cls", "gfl_cls", "atss_cls", "conv_cls", "rpn_cls", "fc_cls")
DELTAS = ("retina_reg", "atss_reg", "rpn_reg", "fc_reg")
QUALITY = ("atss_centerness", "conv_centerness")
SIZES_HW = ((128, 160), (90, 120))  # before padding


def _fill(name, shape, seed):
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    rng = np.random.RandomState(int.from_bytes(digest[:4], "little"))
    module, _, kind = name.rpartition(".")
    layer = module.rpartition(".")[2]

    def normal(std, mean=0.0):
        return rng.standard_normal(shape) * std + mean

    def uniform(low, high):
        return rng.random_sample(shape) * (high - low) + low

    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "running_var":
        return uniform(0.5, 1.5)
    if kind == "project":  # GFL's fixed bin centres 0..reg_max
        return np.arange(shape[0], dtype=np.float64)
    if kind == "scale":
        return uniform(0.8, 1.2)
    if kind == "weight" and len(shape) == 1:  # BatchNorm, GroupNorm
        return uniform(0.3, 0.9)
    if kind == "weight":
        fan_in = int(np.prod(shape[1:]))
        if layer in CLASSIFIERS or layer in QUALITY:
            return normal(0.7 / fan_in**0.5)
        if layer in DELTAS:
            return normal(0.25 / fan_in**0.5)
        if layer == "conv_reg":
            return normal(0.3 / fan_in**0.5)
        return normal(1.0 / fan_in**0.5 if layer == "gfl_reg" else (2.0 / fan_in) ** 0.5)
    if kind == "bias" and layer in CLASSIFIERS:
        return normal(0.1, -1.0)
    if kind == "bias" and layer == "conv_reg":
        return normal(0.1, 2.7)
    return normal(0.1 if kind in ("bias", "running_mean") else 0.02)


def state_dict(shapes, seed):
    """Checkpoint tensors by name: float32, except `num_batches_tracked` (int64)."""
    state = {}
    for name, shape in shapes.items():
        values = np.asarray(_fill(name, tuple(shape), seed))
        if values.dtype != np.int64:
            values = values.astype(np.float32)
        state[name] = torch.from_numpy(values)
    return state


def images(seed=7):
    """(2, 3, 128, 160) float32, already normalised; image 1 is 90 x 120, zero-padded."""
    rng = np.random.RandomState(seed)
    fine, coarse = rng.standard_normal((2, 3, 128, 160)) * 0.5, rng.standard_normal((2, 3, 8, 10))
    batch = fine + coarse.repeat(16, axis=2).repeat(16, axis=3)
    batch[1, :, 90:, :] = 0
    batch[1, :, :, 120:] = 0
    return torch.from_numpy(batch.astype(np.float32))


def targets(case="two"):
    """Boxes xyxy and labels per image; cases two, one_empty, all_empty.

    Every box is larger than the smallest anchor (32 px): a smaller one lies inside several equal
    anchors, whose IoUs tie exactly.
    """
    boxes = [
        [[12.3, 20.1, 60.7, 88.4], [70.2, 10.5, 150.9, 120.3], [97.1, 57.2, 144.8, 106.6]],
        [
            [5.5, 6.1, 45.2, 50.3],
            [40.4, 30.7, 110.2, 85.9],
            [70.3, 5.2, 115.6, 47.1],
            [8.2, 40.8, 49.4, 83.7],
        ],
    ]
    labels = [[0, 3, 2], [4, 1, 1, 2]]
    keep = {"two": (3, 4), "one_empty": (3, 0), "all_empty": (0, 0)}[case]
    return [
        {"boxes": torch.tensor(b[:n]).reshape(-1, 4), "labels": torch.tensor(k[:n]).long()}
        for b, k, n in zip(boxes, labels, keep, strict=True)
    ]


def sample(tensor, count=1024):
    """Evenly spaced entries of the flattened tensor: what the files keep of a large output."""
    flat = tensor.detach().double().flatten()
    return flat[:: max(1, flat.numel() // count)][:count].numpy()
