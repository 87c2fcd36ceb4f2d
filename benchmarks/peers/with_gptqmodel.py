# SPDX-License-Identifier: Apache-2.0
"""GPTQModel as a peer: its GPTQ, see `common`.

Quantizes, packs, saves, and loads the packed model again; the weights written back are what that model computes with.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common

# GPTQModel 7.7.0 asks for torch >= 2.14.1 in its metadata but
# quantizes on a CPU with 2.13.0, which is what the other tools are measured with; hence --no-deps and this list.
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
INSTALLS = (
    # torch alone and first, so that the rest finds it there
    (common.TORCH,),
    (*DEPENDENCIES, common.TORCH),
    ("--no-deps", "--no-build-isolation", GPTQMODEL),
)
# of QuantizeConfig, all that bears on quality, given or default
REPORTED = (
    *("bits", "group_size", "sym", "desc_act", "act_group_aware", "static_groups", "mse", "dynamic", "damp_percent"),
    *("damp_auto_increment", "true_sequential", "fallback", "hessian", "moe", "gptaq", "foem"),
)


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
    return {"effective": effective, "seconds": round(seconds, 1), "modules": len(log or ())}


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
        module = common.module_of(name)
        if module not in found:
            raise ValueError(f"GPTQModel left '{name}' dense: there is no quantized module '{module}'.")
        layer = found.pop(module)
        weights[name] = layer.dequantize_weight().T.float().contiguous()
    if found:
        raise ValueError(f"GPTQModel quantized modules that should be dense: {sorted(found)[:4]}.")
    return weights


def work(given: argparse.Namespace) -> None:
    """All of it, inside the virtual environment."""
    import gptqmodel

    rows = common.windows(given.model, given.text, given.samples, given.seq_len)
    names = common.quantizable(given.model, given.layers)
    config = settings(given)
    with tempfile.TemporaryDirectory(prefix="gptqmodel_") as folder:
        source, packed = Path(folder, "source"), Path(folder, "packed")
        source.mkdir()
        common.shorten(given.model, given.layers, source)
        told = quantize(source, config, rows, given.dtype, packed)
        weights = dequantized(packed, names)
    common.write(
        given,
        weights,
        common.bytes_of(weights, given),  # without the index of groups
        peer=f"GPTQModel {gptqmodel.__version__}",
        settings=config,
        **told,
        versions={"gptqmodel": gptqmodel.__version__},
    )


def main() -> None:
    """Make the environment and run this file in it."""
    parser = common.options(__doc__, "gptqmodel")
    parser.add_argument("--mse", type=float, default=2.4, help="norm of the range search; 0 is GPTQModel's min/max")
    parser.add_argument("--damp", type=float, help="default GPTQModel's, 0.05")
    parser.add_argument("--symmetric", action="store_true", help="GPTQModel's default; loses at 2 bits")
    parser.add_argument("--natural-order", action="store_true", help="without GPTQModel's default act_group_aware")
    parser.add_argument("--dtype", default="float32", help="of the calibration passes")
    # with one worker, its default on two cores, GPTQModel waits for itself
    common.run(parser, __file__, INSTALLS, work, {"GPTQMODEL_CPU_WORKERS": "2"})


if __name__ == "__main__":
    main()
