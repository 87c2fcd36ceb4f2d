# SPDX-License-Identifier: Apache-2.0
"""Runs programs that a model wrote, for HumanEval: each in a process of its own with a limit on time and memory.

That is a guard against accidents, no sandbox; lm-eval runs such tasks only when told to. Knows programs, not models.
Source of the estimator: arXiv 2107.03374, equation 1.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence

K = 10
SECONDS = 5
MEMORY = 1 << 30


def build_programs(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, str]]) -> list[list[str]]:
    """A program per sample: the prompt and its continuation."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs, strict=True)]


def pass_at_10(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
    """Probability that one of 10 samples of a problem passes its tests, estimated without bias from all samples.

    Args:
        references: the problem's tests, one text.
        predictions: its programs.
    """
    programs = predictions[0]
    passed = sum(passes(f"{program}\n{references[0]}\n") for program in programs)
    return estimate(len(programs), passed, min(K, len(programs)))


def estimate(samples: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def passes(program: str) -> bool:
    """Whether a program ends without an error in time."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                preexec_fn=_limit,
            )
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a zero byte in the program
            return False
    return done.returncode == 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
