# SPDX-License-Identifier: Apache-2.0
"""A report and an evaluation record of the size of a real model's, with every section, for tests of pages and cards.

The fields are those that the pipeline and `mcmoe evaluate` write (test_cli checks that they do); the numbers are drawn.
"""

from __future__ import annotations

import random
from typing import Any

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.version import versions

WORDS = [
    "the",
    "mixture",
    "of",
    "experts",
    "routes",
    "every",
    "token",
    "to",
    "two",
    "of",
    "them",
    "and",
    "adds",
    "what",
    "they",
    "return",
]


def report_and_record(seed: int, layers: int = 32, experts: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """A report and a record of a model that was compressed to 2.54 bits and evaluated in every way."""
    rng = random.Random(seed)
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    bits = {path: "".join(rng.choice("123") for _ in range(experts)) for path in paths}
    coverage, errors = {}, {}
    for path in paths:
        tokens = [rng.randrange(10, 9000) for _ in range(experts)]
        weights = [round(count * rng.uniform(0.2, 0.8), 4) for count in tokens]
        coverage[path] = {"tokens": tokens, "routing_weight": weights, "starved": []}
        errors[path] = {str(b): [rng.uniform(0.001, 3) / b for _ in range(experts)] for b in (1, 2, 3)}
    report = {
        "format_version": 1,
        "model": "org/Mixtral-8x7B",
        "base_model": "org/Mixtral-8x7B",
        "license": {},
        "dtype": "bfloat16",
        "average_bits": 2.54,
        "bits_per_weight": 2.79,
        "expert_bits": bits,
        "coverage": coverage,
        "errors": errors,
        "fallbacks": [f"{paths[0]}: experts [3] saw too few calibration tokens; their errors were taken from all."],
        "sizes": {
            "quantized_weights": 46_000_000_000,
            "quantized_bytes": 16_000_000_000,
            "total_bytes": 16_600_000_000,
            "dense_bytes": 93_400_000_000,
            "parts": {
                "experts, 1 bit": 1_200_000_000,
                "experts, 2 bits": 6_800_000_000,
                "experts, 3 bits": 7_200_000_000,
                "attention, shared": 720_000_000,
                "embeddings, head": 524_000_000,
                "routers, norms": 3_100_000,
            },
        },
        "calibration_tokens": 262_144,
        "calibration_source": "allenai/c4",
        "calibration_sha256": "0" * 64,
        "plan_given": False,
        "seconds": {"prepare": 12.0, "allocate": 5400.0, "quantize": 3100.0},
        "seed": 0,
        "versions": versions(),
        "config": MCMoEConfig().to_dict(),
    }
    return report, _record(rng, layers)


def _record(rng: random.Random, layers: int) -> dict[str, Any]:
    protocol = {"context": 2048, "stride": 2048, "windows": 140, "of_windows": 140, "tokens": 286_580}
    protocol |= {"dtypes": {"model": "bfloat16", "reference": "bfloat16", "log_softmax": "float32", "sums": "float64"}}
    machine = {"processor": "AMD EPYC 9B45", "cpus": 2, "load": 1.1, "date": "2026-11-27"}
    about = {"text": "WikiText-2 test", "sha256": "1" * 64, "machine": machine, "protocol": protocol, "seed": 0}
    text = about | {
        "perplexity": 5.61 + rng.random(),
        "nll": 1.7,
        "reference_perplexity": 3.84,
        "dnll": 0.3,
        "dnll_se": 0.01,
    }
    text |= {"kl": 0.21, "kl_se": 0.004, "top1": 0.83, "tokens": 286_580, "versions": versions()}
    names = {
        "type": ("code", "digits", "names", "punctuation", "words"),
        "frequency": ("1-100", "101-1000", "1001-"),
        "position": ("0-15", "16-63", "64-255", "256-1023", "1024-"),
    }
    classes = {
        partition: {name: {"tokens": 999, "kl": rng.random(), "kl_share": 0.2, "top1": 0.8} for name in inside}
        for partition, inside in names.items()
    }
    worst = [
        {
            "kl": 20.0 - i,
            "context": " ".join(rng.choices(WORDS, k=18))
            + " averyveryverylongidentifier_that_does_not_break" * (i % 3 == 0),
            "token": rng.choice(WORDS),
            "predicted": rng.choice(WORDS),
            "reference_predicted": rng.choice(WORDS),
            "position": 100 + i,
        }
        for i in range(20)
    ]

    def distance() -> dict[str, float]:
        return {"relative_error": rng.random() / 2, "cosine": 0.95}

    metrics = {"acc": {"value": 0.71, "stderr": 0.01}, "acc_norm": {"value": 0.73, "stderr": None}}
    shares = {f"model.layers.{i}.mlp.experts": {"bytes_skipped": rng.random() / 3} for i in range(layers)}
    return {
        "record_version": 1,
        "text": {"WikiText-2 test": text},
        "classes": about | {"classes": classes, "definitions": {}, "worst": worst},
        "layers": about
        | {
            "layers": [
                {"path": f"model.layers.{i}", "entering": distance(), "alone": distance()} for i in range(layers)
            ],
            "leaving": distance(),
        },
        "pruning": about
        | {"phases": {"prefill": {"tokens": 5, "layers": shares}, "decode": {"tokens": 0, "layers": shares}}},
        "speed": {
            "protocol": {"prompt": 256, "new_tokens": 64, "batch": 1, "rounds": 3, "threads": 2, "dtypes": {}},
            "machine": machine,
            "models": {
                name: {
                    "prefill_tokens_per_second": 41.2,
                    "decode_tokens_per_second": 6.1,
                    "first_token_seconds": 6.2,
                    "peak_memory_bytes": 17_000_000_000,
                }
                for name in ("dense", "packed")
            },
        },
        "tasks": {
            f"{name}, 0-shot": {"metrics": metrics, "questions": 1838, "shots": 0}
            for name in ("piqa", "arc_challenge", "humaneval_pass_at_10")
        },
        "needle": {
            "lengths": [1024, 2048, 4096, 8192, 16384, 32768],
            "depths": [i / 9 for i in range(10)],
            "repeats": 2,
            "found": [[rng.choice((0.0, 0.5, 1.0)) for _ in range(10)] for _ in range(6)],
            "nll": [[10 * rng.random() for _ in range(10)] for _ in range(6)],
            "protocol": {"digits": 7},
        },
    }
