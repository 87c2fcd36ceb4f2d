# SPDX-License-Identifier: Apache-2.0
"""The demo model's corpus: documentation that ships with every Python, split into a training and a held-out part.

One document per docstring (module, class, function) of the standard library and per topic of `help()`; nothing is
downloaded. `examples/demo-mixtral` was trained on CPython 3.11.7, on `split(documents())[0]`: 3,905 documents, its
tokenizer included, with 205 held out.

This module knows nothing of tokenizers or models.
"""

import ast
import hashlib
import inspect
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

MIN_CHARACTERS = 81
# Beside these, everything whose first path component has "test" in it: test/, unittest/, doctest.py.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "idlelib", "tests"}
# The first 8 hex digits of the SHA-256 of each held-out document. They were drawn once, on CPython 3.11.7: the first
# twentieth after `random.Random(0).shuffle(docs)`. A new draw on another Python would hold out what the model saw.
HELD_OUT = """
    00cea61e 02dcd9ba 0703dc5f 0874dcf1 0b03c1aa 0ba51b06 0c2daabb 0f516d7a 0f6fdc81 12045b5a 122a9e65 14a8e7fc
    16acdacd 17b9443a 19311b53 1b9f0887 1f9f9851 207913cb 207b24c6 217732fb 222f69c4 2323d183 24610ba9 24672f93
    27439121 27669038 2894ba75 2c11ce7c 2cba7199 2cf2f005 2d552ea6 2dd4a520 2ec02663 33a06611 34c66c80 3841b59a
    39a66ad7 3a1e0d6b 3a8016d0 3b37d9fc 3c04ff46 3c67ed15 3dfd759d 3f14bf4a 405cbfa7 42274084 443d0bd6 449c01ea
    44eeb9c3 45d85de0 48e957c8 4cc25127 4dbaa98f 5037fb72 50f574cd 5172eb54 518ddc5f 528358bf 52c4052c 537a20e3
    54b25ceb 5782c283 591602d2 59850d90 5b9325ce 5bf54715 5c045376 5d6583ce 5f85c0d0 607369bc 61817aaa 63167860
    6591b0dd 6681fd7c 66c8c043 67c86c8d 6901fad1 69b8d8ba 69db8651 6b10839b 6cc8e490 6ccce5b5 6f2bf90e 6f594c50
    71d66b52 7306f198 73196df3 736af8d1 74b3050e 75ab57f3 75d44049 75e2b453 7639443f 76d9b245 77ad30f4 77f4aaef
    7a089db9 7b762d87 7b9753dc 7e265002 7e6185ca 7f164843 7f8e7bca 808b4d7a 810a5e1e 83de400c 846dfd6e 85984abc
    860b1271 86f2e9a6 88d44a79 8ea408ef 8fcbf72b 901209a6 9093c758 91a91b5c 93c7454e 94bf7c8f 94f3c789 950c20be
    954a9ce0 9793b96c 97a6160d 9803f0d7 9828041b 9953437d 9aa49f1c 9cd51e53 9da27a4a 9f505336 a006c29e a0d854e4
    a0e68b30 a16b6eea a30c9e95 a42c3c0b a453bf23 a6d7dac9 a7452936 a7b00646 a9449c73 ac2dc94e acf8184e b11a2304
    b12a5b9b b2d646ca b430c794 b44aec8f b51ad355 b7408b0a b7cc6a24 b9efc255 bb4a5e6b bd9a3fa9 be95877b beb9b374
    c0e1a3f2 c107aac7 c276f4d0 c385e44f c57c4b22 c98a7bf1 cc5446f4 ce4140fc d0acc6d5 d1eca83b d34264b3 d44aa35f
    d44d7eeb d5e4568a d6161c23 d9d70142 dc2920ee deb7b906 df239d5f e07ff1a6 e150f7c4 e1806527 e35af3f0 e3c4622a
    e4cfc9f8 e58a7de3 e5d1a672 e99ac5c6 e9b59fcf ed2026aa ed634f47 f157c15d f2263464 f22d301d f43d75e8 f5123ed4
    f60cc5b4 f72bd13a f7b12590 f7b5091a f827089a f9613977 f99f2790 fb394bb5 fc3cbb0c fcad552c fce051bd ff423e2f
    ff4c82eb
"""


def documents() -> list[str]:
    """The distinct documents of the running interpreter, sorted: the same on every machine of one version."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = set(topics.values())
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS & set(parts) and "test" not in parts[0]:
            texts.update(text for text in _docstrings(path) if len(text) >= MIN_CHARACTERS)
    return sorted(texts)


def split(docs: list[str]) -> tuple[list[str], list[str]]:
    """Split `documents()` into (train, held_out), both shuffled with a fixed seed.

    Which documents are held out depends on their text alone: on every Python version the held-out part is text that
    the demo model was not trained on. Documents that CPython 3.11.7 does not have go to the training part.
    """
    docs, digests = list(docs), set(HELD_OUT.split())
    random.Random(0).shuffle(docs)
    is_held_out = [_digest(text) in digests for text in docs]
    train = [text for text, held in zip(docs, is_held_out, strict=True) if not held]
    held_out = [text for text, held in zip(docs, is_held_out, strict=True) if held]
    return train, held_out


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _docstrings(path: Path) -> Iterator[str]:
    """The cleaned docstrings of one source file; none if this Python cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # newer or broken syntax; another encoding
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield inspect.cleandoc(text)


if __name__ == "__main__":
    train, held_out = split(documents())
    print(f"{len(train)} documents to train on, {sum(map(len, train)):,} characters")
    print(f"{len(held_out)} documents held out, {sum(map(len, held_out)):,} characters")
