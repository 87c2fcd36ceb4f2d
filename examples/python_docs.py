# SPDX-License-Identifier: Apache-2.0
"""The demo model's corpus: documentation that ships with every Python, split into a training and a held-out part.

One document per docstring (module, class, function) of the standard library and per topic of `help()`; nothing is
downloaded. `examples/demo-mixtral` was trained on 3,905 documents of CPython 3.11.7; 205 more are held out. The standard
library's code and windows of tokens are here, too.
"""

import ast
import functools
import hashlib
import inspect
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

MIN_CHARACTERS = 81
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "tests"}  # and test*/
# first 8 hex digits of the SHA-256 of each held-out document, drawn once: another draw would hold out what the model saw
HELD_OUT = Path(__file__).parent / "demo-mixtral" / "held_out.txt"


@functools.cache
def documents() -> list[str]:
    """The distinct documents of the running interpreter, sorted: the same on every machine of one version."""
    docstrings = (text for path in _library() for text in _docstrings(path))
    return sorted({*topics.values(), *(text for text in docstrings if len(text) >= MIN_CHARACTERS)})


def _library() -> list[Path]:
    """The standard library's source files, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    parts = {path: path.relative_to(root).parts for path in sorted(root.rglob("*.py"))}
    return [path for path, names in parts.items() if not SKIPPED_FOLDERS & set(names) and "test" not in names[0]]


def split(docs: list[str]) -> tuple[list[str], list[str]]:
    """Split `documents()` into (train, held_out), both shuffled with a fixed seed.

    On every Python version the held-out part is text that the demo model was not trained on; documents that are new go to the
    training part.
    """
    docs, digests = list(docs), set(HELD_OUT.read_text(encoding="utf-8").split())
    random.Random(0).shuffle(docs)
    held = {text for text in docs if hashlib.sha256(text.encode()).hexdigest()[:8] in digests}
    return [text for text in docs if text not in held], [text for text in docs if text in held]


def _docstrings(path: Path) -> Iterator[str]:
    """The cleaned docstrings of one source file; none if this Python cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # newer or broken syntax; another encoding
        return
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node, clean=False)) is not None:
            yield inspect.cleandoc(text)


def source_files(characters: int = 20_000) -> tuple[list[str], list[str]]:
    """The standard library's code, the beginning of each file; every tenth file is held out."""
    large = (path for path in _library() if path.stat().st_size > 2000)
    texts = [path.read_text(encoding="utf-8", errors="ignore")[:characters] for path in large]
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def windows(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    """All whole windows of the joined texts, each text followed by the end token, [N, length]."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
