# SPDX-License-Identifier: Apache-2.0
"""How far a compression or a training is, and how that is shown: a callback, or a bar and the log.

Knows steps and seconds, not what is done in them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from transformers_mcmoe.memory import anonymous_memory

logger = logging.getLogger(__name__)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Progress:
    """A step of a compression.

    Attributes:
        stage: "allocate" or "quantize", or of training pruning routers "measure", "measure held-out" or "train".
        layer: layers done in this stage; batches or steps while training.
        layers: how many there are.
        expert: experts of the current layer done.
        experts: experts of the current layer, 0 when it has none or is finished.
        seconds: time since the stage began.
        eta: estimated seconds until its end, None before the first layer is done.
        memory: anonymous resident memory of the process in bytes, 0 where the system does not tell.
    """

    stage: str
    layer: int
    layers: int
    expert: int
    experts: int
    seconds: float
    eta: float | None
    memory: int


class Meter:
    """Counts steps and reports each of them.

    Args:
        callback: called with a `Progress`; None shows transformers' progress bar and logs every layer.
    """

    def __init__(self, callback: Callable[[Progress], None] | None) -> None:
        self._callback = callback
        # asked here, where the user's choice to show bars or not still holds
        self._hidden = callback is not None or not transformers_logging.is_progress_bar_enabled()
        self._bar: Any = None
        self._stage, self._unit, self._layers, self._layer, self._started = "", "layer", 0, 0, time.monotonic()
        self._known = 0  # layers that an earlier run has finished

    def start(self, stage: str, layers: int, unit: str = "layer") -> None:
        """Begin a stage of so many layers, or other units."""
        self._stage, self._layers, self._layer, self._started = stage, layers, 0, time.monotonic()
        self._unit, self._known = unit, 0
        self.close()
        if not self._hidden:
            self._bar = tqdm(total=layers, unit=unit, desc=stage.capitalize())
        self._report(0, 0)

    def known(self, layers: int) -> None:
        """So many layers were finished by an earlier run."""
        self._layer += layers
        self._known += layers
        if self._bar is not None:
            self._bar.update(layers)

    def expert_done(self, expert: int, experts: int) -> None:
        """One expert of the current layer is done."""
        self._report(expert + 1, experts)

    def layer_done(self) -> None:
        """The current layer, or other unit, is done."""
        self._layer += 1
        step = self._report(0, 0)
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"memory {step.memory / 1e9:.2f} GB")
        done = (self._stage, self._unit, self._layer, self._layers, step.memory / 1e9)
        logger.info("%s: %s %d of %d, %.2f GB.", *done)

    def close(self) -> None:
        """Put the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _report(self, expert: int, experts: int) -> Progress:
        seconds = time.monotonic() - self._started
        done = self._layer + (expert / experts if experts else 0)
        eta = seconds / (done - self._known) * (self._layers - done) if self._layer > self._known else None
        step = Progress(self._stage, self._layer, self._layers, expert, experts, seconds, eta, anonymous_memory())
        if self._callback is not None:
            self._callback(step)
        return step
