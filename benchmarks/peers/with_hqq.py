# SPDX-License-Identifier: Apache-2.0
"""HQQ as a peer: data-free rounding with zeros by half-quadratic splitting, see `common`."""

from __future__ import annotations

import argparse
import time

import common

HQQ = "hqq==0.2.8.post1"
INSTALLS = (
    (common.TORCH,),
    ("--no-deps", HQQ),
    ("numpy", "tqdm", "einops", "accelerate", "termcolor", "transformers==5.23.0", common.TORCH),
)


def work(given: argparse.Namespace) -> None:
    """All of it, inside the virtual environment."""
    import hqq
    import torch
    from hqq.core.quantize import Quantizer

    names = set(common.quantizable(given.model, given.layers))
    weights = {}
    started = time.monotonic()
    for name, weight in common.tensors(given.model, names.__contains__):
        packed, meta = Quantizer.quantize(
            weight.float(),
            nbits=common.width_of(name, given),
            group_size=given.group_size,
            axis=1,
            optimize=True,
            round_zero=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        weights[name] = Quantizer.dequantize(packed, meta).float().view_as(weight)
    common.write(
        given,
        weights,
        common.bytes_of(weights, given, zero_bits=16),
        peer=f"HQQ {HQQ.partition('==')[2]}",
        settings={"axis": 1, "group_size": given.group_size, "optimize": True, "round_zero": False},
        seconds=round(time.monotonic() - started, 1),
        versions={"hqq": getattr(hqq, "__version__", HQQ)},
    )


if __name__ == "__main__":
    common.run(common.options(__doc__, "hqq"), __file__, INSTALLS, work, {})
