# SPDX-License-Identifier: Apache-2.0
"""compress(): the one ordered list of stages from a dense checkpoint to packed layer files.

1. prepare: which matrices there are, whether the budget can be met, calibration tokens, the work folder (`prepare`)
2. prune: drop experts, if the config asks for it (`dropping`)
3. allocate: run the layers, measure routing and errors, choose a width per expert (`job`, `allocating`)
4. quantize: round (`rounding`), pack and write (`writing`) every layer

With a budget per layer, 3 and 4 happen layer by layer in one pass over the model; with one budget for the model 4 is
a second pass. Nothing here knows transformers' hooks (`quantizer`) or the modules that run packed weights (`nn`).
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transformers_mcmoe.calibration.sequences import Sequences as Calibration
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.distributed import world
from transformers_mcmoe.models.stream import Checkpoint, computing, open_runner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.allocating import LayerResult
from transformers_mcmoe.pipeline.dropping import Dropped
from transformers_mcmoe.pipeline.job import Job
from transformers_mcmoe.pipeline.prepare import (
    OVERHEAD,
    fingerprint_of,
    hessian_memory,
    image_need,
    packed_disk,
    prepare,
    rank_disk,
    sized,
)
from transformers_mcmoe.plan import Matrix, Plan
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.tuning import Teacher, check_head
from transformers_mcmoe.workdir import WorkDir

__all__ = ["OVERHEAD", "TEACHER", "Compressed", "LayerResult", "allocate", "compress", "unread_patterns"]

# tokens per forward pass of a layer: activations stay small beside the weights
BATCH_TOKENS = 2048
# where two plans are compared, one calibration sequence in so many is kept for that
JUDGED = 8
# file of the dense model's outputs in the work folder; it outlives the compression, until the model is tuned
TEACHER = "teacher.states"


@dataclass
class Compressed:
    """The result of `compress`.

    Attributes:
        plan: widths of every matrix.
        files: packed layer files, to be read after the dense ones.
        replaced: checkpoint names that packed tensors replace under other names.
        matrices: every matrix under the plan.
        layers: measurements by experts path.
        fallbacks: what was done otherwise than usual, and why.
        seconds: time per stage.
        tokens: calibration tokens run, 0 if none.
        image_tokens: those of them that stand for parts of images.
        tokens_sha256: of their ids, None if none.
        plan_given: whether the config brought the plan.
        teacher: what the dense model returned for the sequences to tune on, or None.
        dropped: what was found about experts that are dropped, or None.
        compared: of two plans, where the config asked for "auto" and they differed; see `Job`.
    """

    plan: Plan
    files: list[Path]
    replaced: list[str]
    matrices: list[Matrix]
    layers: dict[str, LayerResult]
    fallbacks: list[str]
    seconds: dict[str, float]
    tokens: int
    tokens_sha256: str | None = None
    image_tokens: int = 0
    plan_given: bool = False
    teacher: Teacher | None = None
    dropped: Dropped | None = None
    compared: dict[str, float] | None = None


def compress(
    model: Any, checkpoint_files: Sequence[str | Path], config: MCMoEConfig, *, dtype: torch.dtype, work_dir: Path
) -> Compressed:
    """Compress a dense checkpoint into packed layer files.

    Args:
        model: the transformers model on meta; it is not changed.
        checkpoint_files: its dense safetensors files.
        config: what to do.
        dtype: floating dtype of the layers while they are run.
        work_dir: folder for hidden states and for the finished layers, `layer-00000.safetensors`, ...

    Raises:
        ValueError, NotImplementedError, OSError: one sentence each, before any weight is read where possible.
    """
    with _prepared(model, checkpoint_files, config, dtype, work_dir) as (job, structure, calibration):
        teacher = job.teach(job.scratch / TEACHER)
        plan, files = job.run()
    return Compressed(
        plan=plan,
        files=files,
        replaced=job.writer.replaced,
        matrices=structure.matrices(plan),
        layers=job.layers,
        fallbacks=job.fallbacks,
        seconds=job.seconds,
        tokens=0 if calibration is None else calibration.numel(),
        tokens_sha256=None if calibration is None else calibration.fingerprint(),
        image_tokens=0 if calibration is None else calibration.image_tokens(),
        plan_given=config.plan is not None,
        teacher=teacher,
        dropped=job.dropped,
        compared=job.compared,
    )


def allocate(
    model: Any, checkpoint_files: Sequence[str | Path], config: MCMoEConfig, *, dtype: torch.dtype, work_dir: Path
) -> Plan:
    """The plan that `compress` would round by, see `Job.allocate`; takes what `compress` takes."""
    with _prepared(model, checkpoint_files, config, dtype, work_dir) as (job, _, _):
        return job.allocate()


@contextmanager
def _prepared(
    model: Any, checkpoint_files: Sequence[str | Path], config: MCMoEConfig, dtype: torch.dtype, work_dir: Path
) -> Iterator[tuple[Job, Structure, Calibration | None]]:
    """A job that may begin, its structure and its calibration tokens."""
    started = time.monotonic()
    by_loss = config.drops is not None and config.drops.importance == "loss"
    if config.tuning_steps or (config.plan is None and (config.joint or by_loss)):
        check_head(model)
    ranks = world(config.world_size, config.device)
    device = ranks.device(config.device)
    meter = Meter(config.progress)
    with computing(), ExitStack() as stack:
        stack.callback(meter.close)
        structure = Structure(
            copy.deepcopy(model), config.attention_bits, config.shared_expert_bits, config.modules_to_not_convert
        )
        checkpoint = Checkpoint(checkpoint_files)
        config = sized(structure, config, dtype)
        budgets, calibration = prepare(structure, config)
        limit = hessian_memory(structure, config, dtype)
        # a run that needs no data still looks at what layers are given
        tokens = Calibration(torch.zeros(1, 8, dtype=torch.int64)) if calibration is None else calibration
        work = WorkDir(work_dir, fingerprint_of(structure, config, checkpoint_files, tokens, dtype), ranks.rank)
        each = rank_disk(structure, config, tokens.numel(), dtype) + image_need(structure, tokens, dtype)
        need = packed_disk(structure, config) + ranks.size * each
        ranks.first(lambda: work.claim(need, config.resume))
        ranks.agree(work.join())
        stack.callback(work.clean)
        runner = open_runner(
            structure.model,
            checkpoint,
            structure.names,
            list(structure.experts),
            tokens,
            work.scratch,
            dtype=dtype,
            device=device,
            batch_tokens=BATCH_TOKENS,
            limit=config.max_memory_bytes or None,
            judged=max(1, len(tokens) // JUDGED) if config.joint and config.plan is None else 0,
            world=ranks,
            durable=config.work_dir is not None,
        )
        if device.type == "cpu" and dtype.itemsize == 2:
            for experts in structure.experts.values():
                stack.enter_context(experts.in_blocks())
        job = Job(structure, runner, config, budgets, work, meter, limit)
        job.seconds["prepare"] = time.monotonic() - started
        yield job, structure, calibration
        ranks.barrier()  # the first rank removes nothing that others still read
        work.clean(finished=True)


def unread_patterns(structure: Structure, replaced: Sequence[str]) -> set[str]:
    """Patterns for the loader's names of dense tensors that packed ones replace under other names."""
    names = structure.names
    return {f"^{re.escape(name)}$" for key in replaced for name in (names.renamed(key), names.unprefixed(key))}
