# SPDX-License-Identifier: Apache-2.0
"""What a model hands to its decoder layers: whether two of it are the same, and what batches can share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def _map(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Applies `function` to the leaves of two equal structures of tuples; dicts and lists are leaves, layers may
    write to them."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_map(function, x, y) for x, y in zip(a, b, strict=True))
    return function(a, b)


def close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Whether rows are the same, and values as near as sums with numbers around 1 can be."""
    if not torch.equal(a[0], b[0]):
        return False
    bound = 4 * torch.finfo(a[1].dtype).eps * (1 + float(a[1].abs().max()))
    return float((a[1] - b[1]).abs().max()) <= bound


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def share(given: tuple[tuple, dict], first: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The same arguments, with tensors that equal the first batch's replaced by those: masks and rotary tables."""

    def pick(a: Any, b: Any) -> Any:
        return b if isinstance(a, Tensor) and isinstance(b, Tensor) and same(a, b) else a

    args = _map(pick, given[0], first[0])
    return args, {key: _map(pick, value, first[1].get(key)) for key, value in given[1].items()}
