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
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from transformers_mcmoe.kernels import triton as kernels

name, architecture, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(name, int(architecture) if architecture.isdigit() else architecture, threads)
pointers = {n: "*bf16" for n in ("x", "scale", "bias", "y")} | {n: "*i32" for n in ("q", "index", "order", "experts")}
fixed = {
    "TABLE": True, "PAIR": True, "DOWN": False, "ACTIVATION": "silu", "SLOTS": 2, "BITS": 0, "SCALED": False,
    "BIASED": False,
}
gate_up = fixed | {"WIDTHS": 1 << 2 | 1 << 3}
down = fixed | {"PAIR": False, "DOWN": True, "ACTIVATION": "none", "SLOTS": 1, "SCALED": True, "WIDTHS": 1 << 1}
linear = fixed | {"TABLE": False, "PAIR": False, "ACTIVATION": "none", "BIASED": True, "WIDTHS": 1 << 8, "BITS": 8}
for kernel, tile in ((kernels.few_rows, kernels.FEW_TILE), (kernels.many_rows, kernels.MANY_TILE)):
    signature = {p.name: "constexpr" if p.is_constexpr else pointers.get(p.name, "i32") for p in kernel.params}
    for options in (gate_up, down, linear):
        options = {"COLUMNS": kernels.columns(128)} | options | tile | {"GROUP": 128}
        constants = {p.name: options[p.name] for p in kernel.params if p.is_constexpr}
        compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
        assert len(compiled.asm["cubin" if name == "cuda" else "hsaco"]) > 1000
        assert compiled.metadata.shared <= 48 << 10, compiled.metadata.shared
        print("compiled", kernel.__name__)
"""


def _run(*command: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *command], env=env, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_numbers():
    out = _run("-m", "pytest", "gpu_kernels.py", "-q", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None
    assert int(passed[1]) > 90
    assert "skipped" not in out


@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "cuda 100 32", "hip gfx942 64"])
def test_compiles(target: str, tmp_path: Path):
    out = _run("-c", COMPILE, *target.split(), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert out.count("compiled") == 6
