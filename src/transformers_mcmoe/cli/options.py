# SPDX-License-Identifier: Apache-2.0
"""Every argument of `MCMoEConfig` as an option of the commands that compress, with the help of its docstring.

Knows the config's signature and docstring, so that an option is described in one place.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from transformers_mcmoe.cli.command import Refused
from transformers_mcmoe.config import MCMoEConfig, ODPConfig, OTPConfig, PruneConfig, RankConfig

PANELS = {
    "Sizes": (
        "bits",
        "target_size",
        "expert_bits",
        "attention_bits",
        "shared_expert_bits",
        "group_size",
        "modules_to_not_convert",
    ),
    "Which expert gets how many bits": (
        "allocation",
        "budget",
        "preset",
        "plan",
        "alpha",
        "beta",
        "gamma",
        "eps",
        "granularity",
        "at_least",
        "expert_parallel",
    ),
    "Rounding": (
        "rounding",
        "fit",
        "symmetric",
        "integer_zeros",
        "act_order",
        "damping",
        "sweeps",
        "sequential",
        "activations",
        "tuning_steps",
        "tuning_rate",
    ),
    "Calibration": ("dataset", "num_samples", "seq_len", "tokenizer", "processor", "image_weight", "seed"),
    "Fewer experts, thinner matrices": ("prune", "prune_options", "rank", "rank_options"),
    "Expert pruning at run time": ("odp", "odp_rate", "odp_options", "otp", "otp_options"),
    "This machine": ("device", "max_memory", "work_dir", "resume", "world_size"),
}
# help where the docstring speaks of Python, and defaults and types where the command line has others
HELP = {
    "expert_bits": "candidate widths of an expert, e.g. 2,3,4; each of 1, 2, 3, 4, 8.",
    "attention_bits": "width of attention projections, 16 to leave them, or several to choose from. Default: 4,8, "
    "but 4 with another allocation than pmq, with one budget per layer, or with at_least.",
    "shared_expert_bits": "the same for shared experts and dense MLPs.",
    "target_size": "size of the weights' files, e.g. 16GB, in place of --bits; all that is stored counts.",
    "at_least": "least number of experts of a layer per width, e.g. 3:1,2:1 (the papers' constraint).",
    "modules_to_not_convert": "names or patterns of modules that stay as they are, separated by commas.",
    "dataset": "calibration text: Hub id 'org/name[:subset[:split[:field]]]', a local .txt, .jsonl or .parquet file, or several with "
    'their shares as JSON: {"web.txt": 0.7, "code.jsonl": 0.3}. Default: C4 from the Hub. For vision-language models also a folder with images and a .jsonl file (docs/vision.md).',
    "tokenizer": "tokenizer's id or folder; default the model's own.",
    "processor": "processor's id or folder, for samples with images; default the model's own.",
    "work_dir": "folder for intermediate files; default a hidden one beside the output.",
    "world_size": "how many processes torchrun has started, or for plan how many will share the work; another number is refused. Default: those that run.",
    "resume": "go on with the layers that an earlier run of the same command has finished.",
    "max_memory": "memory that compression may take, e.g. 12GB; checked against the estimate before it starts.",
    "plan": "JSON file with the width of every expert, used instead of the allocation.",
    "prune": "share of all experts to drop for good, e.g. 0.25, or auto; --bits stays the average over all weights (docs/structure.md).",
    "prune_options": 'further fields of PruneConfig as JSON, e.g. \'{"method": "reap"}\'. Implies --prune.',
    "rank": "mean rank of two factors that take the place of every expert's matrices, e.g. 128, or auto (docs/structure.md).",
    "rank_options": "further fields of RankConfig as JSON, e.g. '{\"base\": true}'. Implies --rank.",
    "odp": "skip experts by thresholds on routing weights (docs/pruning.md).",
    "odp_rate": "share of routed expert bytes to skip, e.g. 0.15; default the median rule. Implies --odp.",
    "odp_options": "further fields of ODPConfig as JSON, e.g. '{\"protect\": 0.05}'. Implies --odp.",
    "otp": "share of routed slots to skip by learned pruning, e.g. 0.2; its routers are trained at the end.",
    "otp_options": "further fields of OTPConfig as JSON, e.g. '{\"steps\": 30}'. Implies --otp.",
}
# help that begins with a value keeps it as it is typed
VALUES = ("layer", "pmq", "gptq", "search", "final", "paper", "fast")
TYPES: dict[str, tuple[Any, Any]] = {
    "target_size": (str | None, None),
    "expert_bits": (str, "1,2,3,4"),
    "attention_bits": (str | None, None),
    "shared_expert_bits": (str | None, None),
    "at_least": (str | None, None),
    "modules_to_not_convert": (str | None, None),
    "dataset": (str | None, None),
    "tokenizer": (str | None, None),
    "processor": (str | None, None),
    "work_dir": (Path | None, None),
    "max_memory": (str | None, None),
    "device": (str | None, None),
    "plan": (Path | None, None),
    "prune": (str | None, None),
    "prune_options": (str | None, None),
    "rank": (str | None, None),
    "rank_options": (str | None, None),
    "odp": (bool, False),
    "odp_rate": (float | None, None),
    "odp_options": (str | None, None),
    "otp": (float | None, None),
    "otp_options": (str | None, None),
}


def compression_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a compression; it gets them as the dict `options`."""

    def run(*args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for names in PANELS.values() for name in names}
        function(*args, options=options, **kwargs)

    own = inspect.signature(function, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.name != "options"]
    parameters += [_parameter(name, panel) for panel, names in PANELS.items() for name in names]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def _parameter(name: str, panel: str) -> inspect.Parameter:
    signature = inspect.signature(MCMoEConfig, eval_str=True).parameters
    kind, default = TYPES[name] if name in TYPES else (signature[name].annotation, signature[name].default)
    text = HELP.get(name) or _documented()[name]
    text = text[:1].upper() + text[1:] if not text.startswith(VALUES) else text
    flag = "--" + name.replace("_", "-")
    if kind is bool and default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    option = typer.Option(flag, help=text, rich_help_panel=panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _documented() -> dict[str, str]:
    """What the docstring of `MCMoEConfig` says of each argument."""
    text = (inspect.getdoc(MCMoEConfig) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    entries = re.findall(r"^    (\w+): ((?:.|\n(?!    \w+: ))*)", text, re.MULTILINE)
    return {name: " ".join(words.replace("`", "").replace('"', "").split()) for name, words in entries}


def config_of(options: Mapping[str, Any], **more: Any) -> MCMoEConfig:
    """The config that the options of a command ask for.

    Raises:
        ValueError: see `MCMoEConfig`.
        Refused: an option cannot be read.
    """
    apart = ("odp", "otp", "prune", "rank")
    given = {name: value for name, value in options.items() if not name.startswith(apart)}
    if options["dataset"] and options["dataset"].startswith("{"):
        given["dataset"] = _json("dataset", options["dataset"])
    given["expert_bits"] = [_integer("expert_bits", word) for word in options["expert_bits"].split(",")]
    for name in ("attention_bits", "shared_expert_bits"):
        words = options[name]
        given[name] = [_integer(name, word) for word in words.split(",")] if words else None
    given["at_least"] = _at_least(options["at_least"])
    patterns = options["modules_to_not_convert"]
    given["modules_to_not_convert"] = patterns.split(",") if patterns else None
    pruning = {
        "prune": _structure(PruneConfig, "prune", "ratio", options),
        "rank": _structure(RankConfig, "rank", "mean", options),
        "odp": _odp(options),
        "otp": _otp(options),
    }
    return MCMoEConfig(**{**given, **pruning, **more})


def _structure(kind: Any, name: str, main: str, options: Mapping[str, Any]) -> Any:
    fields = _json(f"{name}_options", options[f"{name}_options"])
    if options[name] is not None:
        fields[main] = options[name] if options[name] == "auto" else _number(name, options[name])
    asked = options[name] is not None or options[f"{name}_options"] is not None
    return _pruning(kind, f"{name}_options", fields) if asked else None


def _odp(options: Mapping[str, Any]) -> ODPConfig | None:
    fields = _json("odp_options", options["odp_options"])
    if options["odp_rate"] is not None:
        fields["rate"] = options["odp_rate"]
    asked = options["odp"] or options["odp_rate"] is not None or options["odp_options"] is not None
    return _pruning(ODPConfig, "odp_options", fields) if asked else None


def _otp(options: Mapping[str, Any]) -> OTPConfig | None:
    fields = _json("otp_options", options["otp_options"])
    if options["otp"] is not None:
        fields["target"] = options["otp"]
    asked = options["otp"] is not None or options["otp_options"] is not None
    return _pruning(OTPConfig, "otp_options", fields) if asked else None


def _pruning(kind: Any, option: str, fields: dict[str, Any]) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        known = ", ".join(inspect.signature(kind).parameters)
        raise Refused(
            f"--{option.replace('_', '-')} has a field that does not exist; those that do: {known}."
        ) from error


def _json(option: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refused(f"--{option.replace('_', '-')} is not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise Refused(f"--{option.replace('_', '-')} must be a JSON object, but it is {text}.")
    return value


def _at_least(text: str | None) -> dict[int, int] | None:
    if not text:
        return None
    if text.startswith("{"):
        return {_integer("at_least", width): int(count) for width, count in _json("at_least", text).items()}
    pairs = [pair.partition(":") for pair in text.split(",")]
    return {_integer("at_least", width): _integer("at_least", count) for width, _, count in pairs}


def _number(option: str, word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise Refused(f"--{option} is {word!r}, where a number or 'auto' should be.") from error


def _integer(option: str, word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise Refused(f"--{option.replace('_', '-')} has {word!r} where a whole number should be.") from error
