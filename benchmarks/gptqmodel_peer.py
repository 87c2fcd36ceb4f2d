# SPDX-License-Identifier: Apache-2.0
"""GPTQModel as a peer: the first layers of a MoE checkpoint through its GPTQ, written back as dense weights.

Makes a virtual environment with GPTQModel and a CPU torch, calibrates on evenly spread windows of a text, quantizes
experts at `--bits` and attention at `--attention-bits`, packs, saves, loads the packed model again, and writes a
checkpoint with the input's names and dtype whose quantized matrices are what that model computes with; every other
tensor is the input's, bit for bit. So any evaluator loads it with plain transformers. What was run goes to
`gptqmodel_peer.json` beside the weights. Knows Mixtral's names on disk; does not score anything.
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# GPTQModel 7.7.0 asks for torch >= 2.14.1 in its metadata but
# quantizes on a CPU with 2.13.0, which is what the other tools are measured with; hence --no-deps and this list.
TORCH = "torch==2.13.0"
DEPENDENCIES = [
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "defuser==0.0.28",
    "device-smi==0.5.7",
    "dill==0.4.1",
    "jinja2==3.1.6",
    "logbar==0.4.15",
    "ninja==1.13.2",
    "numpy==2.4.6",
    "pillow==13.0.0",
    "protobuf==7.36.2",
    "pyarrow==26.0.1",
    "pypcre==0.6.4",
    "requests==2.34.2",
    "safetensors==0.8.0",
    "setuptools==84.2.1",
    "threadpoolctl==3.8.0",
    "tokenicer==0.0.14",
    "torchao==0.18.0",
    "transformers==5.23.0",
    "wheel",
]
GPTQMODEL = "gptqmodel==7.7.0"
REPORT = "gptqmodel_peer.json"
# of QuantizeConfig, all that bears on quality, given or default
REPORTED = (
    *("bits", "group_size", "sym", "desc_act", "act_group_aware", "static_groups", "mse", "dynamic", "damp_percent"),
    *("damp_auto_increment", "true_sequential", "fallback", "hessian", "moe", "gptaq", "foem"),
)

LAYER = re.compile(r"\blayers\.(\d+)\.")
ATTENTION = re.compile(r"\.self_attn\.[qkvo]_proj\.weight$")
EXPERT = re.compile(r"\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)\.weight$")
# names on disk -> names in a model that GPTQModel has loaded
RENAMED = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


def environment(folder: Path) -> Path:
    """Make the virtual environment unless it is there with these pins; returns its interpreter."""
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    pins = hashlib.sha256("\n".join([TORCH, *DEPENDENCIES, GPTQMODEL]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == pins:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    # alone and first, so that the rest finds it there
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, *DEPENDENCIES, TORCH], check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", GPTQMODEL], check=True)
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


def within(name: str, layers: int) -> bool:
    """Whether the tensor belongs to one of the first layers, or to no layer."""
    found = LAYER.search(name)
    return found is None or int(found[1]) < layers


def quantizable(name: str, layers: int) -> bool:
    """Whether the tensor is one of those to quantize."""
    return bool(LAYER.search(name) and within(name, layers) and (ATTENTION.search(name) or EXPERT.search(name)))


def shorten(model: Path, layers: int, folder: Path) -> None:
    """Write the checkpoint of the first layers alone: later ones have no say in how these are quantized."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    for file in [*model.glob("*.json"), *model.glob("*.jinja"), *model.glob("*.model")]:
        if file.name != "model.safetensors.index.json":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    kept = dict(tensors(model, lambda name: within(name, layers)))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What QuantizeConfig is given; all else is GPTQModel's default."""
    config = {
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        "mse": options.mse,
        "act_group_aware": not options.natural_order,
        "desc_act": False,
        # version 1 stores zero - 1 and loses a zero point of 0, which asymmetric grids have
        "format": "gptq" if options.symmetric else "gptq_v2",
        "dynamic": {r"+:.*\.self_attn\..*": {"bits": options.attention_bits}},
        "offload_to_disk": False,
    }
    if options.damp is not None:
        config["damp_percent"] = options.damp
    return config


def quantize(source: Path, config: dict[str, Any], tokens: Any, dtype: str, packed: Path) -> dict[str, Any]:
    """Calibrate, quantize, pack and save; returns what GPTQModel says of it."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    used = QuantizeConfig(**config)
    effective = {key: str(getattr(used, key)) for key in REPORTED if hasattr(used, key)}
    model = GPTQModel.load(str(source), used, device="cpu", dtype=getattr(torch, dtype))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    started = time.monotonic()
    log = model.quantize(rows, batch_size=1)
    seconds = time.monotonic() - started
    model.save(str(packed))
    return {"effective": effective, "seconds": round(seconds, 1), "modules": _plain(log)}


def dequantized(packed: Path, names: list[str]) -> dict[str, Any]:
    """Load the packed model and return what its quantized modules multiply with, under the names on disk.

    Args:
        packed: folder that `quantize` saved.
        names: the dense names of the matrices that must be quantized, no fewer and no others.

    Returns:
        name -> float32 [out, in].
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(packed), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    found = {k: m for k, m in model.model.named_modules() if hasattr(m, "dequantize_weight")}
    weights = {}
    for name in names:
        module = _renamed(name).removesuffix(".weight")
        if module not in found:
            raise ValueError(f"GPTQModel left '{name}' dense: there is no quantized module '{module}'.")
        layer = found.pop(module)
        weights[name] = layer.dequantize_weight().T.float().contiguous()
    if found:
        raise ValueError(f"GPTQModel quantized modules that should be dense: {sorted(found)[:4]}.")
    return weights


def write(model: Path, weights: dict[str, Any], output: Path) -> dict[str, float]:
    """Copy the checkpoint with the quantized matrices in place; returns their relative errors (Frobenius)."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    errors = {}
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, output)
    for file in shards(model):
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata()
            content = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        for name in content.keys() & weights.keys():
            dense, quantized = content[name].float(), weights[name]
            if dense.shape != quantized.shape:
                raise ValueError(f"'{name}' is {list(dense.shape)}, but GPTQModel gives {list(quantized.shape)}.")
            errors[name] = float((quantized - dense).norm() / dense.norm())
            content[name] = quantized.to(content[name].dtype)
        save_file(content, output / file.name, metadata=metadata)
    return errors


def run(options: argparse.Namespace) -> None:
    """All of it, inside the virtual environment."""
    import gptqmodel
    import torch
    import transformers

    tokens = windows(options.model, options.text, options.samples, options.seq_len)
    if options.save_tokens is not None:
        torch.save(tokens, options.save_tokens)
    names = [name for name, _ in tensors(options.model, lambda name: quantizable(name, options.layers))]
    if not names:
        raise ValueError(f"{options.model} has no attention or expert matrices under names known here.")
    config = settings(options)
    with tempfile.TemporaryDirectory(prefix="gptqmodel_peer_") as folder:
        source, packed = Path(folder, "source"), Path(folder, "packed")
        source.mkdir()
        shorten(options.model, options.layers, source)
        report = quantize(source, config, tokens, options.dtype, packed)
        report["packed_bytes"] = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        weights = dequantized(packed, names)
    errors = write(options.model, weights, options.output)
    group = {"attention": ATTENTION, "experts": EXPERT}
    means = {k: [e for name, e in errors.items() if pattern.search(name)] for k, pattern in group.items()}
    report |= {
        "given": config,
        "dtype": options.dtype,
        "tokens": list(tokens.shape),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "layers": options.layers,
        "mean_relative_error": {k: sum(v) / len(v) for k, v in means.items()},
        "matrices": len(errors),
        "versions": {m.__name__: m.__version__ for m in (gptqmodel, torch, transformers)},
        "load": round(os.getloadavg()[0], 1),
        "threads": options.threads,
    }
    (options.output / REPORT).write_text(json.dumps(report, indent=1))
    print(f"{len(errors)} matrices, {report['mean_relative_error']}, {report['seconds']} s -> {options.output}")


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def _plain(log: Any) -> Any:
    """GPTQModel's log as JSON."""
    return json.loads(json.dumps(log, default=str))


def main() -> None:
    """Make the environment and run this file in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="dense MoE checkpoint")
    parser.add_argument("text", type=Path, help="calibration text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=2, help="of experts")
    parser.add_argument("--attention-bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--layers", type=int, required=True, help="how many first layers to quantize")
    parser.add_argument("--mse", type=float, default=2.4, help="norm of the range search; 0 is GPTQModel's min/max")
    parser.add_argument("--damp", type=float, help="default GPTQModel's, 0.05")
    parser.add_argument("--symmetric", action="store_true", help="GPTQModel's default; loses at 2 bits")
    parser.add_argument("--natural-order", action="store_true", help="without GPTQModel's default act_group_aware")
    parser.add_argument("--dtype", default="float32", help="of the calibration passes")
    parser.add_argument("--save-tokens", type=Path, help="write the token ids [samples, seq_len] here")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir(), "gptqmodel_peer_venv"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run(options)
        return
    python = environment(options.venv.absolute())
    # With one worker, its default on two cores, GPTQModel waits for itself.
    variables = {"GPTQMODEL_CPU_WORKERS": str(max(2, options.threads)), "OMP_NUM_THREADS": str(options.threads)}
    command = [python, __file__, *sys.argv[1:], "--inside"]
    raise SystemExit(subprocess.run(command, env=os.environ | variables).returncode)


if __name__ == "__main__":
    main()
