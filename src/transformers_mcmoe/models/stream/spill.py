# SPDX-License-Identifier: Apache-2.0
"""Arguments of layers that are kept on disk: with images every sequence has masks and positions of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

# bytes from which on a tensor is kept on disk
LEAST = 1 << 16
ALIGNMENT = 64


class Spill:
    """A file that tensors are put into; what is returned in their place is mapped from it."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        path.unlink(missing_ok=True)

    def kept(self, value: Any) -> Any:
        """The same structure of lists, tuples and dicts, with large tensors in the file, each once."""
        return _mapped(value, self._keep, {})

    def _keep(self, x: Tensor) -> Tensor:
        if x.nbytes < LEAST:
            return x
        data = x.detach().to("cpu").contiguous()
        with self._path.open("ab") as file:
            file.write(data.view(torch.uint8).flatten().numpy().data)
            file.write(bytes(-data.nbytes % ALIGNMENT))
        start, self._end = self._end, self._end + data.nbytes + -data.nbytes % ALIGNMENT
        # written to by nobody but a layer that writes to its arguments: that stays its own
        mapped = numpy.memmap(self._path, numpy.uint8, "c", start, (data.nbytes,))
        return torch.from_numpy(mapped).view(data.dtype).view(data.shape)


def on_device(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on a device."""
    return _mapped(value, lambda x: x.to(device), {})


def _mapped(value: Any, change: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = change(value)
        return known[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_mapped(x, change, known) for x in value)
    if type(value) is dict:
        return {key: _mapped(x, change, known) for key, x in value.items()}
    return value
