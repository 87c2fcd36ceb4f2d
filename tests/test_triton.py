# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels without a GPU: their numbers under the interpreter, and code for real targets."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton (Linux)"
)

# a process of its own: Triton decides at import whether it interprets
COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from transformers_mcmoe.kernels import triton as kernels
from transformers_mcmoe.kernels.triton import device

targets = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)]
pointers = {n: "*bf16" for n in ("x", "scale", "bias", "y")} | {n: "*i32" for n in ("q", "index", "order", "experts")}
fixed = {
    "TABLE": True, "PAIR": True, "DOWN": False, "ACTIVATION": "silu", "SLOTS": 2, "BITS": 0, "SCALED": False,
    "BIASED": False,
}
gate_up = fixed | {"WIDTHS": 1 << 2 | 1 << 3}
down = fixed | {"PAIR": False, "DOWN": True, "ACTIVATION": "none", "SLOTS": 1, "SCALED": True, "WIDTHS": 1 << 1}
linear = fixed | {"TABLE": False, "PAIR": False, "ACTIVATION": "none", "BIASED": True, "WIDTHS": 1 << 8, "BITS": 8}
both = (device.few_rows, kernels.FEW_TILE), (device.many_rows, kernels.MANY_TILE)
for target, (kernel, tile) in itertools.product(targets, both):
    signature = {p.name: "constexpr" if p.is_constexpr else pointers.get(p.name, "i32") for p in kernel.params}
    for options in (gate_up, down, linear):
        options = {"COLUMNS": kernels.columns(128)} | options | tile | {"GROUP": 128}
        constants = {p.name: options[p.name] for p in kernel.params if p.is_constexpr}
        compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
        assert len(compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]) > 1000
        assert compiled.metadata.shared <= 48 << 10, compiled.metadata.shared
        print("compiled", target, kernel.__name__)
"""


def _run(*command: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *command], env=env, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_numbers():
    out = _run("-m", "pytest", "gpu_kernels.py", "-q", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None
    assert int(passed[1]) > 90
    assert "skipped" not in out


@pytest.mark.slow
def test_compiles(tmp_path: Path):
    """The gate-up, down and plain products of both kernels, for NVIDIA's sm80, sm90 and sm100 and AMD's gfx942."""
    out = _run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert out.count("compiled") == 4 * 2 * 3
