# SPDX-License-Identifier: Apache-2.0
"""What all peers share: a virtual environment each, the same calibration windows, and a dense checkpoint as a result.

A peer quantizes attention and experts of a dense MoE checkpoint and writes it back with the input's names and dtype: quantized
matrices are what its packed model computes with, every other tensor is the input's, bit for bit. So any evaluator
loads it with plain transformers. What was run, and the bytes that the quantized matrices take in the peer's own format, goes to
`peer.json` beside the weights. Knows Mixtral's names on disk; does not score anything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPORT = "peer.json"
TORCH = "torch==2.13.0"
LAYER = re.compile(r"\blayers\.(\d+)\.")
ATTENTION = re.compile(r"\.self_attn\.[qkvo]_proj\.weight$")
EXPERT = re.compile(r"\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)\.weight$")
# names on disk -> names in a model whose experts a peer has taken apart
RENAMED = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


def options(about: str | None, name: str) -> argparse.ArgumentParser:
    """The options that all peers take."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", type=Path, help="dense MoE checkpoint")
    parser.add_argument("text", type=Path, help="calibration text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=2, help="of experts")
    parser.add_argument("--attention-bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=96, help="must divide rows")
    parser.add_argument("--layers", type=int, help="how many first layers to quantize; default all")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir(), f"{name}_venv"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def run(
    parser: argparse.ArgumentParser,
    file: str,
    installs: Sequence[Sequence[str]],
    work: Callable[[argparse.Namespace], None],
    variables: Mapping[str, str],
) -> None:
    """Make the virtual environment unless it is there with these pins, and run the script in it.

    Args:
        parser: of the script's options.
        file: the script.
        installs: arguments of `pip install`, one call each.
        work: what the script does inside.
        variables: added to the environment.
    """
    given = parser.parse_args()
    if given.inside:
        work(given)
        return
    python = _environment(given.venv.absolute(), installs)
    variables = {"OMP_NUM_THREADS": str(given.threads), **variables}
    command = [python, file, *sys.argv[1:], "--inside"]
    raise SystemExit(subprocess.run(command, env=os.environ | variables).returncode)


def _environment(folder: Path, installs: Sequence[Sequence[str]]) -> Path:
    """Make the virtual environment unless it is there with these pins; returns its interpreter."""
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    pins = hashlib.sha256("\n".join(" ".join(call) for call in installs).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == pins:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    for call in installs:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *call], check=True)
    stamp.write_text(pins)
    return python


def windows(model: Path, text: Path, samples: int, seq_len: int) -> Any:
    """The text's tokens cut into windows, `samples` of them spread evenly: [samples, seq_len] int64."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    available = len(ids) // seq_len
    if available < samples:
        raise ValueError(f"{text} gives {available} windows of {seq_len} tokens, but {samples} are asked for.")
    rows = torch.tensor(ids[: available * seq_len], dtype=torch.int64).view(available, seq_len)
    return rows[torch.arange(samples) * available // samples].clone()


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [folder / "model.safetensors"]


def tensors(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a checkpoint."""
    from safetensors import safe_open

    for file in shards(folder):
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  safe_open is no mapping
                if wanted(name):
                    yield name, source.get_tensor(name)


def within(name: str, layers: int | None) -> bool:
    """Whether the tensor belongs to one of the first layers, or to no layer."""
    found = LAYER.search(name)
    return found is None or layers is None or int(found[1]) < layers


def quantizable(model: Path, layers: int | None) -> list[str]:
    """Names of the matrices to quantize."""

    def wanted(name: str) -> bool:
        return bool(LAYER.search(name) and within(name, layers) and (ATTENTION.search(name) or EXPERT.search(name)))

    names = [name for name, _ in tensors(model, wanted)]
    if not names:
        raise ValueError(f"{model} has no attention or expert matrices under names known here.")
    return names


def width_of(name: str, given: argparse.Namespace) -> int:
    """Code width of a matrix."""
    return int(given.attention_bits if ATTENTION.search(name) else given.bits)


def bytes_of(weights: Mapping[str, Any], given: argparse.Namespace, zero_bits: int | None = None) -> int:
    """Bytes of codes, an fp16 scale per group, and its zero: of `zero_bits`, default the codes' width."""
    bits = 0
    for name, weight in weights.items():
        width = width_of(name, given)
        grid = 16 + (width if zero_bits is None else zero_bits)
        bits += weight.numel() * width + weight.numel() // given.group_size * grid
    return bits // 8


def module_of(name: str) -> str:
    """Path of a matrix' module in a model whose experts are modules of their own."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name.removesuffix(".weight")


def shorten(model: Path, layers: int | None, folder: Path) -> None:
    """Write the checkpoint of the first layers alone: later ones have no say in how these are quantized."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    for file in [*model.glob("*.json"), *model.glob("*.jinja"), *model.glob("*.model")]:
        if file.name != "model.safetensors.index.json":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    kept = dict(tensors(model, lambda name: within(name, layers)))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def write(given: argparse.Namespace, weights: Mapping[str, Any], packed_bytes: int, **told: Any) -> None:
    """Copy the checkpoint with the quantized matrices in place, and write the report.

    Args:
        given: the options.
        weights: float32 [out, in] by name on disk.
        packed_bytes: what they take in the peer's own format, scales and zeros included.
        told: what the peer says of its run.
    """
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file

    given.output.mkdir(parents=True, exist_ok=True)
    errors = {}
    for file in given.model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, given.output)
    for file in shards(given.model):
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata()
            content = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        for name in content.keys() & weights.keys():
            dense, quantized = content[name].float(), weights[name]
            if dense.shape != quantized.shape:
                raise ValueError(f"'{name}' is {list(dense.shape)}, but the peer gives {list(quantized.shape)}.")
            errors[name] = float((quantized - dense).norm() / dense.norm())
            content[name] = quantized.to(content[name].dtype).contiguous()
        save_file(content, given.output / file.name, metadata=metadata)
    if missing := weights.keys() - errors.keys():
        raise ValueError(f"The checkpoint has no '{min(missing)}'.")
    groups = {"attention": ATTENTION, "experts": EXPERT}
    means = {k: [e for name, e in errors.items() if pattern.search(name)] for k, pattern in groups.items()}
    report = {
        **told,
        "samples": given.samples,
        "seq_len": given.seq_len,
        "layers": given.layers or 0,
        "bits_per_weight": 8 * packed_bytes / sum(w.numel() for w in weights.values()),
        "packed_bytes": packed_bytes,
        "mean_relative_error": {k: sum(v) / len(v) for k, v in means.items() if v},
        "matrices": len(errors),
        "versions": told.get("versions", {}) | {m.__name__: m.__version__ for m in (torch, transformers)},
        "load": round(os.getloadavg()[0], 1),
        "threads": given.threads,
    }
    (given.output / REPORT).write_text(json.dumps(report, indent=1, default=str))
    print(f"{len(errors)} matrices, {report['mean_relative_error']} -> {given.output}", flush=True)
