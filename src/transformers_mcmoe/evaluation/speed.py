# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of prompts and of generation, and peak memory: one model, or several in turns.

Knows models that transformers generates with. Speed is a property of a machine and its load, which stand beside it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import StoppingCriteria

from transformers_mcmoe.evaluation.protocol import evaluating
from transformers_mcmoe.evaluation.record import machine
from transformers_mcmoe.kernels import backend_info
from transformers_mcmoe.memory import PeakMemory
from transformers_mcmoe.version import versions


class _Clock(StoppingCriteria):
    """Is asked after each token, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@torch.no_grad()
def measure_speed(
    models: Mapping[str, Any],
    *,
    prompt: int = 256,
    new_tokens: int = 64,
    batch: int = 1,
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Time greedy generation from random prompts, the models in turns, after one short run of each.

    Args:
        models: by name.
        prompt: tokens of a prompt.
        new_tokens: tokens that are generated, at least 2.
        batch: sequences at a time.
        rounds: how often; reported are medians.
        seed: of the prompts.

    Returns:
        JSON-serialisable: the protocol, machine and versions, and by name under "models": `prefill_tokens_per_second`,
        `decode_tokens_per_second`, `first_token_seconds`, and `peak_memory_bytes`, the most anonymous memory of the
        process while that model ran (what other loaded models hold is in it).

    Raises:
        ValueError: a number is out of range, or the text is longer than a model's positions.
    """
    numbers = {"prompt": (prompt, 1), "new_tokens": (new_tokens, 2), "batch": (batch, 1), "rounds": (rounds, 1)}
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small; take at least {least}.")
    for name, model in models.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and prompt + new_tokens > positions:
            raise ValueError(
                f"A prompt of {prompt} and {new_tokens} new tokens exceed the {positions} positions of {name}; lower them."
            )
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for model in models.values():
            _run(model, ids[:, :16], 2)  # matrices are repacked at first use
        for _ in range(rounds):
            for name, model in models.items():
                runs[name].append(_run(model, ids, new_tokens))
    protocol = {"prompt": prompt, "new_tokens": new_tokens, "batch": batch, "rounds": rounds}
    return {
        "protocol": protocol | {"threads": torch.get_num_threads(), "dtypes": _dtypes(models)},
        "seed": seed,
        "instruction_set": backend_info()["instruction_set"],
        "mode": os.environ.get("MCMOE_MODE", "exact"),
        "machine": machine(),
        "versions": versions(),
        "models": {name: _medians(rows) for name, rows in runs.items()},
    }


def _run(model: Any, ids: Any, new_tokens: int) -> dict[str, float]:
    clock = _Clock()
    ids = ids.to(model.device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with PeakMemory() as peak:
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            stopping_criteria=[clock],
            **options,
        )
    first, rest = clock.times[0] - started, clock.times[-1] - clock.times[0]
    return {
        "first_token_seconds": first,
        "prefill_tokens_per_second": ids.numel() / first,
        "decode_tokens_per_second": len(ids) * (len(clock.times) - 1) / rest if rest else 0.0,
        "peak_memory_bytes": float(peak.bytes),
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    found["peak_memory_bytes"] = int(max(row["peak_memory_bytes"] for row in rows))
    return found


def _dtypes(models: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}
