# SPDX-License-Identifier: Apache-2.0
"""Imports go downwards only, and every third-party API has one address."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_mcmoe

ROOT = Path(transformers_mcmoe.__file__).parent
# lower layers never import higher ones
LAYERS = [
    {
        "version",
        "workdir",
        "memory",
        "threads",
        "progress",
        "kernels",
        "quantization",
        "allocation",
        "config",
        "plan",
        "distributed",
    },
    {"models", "calibration", "nn", "routing", "structure", "tuning"},
    {"pipeline"},
    {"quantizer", "replacement", "pruning", "integrations", "evaluation", "report", "cli"},
]
ADDRESSES = {
    "scipy": {"allocation"},
    "peft": {"integrations"},
    "triton": {"kernels"},
    "typer": {"cli"},
    "jinja2": {"integrations", "report"},
    "lm_eval": {"evaluation"},
    "hqq": {"integrations"},
    "matplotlib": {"integrations"},
}


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _rank(part: str) -> int:
    return next(rank for rank, names in enumerate(LAYERS) if part in names)


FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.name not in ("__main__.py",) and file.parent != ROOT]
FILES += [file for file in sorted(ROOT.glob("*.py")) if file.name not in ("__main__.py", "__init__.py")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downwards(file):
    own = file.relative_to(ROOT).with_suffix("").parts[0]
    for name in _imports(file):
        parts = name.split(".")
        if parts[0] == "transformers_mcmoe" and len(parts) > 1:
            assert _rank(parts[1]) <= _rank(own), f"{own} imports {name}"
        if parts[0] in ADDRESSES:
            assert own in ADDRESSES[parts[0]], f"{parts[0]} is imported in {own}"


def test_public_names():
    assert sorted(transformers_mcmoe.__all__) == [
        "MCMoEConfig",
        "MCMoEHfQuantizer",
        "ODPConfig",
        "OTPConfig",
        "PackedExperts",
        "PackedLinear",
        "Plan",
        "PruneConfig",
        "RankConfig",
        "__version__",
        "backend_info",
        "compression_report",
        "expert_pruning_stats",
        "set_expert_pruning",
        "train_expert_pruning",
        "unpack",
    ]
    assert all(hasattr(transformers_mcmoe, name) for name in transformers_mcmoe.__all__)


@pytest.mark.slow
def test_importing_again_is_harmless():
    program = "import importlib, transformers_mcmoe as m; [importlib.reload(x) for x in (m.config, m.quantizer, m)]"
    subprocess.run([sys.executable, "-c", program], check=True)
