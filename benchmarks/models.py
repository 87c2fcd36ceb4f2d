# SPDX-License-Identifier: Apache-2.0
"""Write the table of docs/models.md: runs the tests of every family, and keeps a row of each that passed.

python benchmarks/models.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers
from pages import replace_part

TESTS = Path(__file__).parent.parent / "tests" / "test_end_to_end.py"


def main() -> None:
    """Run the tests, write the table."""
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "models.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "", f"{TESTS}::test_family"]
        subprocess.run(command, env=os.environ | {"MCMOE_MODELS": str(rows_file)}, check=True)
        rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    lines = [
        f"{len(rows)} families passed with transformers {transformers.__version__}.",
        "",
        "| `model_type` | class | experts | one operator a layer | expert pruning |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["family"]):
        cells = [
            f"`{row['family']}`",
            row["model"],
            ", ".join(row["experts"]),
            _yes(row["one_operator"]),
            _yes(row["prunable"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    replace_part("models.md", "models", lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
