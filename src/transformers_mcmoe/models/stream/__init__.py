# SPDX-License-Identifier: Apache-2.0
"""Runs a model one decoder layer at a time, straight from its safetensors files.

`open_runner` gives a `LayerStream`, which holds one layer's weights at a time, or, for models whose layers need each
other's outputs, a `LoadedRunner`, which holds them all. Both run the same calibration tokens through one layer after
the other. Nothing here knows experts or quantization; what happens to a layer is its caller's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from transformers_mcmoe.calibration.sequences import Sequences
from transformers_mcmoe.distributed import World
from transformers_mcmoe.memory import large_blocks_apart, quick_collections
from transformers_mcmoe.models.experts import stacks_of
from transformers_mcmoe.models.names import CheckpointNames
from transformers_mcmoe.models.stream.checkpoint import Checkpoint, Weights, checkpoint_files
from transformers_mcmoe.models.stream.loaded import LoadedRunner
from transformers_mcmoe.models.stream.runner import HiddenStates, LayerRunner, model_inputs
from transformers_mcmoe.models.stream.streamed import LayerStream, NotStreamable

__all__ = [
    "Checkpoint",
    "HiddenStates",
    "LayerRunner",
    "LayerStream",
    "LoadedRunner",
    "NotStreamable",
    "checkpoint_files",
    "computing",
    "model_inputs",
    "open_runner",
]

logger = logging.getLogger(__name__)


@contextmanager
def computing() -> Iterator[None]:
    """Steps out of the contexts that `from_pretrained` builds models in: meta device and the model's default dtype.

    A device context is a torch function mode, which costs every operation a detour through Python, more than a step of
    GPTQ takes; so modes are disabled rather than overruled by `torch.device("cpu")`. Large blocks of memory are kept apart
    meanwhile, so that layers leave no holes in the heap. Setting the number of threads, to what it is, ends MKL's choosing its own:
    it would end when threads first share work, amid a run.
    """
    torch.set_num_threads(torch.get_num_threads())
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad(), large_blocks_apart(), quick_collections():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if bars:
            transformers_logging.enable_progress_bar()


def open_runner(
    model: Any,
    checkpoint: Checkpoint,
    names: CheckpointNames,
    expert_paths: Sequence[str],
    tokens: Sequences,
    work_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_tokens: int,
    limit: int | None = None,
    judged: int = 0,
    world: World | None = None,
    durable: bool = False,
) -> LayerRunner:
    """A runner for a model's decoder layers: streamed where possible, else with the whole model loaded.

    Args:
        model: a private copy of the model on meta; it is changed.
        checkpoint: its dense checkpoint.
        names: its conversion mapping.
        expert_paths: paths of the experts modules, which tell where the decoder layers are.
        tokens: calibration sequences.
        work_dir: folder for the hidden states.
        dtype: floating dtype of weights and hidden states.
        device: where layers run.
        batch_tokens: of a forward pass, at most; a longer sequence is one by itself.
        limit: bytes that a model which cannot be streamed may take.
        judged: see `LayerRunner`; 0 for a model that cannot be streamed.
        world: see `LayerRunner`; default this process alone.
        durable: hidden states of passes that have a name outlive a loss of power.

    Raises:
        ValueError: the model cannot be streamed and is larger than `limit`, or the checkpoint does not fit it.
    """
    model.eval()  # from_pretrained does this only after loading; router jitter and dropout would be live
    weights = Weights(model, checkpoint, names, dtype, device)
    stacks = stacks_of(expert_paths)
    layers = [f"{stack}.{i}" for stack in stacks for i in range(len(model.get_submodule(stack)))]
    try:
        if len(stacks) > 1:
            raise NotStreamable(f"its experts lie in {len(stacks)} stacks of layers ({', '.join(stacks)})")
        return LayerStream(weights, layers, tokens, work_dir, batch_tokens, judged, world or World(), durable)
    except NotStreamable as error:
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        if limit is not None and size > limit:
            raise ValueError(
                f"{type(model).__name__} cannot be streamed ({error}), and the whole dense model takes "
                f"{size / 1e9:.2f} GB; raise max_memory."
            ) from error
        logger.warning(
            "%s cannot be streamed: %s. The whole dense model is loaded for calibration.", type(model).__name__, error
        )
        return LoadedRunner(weights, layers, tokens, batch_tokens, str(error), world or World())
