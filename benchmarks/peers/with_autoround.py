# SPDX-License-Identifier: Apache-2.0
"""AutoRound as a peer: rounding and clipping learned block by block, see `common`.

Runs in a virtual environment of its own on a CPU; asymmetric, with its extensions for low widths (`enable_alg_ext`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common

AUTOROUND = "auto-round==0.16.1"
INSTALLS = ((common.TORCH,), (AUTOROUND, common.TORCH, "transformers==5.23.0"))


def work(given: argparse.Namespace) -> None:
    """All of it, inside the virtual environment."""
    import auto_round
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    names = common.quantizable(given.model, given.layers)
    rows = common.windows(given.model, given.text, given.samples, given.seq_len)
    with tempfile.TemporaryDirectory(prefix="autoround_") as folder:
        common.shorten(given.model, given.layers, Path(folder))
        scheme: dict[str, Any] = {"bits": given.bits, "group_size": given.group_size, "sym": False}
        attention = {"bits": given.attention_bits, "group_size": given.group_size, "sym": False}
        modules = {name: common.module_of(name) for name in names}
        layers = {m: dict(attention) for name, m in modules.items() if common.ATTENTION.search(name)}
        rounder = AutoRound(
            folder,
            AutoTokenizer.from_pretrained(given.model),
            scheme=scheme | {"data_type": "int", "act_bits": 16},
            layer_config=layers,
            iters=given.iterations,
            seqlen=given.seq_len,
            nsamples=given.samples,
            batch_size=min(8, given.samples),
            dataset=DataLoader([{"input_ids": row} for row in rows], batch_size=min(8, given.samples)),
            device_map="cpu",
            enable_torch_compile=False,
            enable_alg_ext=True,
            model_dtype="float32",
        )
        started = time.monotonic()
        model, layout = rounder.quantize()
        seconds = time.monotonic() - started
        found = dict(model.named_modules())
        weights = {}
        for name, module in modules.items():
            weight = found[module].weight.detach().float()
            if len(weight[0, : given.group_size].unique()) > 2 ** common.width_of(name, given):
                raise ValueError(f"AutoRound left '{name}' dense.")
            weights[name] = weight
    common.write(
        given,
        weights,
        common.bytes_of(weights, given),
        peer=f"AutoRound {auto_round.__version__}, {given.iterations} iterations",
        settings=scheme | {"iters": given.iterations, "enable_alg_ext": True},
        seconds=round(seconds, 1),
        versions={"auto_round": auto_round.__version__},
        modules={module: {k: str(v) for k, v in layout[module].items()} for module in list(layout)[:1]},
    )


def main() -> None:
    """Make the environment and run this file in it."""
    parser = common.options(__doc__, "autoround")
    parser.add_argument("--iterations", type=int, default=200, help="of each block; 200 is AutoRound's default")
    # its loader on the meta device does not know fused experts
    common.run(parser, __file__, INSTALLS, work, {"AR_DISABLE_META_LOAD": "1"})


if __name__ == "__main__":
    main()
