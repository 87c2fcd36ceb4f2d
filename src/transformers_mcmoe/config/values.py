# SPDX-License-Identifier: Apache-2.0
"""What options of a compression may be: names, presets, and how values are read and checked. Knows no config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers_mcmoe.plan import Plan
from transformers_mcmoe.quantization.packing import WIDTHS

BUDGETS = ("layer", "model")
ALLOCATIONS = ("pmq", "uniform", "random", "frequency", "routing_weight", "f_norm", "hessian", "bsp")
ROUNDINGS = ("gptq", "nearest")
ERRORS = ("final", "nearest")
ACTIVATIONS = ("compressed", "dense")
GRANULARITIES = ("expert", "projection", "layer")
NEEDS_MODEL = (
    "used with allocation='pmq', eps='final', budget='model', alpha=beta=0, without at_least, and not with rank alone"
)
# what a preset sets; the options it names cannot be given beside it
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"allocation": "uniform", "sequential": False, "sweeps": 0, "num_samples": 32},
    "default": {},
    "best": {"sweeps": 8, "tuning_steps": 128},
    "paper": {
        "allocation": "pmq",
        "budget": "layer",
        "expert_bits": (1, 2, 3),
        "alpha": 1.0,
        "beta": 1.5,
        "gamma": 2.0,
        "at_least": {3: 1, 2: 1},
        "eps": "nearest",
        "sequential": False,
        "sweeps": 0,
    },
}


def is_local(name: str) -> bool:
    """Whether a text names a file or a folder."""
    try:
        return Path(name).exists()
    except OSError:  # a text instead of a name is too long for one; it is refused where it is read
        return False


def is_mixture(dataset: Any) -> bool:
    """Whether a data set is a mapping from data sets to their shares of the sequences, and not a description of one."""
    described = {"path", "subset", "split", "field", "data_files"}
    return isinstance(dataset, Mapping) and bool(dataset) and not described & set(dataset)


def check(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError, which says what an option must be, unless it is `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r} is not valid: it must be {expected}.")


def as_bytes(value: Any) -> int:
    """Bytes as a number, or as "12GB"; 0 if there are none or they cannot be read."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", str(value), re.IGNORECASE)
    if match is None:
        return 0
    base = 1024 if match.group(3) else 1000
    return int(float(match.group(1)) * base ** " KMGT".index(match.group(2).upper() or " "))


def as_widths(value: Any) -> Any:
    """A width, several as a tuple, one of several as itself."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def ascending(widths: Any) -> bool:
    """Whether these are distinct widths in rising order."""
    return (
        isinstance(widths, tuple)
        and bool(widths)
        and all(map(is_width, widths))
        and list(widths) == sorted(set(widths))
    )


def is_width(value: Any) -> bool:
    """Whether a matrix can have this code width."""
    return isinstance(value, int) and value in WIDTHS


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise for options that there are not."""
    for name in options:
        raise TypeError(f"MCMoEConfig has no option {name!r}; see its docstring for the options there are.")


def read_plan(plan: Any) -> Plan | None:
    """A plan from what may be given as one: a plan, a dict, or a JSON file that holds one."""
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    path = Path(plan)
    if not path.is_file():
        raise ValueError(f"plan={str(path)!r} is not a file; give the path of a plan in JSON, or a dict.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The plan '{path}' is not JSON ({error}); write it again.") from error
    if isinstance(data, Mapping):  # also in the config.json of a packed model, or in its report
        data = data.get("quantization_config", data.get("config", data))
        data = data.get("plan", data) if isinstance(data, Mapping) else data
    return Plan.from_dict(data)
