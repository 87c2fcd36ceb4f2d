# SPDX-License-Identifier: Apache-2.0
"""Less text for examples under test: reading the whole standard library takes seconds, and so does measuring on all of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"


def take_few_documents(monkeypatch: Any) -> None:
    """Let `python_docs`, which must be importable, read every eighth file of the standard library."""
    python_docs = importlib.import_module("python_docs")
    library = python_docs._library()[::8]
    monkeypatch.setattr(python_docs, "_library", lambda: library)
    python_docs.documents.cache_clear()
