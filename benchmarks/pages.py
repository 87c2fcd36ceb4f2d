# SPDX-License-Identifier: Apache-2.0
"""Puts tables that benchmarks write into pages of docs/, between two comments that name the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def replace_part(page: str, benchmark: str, lines: Sequence[str]) -> None:
    """Replace what stands on a page between `<!-- benchmark: begin -->` and `<!-- benchmark: end -->`."""
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {benchmark}: begin -->\n", f"<!-- {benchmark}: end -->\n"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    path.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")
