# SPDX-License-Identifier: Apache-2.0
"""Whether the options of a config are in their ranges and go together. Knows no model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from transformers_mcmoe.config.otp import OTPConfig
from transformers_mcmoe.config.pruning import is_number
from transformers_mcmoe.config.values import (
    ACTIVATIONS,
    ALLOCATIONS,
    BUDGETS,
    ERRORS,
    GRANULARITIES,
    NEEDS_MODEL,
    ROUNDINGS,
    as_bytes,
    ascending,
    check,
    is_width,
)
from transformers_mcmoe.quantization.grid import FITS, Grid
from transformers_mcmoe.quantization.packing import WIDTHS

if TYPE_CHECKING:
    from transformers_mcmoe.config.compression import MCMoEConfig


def validate(config: MCMoEConfig) -> None:
    """Raise ValueError, which names the option, its value and what it must be, if one is not valid."""
    check(isinstance(config.bits, int | float) and 0 < config.bits <= 8, "bits", config.bits, "a number in (0, 8]")
    widths = config.expert_bits
    check(ascending(widths), "expert_bits", widths, f"distinct ascending widths out of {WIDTHS}")
    for name in ("attention_bits", "shared_expert_bits"):
        value = getattr(config, name)
        if isinstance(value, tuple):
            check(ascending(value), name, value, f"distinct ascending widths out of {WIDTHS}")
            check(config.whole, name, value, f"one width, or {NEEDS_MODEL}")
        else:
            check(is_width(value) or value == 16, name, value, f"one of {(*WIDTHS, 16)}, or several to choose from")
    positive = isinstance(config.group_size, int) and config.group_size > 0 and config.group_size % 32 == 0
    check(positive, "group_size", config.group_size, "a positive multiple of 32")
    check(config.budget in BUDGETS, "budget", config.budget, f"one of {BUDGETS}")
    choices = {
        "allocation": ALLOCATIONS,
        "eps": ERRORS,
        "rounding": ROUNDINGS,
        "fit": FITS,
        "activations": ACTIVATIONS,
        "granularity": GRANULARITIES,
    }
    for name, allowed in choices.items():
        check(getattr(config, name) in allowed, name, getattr(config, name), f"one of {allowed}")
    size = config.world_size
    check(size is None or (isinstance(size, int) and size > 0), "world_size", size, "a positive integer, or left out")
    known = not config.resume or config.work_dir is not None
    check(known, "resume", config.resume, "False without the work_dir of the run to go on with")
    for name in ("symmetric", "integer_zeros", "act_order", "sequential", "resume"):
        check(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")
    check(isinstance(config.damping, int | float) and 0 <= config.damping < 1, "damping", config.damping, "in [0, 1)")
    check(config.granularity == "expert" or config.whole, "granularity", config.granularity, NEEDS_MODEL)
    apart = config.granularity != "layer" or not config.joint
    check(apart, "granularity", config.granularity, "'expert' or 'projection' with 'auto'")
    for name in ("sweeps", "tuning_steps"):
        value = getattr(config, name)
        check(isinstance(value, int) and value >= 0, name, value, "an integer >= 0")
    rate = config.tuning_rate
    check(isinstance(rate, int | float) and 0 < rate < 1, "tuning_rate", rate, "in (0, 1)")
    Grid(config.fit, config.symmetric, config.integer_zeros)  # refuses what does not go together
    if config.allocation == "bsp":
        pair = config.budget == "model" and len(config.expert_bits) == 2 and not config.at_least
        given = (config.budget, config.expert_bits, config.at_least)
        wanted = "used with budget='model', two expert_bits such as (2, 4), and no at_least; "
        check(pair, "allocation", config.allocation, f"{wanted}here they are {given}")
    for name in ("alpha", "beta", "gamma"):
        value = getattr(config, name)
        check(isinstance(value, int | float) and value >= 0, name, value, "a number >= 0")
    known = all(w in widths and isinstance(n, int) and n >= 0 for w, n in config.at_least.items())
    check(known, "at_least", config.at_least, f"a dict from widths of expert_bits {widths} to counts >= 0")
    ranks = config.expert_parallel
    check(isinstance(ranks, int) and ranks > 0, "expert_parallel", ranks, "a positive integer")
    uneven = config.factors is not None and config.factors.exponent > 0
    free = not (config.at_least or config.prune or config.joint or uneven)
    wanted = "1 with at_least, prune, 'auto', or ranks that differ: serving ranks would not be alike"
    check(ranks == 1 or free, "expert_parallel", ranks, wanted)
    for name in ("num_samples", "seq_len"):
        value = getattr(config, name)
        check(isinstance(value, int) and value > 0, name, value, "a positive integer")
    weight = config.image_weight
    check(is_number(weight) and 0 < weight < float("inf"), "image_weight", weight, "a number > 0")
    names = config.modules_to_not_convert
    check(isinstance(names, list | tuple), "modules_to_not_convert", names, "a list of names or patterns")
    config.modules_to_not_convert = list(names)
    unused = not config.at_least or config.allocation != "uniform"
    check(unused, "at_least", config.at_least, "left out with allocation='uniform'")
    check(isinstance(config.seed, int) and config.seed >= 0, "seed", config.seed, "an integer >= 0")
    pruned = isinstance(config.otp, OTPConfig) and config.otp.on and bool(config.odp)
    check(not pruned, "otp", config.otp, "left out with odp: both are rules for the same slots")
    for name in ("max_memory", "target_size"):
        value = getattr(config, name)
        check(value is None or as_bytes(value) > 0, name, value, "bytes, or a string like '12GB'")
    bits = inspect.signature(type(config)).parameters["bits"].default
    sized = config.target_size is None and (config.bits == bits or config.plan is not None)
    check(
        sized or not config.only_factors, "rank", config.rank, "left out with bits or target_size, or have base=True"
    )
    check(
        config.target_size is None or config.bits == bits,
        "target_size",
        config.target_size,
        f"left out with bits={config.bits}: both set the size",
    )
    for name, part, other in (("prune", config.prune, config.rank), ("rank", config.rank, config.prune)):
        if part is None or not part.auto:
            continue
        check(other is None or other.auto, name, "auto", "used without a number for the other of prune and rank")
        check(
            name == "prune" or config.rounding == "gptq",
            name,
            "auto",
            "used with rounding='gptq', which factors are measured by",
        )
        check(config.activations == "compressed", name, "auto", "used with activations='compressed'")
        check(
            config.num_samples > 1, "num_samples", config.num_samples, "2 or more with 'auto', which keeps some apart"
        )
    check(
        not config.joint or config.whole,
        "prune" if config.drops is None and config.prune else "rank",
        "auto",
        NEEDS_MODEL,
    )
