# SPDX-License-Identifier: Apache-2.0
"""Meter: what a callback is told, in which order, and silence without one."""

from __future__ import annotations

import logging
import sys

import pytest
from transformers.utils import logging as transformers_logging

from transformers_mcmoe import progress
from transformers_mcmoe.progress import Meter, Progress, anonymous_memory


class Clock:
    """Stands for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress.time, "monotonic", fake)
    return fake


def test_steps_in_order(clock: Clock):
    steps: list[Progress] = []
    meter = Meter(steps.append)
    clock.now += 50  # before a stage begins: not counted
    meter.start("allocate", 3)
    for layer in range(3):
        for expert in range(2):
            clock.now += 1
            meter.expert_done(expert, 2)
        clock.now += 2
        meter.layer_done()
        assert steps[-1].layer == layer + 1
    clock.now += 5
    meter.start("quantize", 2)
    clock.now += 10
    meter.layer_done()
    meter.close()
    seen = [(s.stage, s.layer, s.layers, s.expert, s.experts, s.seconds) for s in steps]
    assert seen == [
        ("allocate", 0, 3, 0, 0, 0.0),
        ("allocate", 0, 3, 1, 2, 1.0),
        ("allocate", 0, 3, 2, 2, 2.0),
        ("allocate", 1, 3, 0, 0, 4.0),
        ("allocate", 1, 3, 1, 2, 5.0),
        ("allocate", 1, 3, 2, 2, 6.0),
        ("allocate", 2, 3, 0, 0, 8.0),
        ("allocate", 2, 3, 1, 2, 9.0),
        ("allocate", 2, 3, 2, 2, 10.0),
        ("allocate", 3, 3, 0, 0, 12.0),
        ("quantize", 0, 2, 0, 0, 0.0),
        ("quantize", 1, 2, 0, 0, 10.0),
    ]


def test_eta(clock: Clock):
    steps: list[Progress] = []
    meter = Meter(steps.append)
    meter.start("quantize", 4)
    clock.now += 3
    meter.expert_done(0, 2)
    assert [step.eta for step in steps] == [None, None]  # unknown before the first layer is done
    clock.now += 3
    meter.layer_done()
    assert steps[-1].eta == pytest.approx(18)  # 6 s a layer, 3 layers to go
    clock.now += 3
    meter.expert_done(0, 2)
    assert steps[-1].eta == pytest.approx(9 / 1.5 * 2.5)
    for _ in range(3):
        clock.now += 6
        meter.layer_done()
    assert steps[-1].eta == 0
    meter.start("allocate", 4)
    assert steps[-1].eta is None


def test_errors_of_the_callback_reach_the_caller():
    """How a user stops a compression."""

    def stop(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Meter(stop).start("quantize", 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_memory():
    before = anonymous_memory()
    assert before > 10 << 20
    block = bytearray(b"x") * (64 << 20)
    assert anonymous_memory() - before > 48 << 20
    steps: list[Progress] = []
    Meter(steps.append).start("quantize", 1)
    assert steps[0].memory > len(block)


def _run(meter: Meter) -> None:
    meter.start("allocate", 2)
    meter.expert_done(0, 2)
    meter.layer_done()
    meter.layer_done()
    meter.start("quantize", 1)
    meter.layer_done()
    meter.close()
    meter.close()


def test_without_callback_and_bars(capsys):
    transformers_logging.disable_progress_bar()
    _run(Meter(None))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_with_a_bar(capsys):
    transformers_logging.enable_progress_bar()
    try:
        _run(Meter(None))
    finally:
        transformers_logging.disable_progress_bar()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Allocate" in captured.err
    assert "Quantize" in captured.err
    assert "memory" in captured.err


def test_a_callback_replaces_the_bar(capsys):
    transformers_logging.enable_progress_bar()
    try:
        _run(Meter(lambda step: None))
    finally:
        transformers_logging.disable_progress_bar()
    assert capsys.readouterr().err == ""


def test_layers_are_logged(caplog):
    with caplog.at_level(logging.INFO, "transformers_mcmoe.progress"):
        _run(Meter(None))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "allocate: layer 1 of 2",
        "allocate: layer 2 of 2",
        "quantize: layer 1 of 1",
    ]
