# SPDX-License-Identifier: Apache-2.0
"""A packed model's plan carried out once more from its dense weights, with 2 and 3 bits on llama.cpp's grids.

Q2_K and Q3_K have scales of 4 and 6 bits for 16 weights: codes that were chosen for other grids have no place there. Knows the pipeline;
how files are written is `gguf`'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from transformers_mcmoe.integrations.exports.stored import Stored
from transformers_mcmoe.models.stream import Checkpoint, checkpoint_files
from transformers_mcmoe.models.structure import model_class
from transformers_mcmoe.pipeline import compress


def requantized(
    stored: Stored, dense: str, dataset: Any, work_dir: Path, progress: Callable[[Any], None] | None = None
) -> Checkpoint:
    """The packed matrices of a model's plan, experts of 2 and 3 bits as rows of Q2_K and Q3_K.

    Args:
        stored: the packed model, whose options are used again.
        dense: folder or Hub id of the model that it was made from.
        dataset: calibration data, as `MCMoEConfig` takes them.
        work_dir: folder for the matrices, and for hidden states meanwhile.
        progress: as `MCMoEConfig` takes it.

    Raises:
        ValueError: `dense` is not the model that was packed.
    """
    config = copy.copy(stored.quantization)
    config.plan, config.blocks, config.dataset = stored.plan, True, dataset
    config.tokenizer, config.work_dir, config.progress = dense, None, progress
    config.odp = config.otp = config.prune = config.rank = None
    config.tuning_steps = 0
    files = checkpoint_files(dense)
    _check(stored, Checkpoint(files), dense)
    found = AutoConfig.from_pretrained(dense)
    with torch.device("meta"):
        model = model_class(found)._from_config(found)
    model.config._name_or_path = dense
    dtype = found.dtype if isinstance(found.dtype, torch.dtype) else torch.float32
    return Checkpoint(compress(model, files, config, dtype=dtype, work_dir=work_dir).files)


def _check(stored: Stored, dense: Checkpoint, name: str) -> None:
    """Raise ValueError if the models differ in what packing leaves: norms, routers, embeddings."""
    if stored.quantization.tuning_steps:
        raise ValueError(
            f"'{stored.name}' was tuned behind its codes, which is lost where they are chosen anew; compress with tuning_steps=0."
        )
    for key, tensor in stored.checkpoint.slices.items():
        if key in stored.matrices or tensor.get_dtype() == "U8":
            continue
        other = dense.slices.get(key)
        if other is None or other.get_shape() != tensor.get_shape() or not _equal(tensor, other):
            raise ValueError(
                f"'{name}' is not the model that '{stored.name}' was made from: '{key}' differs; give that model."
            )


def _equal(stored: Any, dense: Any) -> bool:
    """Whether two tensors are equal in the first one's dtype; of large ones the first rows are compared."""
    rows = slice(0, max(1, (1 << 20) // max(1, stored.get_shape()[-1])))
    own = stored[rows] if len(stored.get_shape()) > 1 else stored[:]
    other = dense[rows] if len(stored.get_shape()) > 1 else dense[:]
    return torch.equal(own, other.to(own.dtype))
