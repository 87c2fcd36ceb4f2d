# SPDX-License-Identifier: Apache-2.0
"""Write model_cards/: the demo model compressed, measured, and told by the card that `mcmoe push` would upload.

    python benchmarks/cards.py

Everything goes through the command line, as a user would do it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from transformers_mcmoe.cli import app

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
DENSE = ROOT / "examples" / "demo-mixtral"
RUNS = {
    "demo-mixtral-mcmoe-2.54bit": ["--bits", "2.54"],
    "demo-mixtral-mcmoe-2.05bit-odp": ["--bits", "2.05", "--odp-rate", "0.1"],
}


def main() -> None:
    """Compress, evaluate and describe each run."""
    sys.path.insert(0, str(ROOT / "examples"))
    from python_docs import documents, split

    train, held_out = split(documents())
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "python_docs_train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in train))
        (folder / "python_docs_held_out.txt").write_text("\n\n".join(held_out))
        for name, options in RUNS.items():
            packed = str(folder / name)
            data = ["--dataset", str(folder / "python_docs_train.jsonl"), "--seq-len", "256", "--dtype", "float32"]
            text = ["--text", str(folder / "python_docs_held_out.txt"), "--context", "256", "--dtype", "float32"]
            _run("compress", str(DENSE), "--output", packed, *data, *options)
            _run("evaluate", packed, "--reference", str(DENSE), *text, "--layers", "--speed")
            shutil.rmtree(CARDS / name, ignore_errors=True)
            _run("push", packed, f"your-name/{name}", "--card-only", str(CARDS / name))


def _run(*words: str) -> None:
    app(list(words), standalone_mode=False)


if __name__ == "__main__":
    main()
