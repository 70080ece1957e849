"""ImageNet weights from the hub or its cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
from huggingface_hub import constants, get_session

from detdistill.errors import UserError, UserNotice

REACH_SECONDS = 5.0


def pretrained_model(name: str, **options: Any) -> Any:
    """A timm model with its ImageNet weights.

    Args:
        name: a model that timm has weights of.
        **options: for `timm.create_model`.

    Raises:
        UserError: where the weights are neither in the cache nor can be downloaded.
    """
    warnings.warn(f"loading ImageNet weights of {name}", UserNotice, stacklevel=2)
    try:
        with _cache_alone_without_network():
            return timm.create_model(name, pretrained=True, **options)
    except OSError:  # whose text is the hub's advice on its own settings
        raise UserError(
            f"backbone {name!r}: its ImageNet weights are not in the cache and could not be loaded "
            f"from {constants.ENDPOINT}; without the network give the file of {name}'s weights as "
            f"backbone_weights, or use pretrained=False"
        ) from None


@contextmanager
def _cache_alone_without_network() -> Iterator[None]:
    """The hub itself tries for a minute, in silence, also for what is in its cache."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reaches_hub()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reaches_hub() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception:  # of whichever client the hub has
        return False
    return True
