# SPDX-License-Identifier: Apache-2.0
"""The model card of a packed model: made from its report and its evaluation, with nothing in it that was not measured.

Knows the fields of `mcmoe_report.json` and `mcmoe_evaluation.json`, and Hub metadata; it reads no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from jinja2 import Environment, StrictUndefined

from transformers_mcmoe.config import MCMoEConfig, ODPConfig, OTPConfig, PruneConfig, RankConfig
from transformers_mcmoe.progress import size

TEMPLATE = Path(__file__).parent / "model_card.md"
# a card with this line is ours and may be written anew; one without is the user's own
MARK = "<!-- made by transformers_mcmoe from measurements -->"
FIGURES = "figures"
# options that do not change what is computed, or that the command line has elsewhere
_APART = ("average_bits", "quant_method", "format_version", "plan", "prune", "rank", "odp", "otp", "dataset", "preset")


def model_name(report: Mapping[str, Any]) -> str:
    """The dense model: its Hub id, or the name of its folder."""
    return report.get("base_model") or Path(report.get("model", "")).name


def inherited(model: str, token: str | bool | None = None) -> dict[str, Any]:
    """Licence, languages and task of the dense model, as its own card has them; {} where there is none to read.

    Args:
        model: Hub id, or folder with a README.md.
        token: for a private one.
    """
    readme = Path(model) / "README.md"
    try:
        if Path(model).is_dir():
            data = ModelCard.load(readme).data if readme.is_file() else None
        else:
            data = ModelCard.load(model, token=token).data  # type: ignore[arg-type]  # hf takes bools, too
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return {}
    except Exception as error:  # a transport error of whichever HTTP library the Hub's client uses
        if not type(error).__module__.startswith("httpx"):
            raise
        return {}
    found = {} if data is None else data.to_dict()
    names = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {name: found[name] for name in names if found.get(name)}


def build_card(
    repo_id: str,
    report: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    base_model: str | None = None,
    facts: Mapping[str, Any] | None = None,
    figures: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card.

    Args:
        repo_id: "owner/name" that the model is loaded by.
        report: of the compression.
        record: what was evaluated, {} if nothing was.
        base_model: Hub id of the dense model; default the report's, none if it was compressed from a folder.
        facts: licence and the like, see `inherited`; the report's, if it has some, fill the gaps.
        figures: title -> path in the repository.
        tags: further ones.

    Returns:
        A card whose metadata holds only what is known.
    """
    base_model = base_model or report.get("base_model")
    facts = {**(report.get("license") or {}), **(facts or {})}
    source, sees = report.get("calibration_source"), bool(report.get("sees_images"))
    data: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "tags": ["mcmoe", "mixture-of-experts", "quantized", *_pruned_tag(report), *tags],
        "datasets": [source] if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) else None,
        "pipeline_tag": facts.get("pipeline_tag", "image-text-to-text" if sees else "text-generation"),
        **{name: facts.get(name) for name in ("license", "license_name", "license_link", "language")},
    }
    results = _results(record, base_model)
    if results:
        data |= {"model_name": repo_id.rpartition("/")[2], "eval_results": results}
    metadata = ModelCardData(**{name: value for name, value in data.items() if value})
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=metadata.to_yaml(),
        mark=MARK,
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        base=base_model or model_name(report),
        base_link=f"[{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else model_name(report) or "a model",
        report=report,
        config=report["config"],
        record=record,
        share=report["sizes"]["total_bytes"] / report["sizes"]["dense_bytes"],
        parts=_parts(report),
        experts=_experts(report),
        license=facts.get("license"),
        mixed=any(len(set(widths) - {"0"}) > 1 for widths in _all_widths(report)),
        widths=sorted({w for own in _all_widths(report) for w in own} - {"0"}),
        factored=_factored(report),
        auto=("AutoModelForImageTextToText", "AutoProcessor") if sees else ("AutoModelForCausalLM", "AutoTokenizer"),
        command=command_line(report, base_model or model_name(report), repo_id.rpartition("/")[2]),
        source=source,
        figures=figures or {},
        size=size(report["sizes"]["total_bytes"]),
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))


def _pruned_tag(report: Mapping[str, Any]) -> list[str]:
    return ["expert-pruning"] if report["config"].get("odp") or report["config"].get("otp") else []


def _parts(report: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """What, at how many bits, bytes."""
    config, dtype = report["config"], report.get("dtype", "a float type")
    rows = []
    for name, count in report["sizes"].get("parts", {}).items():
        if not count:
            continue
        if name.startswith("experts"):
            rows.append(("routed experts", name.partition(", ")[2], count))
        elif name.startswith("attention"):
            given = (config[key] for key in ("attention_bits", "shared_expert_bits"))
            widths = {bits for own in given for bits in (own if isinstance(own, list) else [own]) if bits != 16}
            described = " or ".join(f"{bits} bits" for bits in sorted(widths))
            rows.append(("attention projections, shared experts, dense MLPs", described, count))
        else:
            what = "embeddings, output head" if name.startswith("embeddings") else "routers, norms, all else"
            rows.append((what, f"not quantized, {dtype}", count))
    return rows


def _all_widths(report: Mapping[str, Any]) -> list[str]:
    """Widths of each layer's experts, of gate and up and of down."""
    return [*report["expert_bits"].values(), *report.get("down_bits", {}).values()]


def _factored(report: Mapping[str, Any]) -> str:
    """Ranks and width of low-rank factors, "" without any."""
    ranks = [rank for own in (report.get("ranks") or {}).values() for rank in own if rank]
    return f"ranks {min(ranks)} to {max(ranks)}, {report['rank_bits']} bits" if ranks else ""


def _experts(report: Mapping[str, Any]) -> tuple[int, int]:
    """Experts in all, and layers that have some."""
    return sum(map(len, report["expert_bits"].values())), len(report["expert_bits"])


def _results(record: Mapping[str, Any], base_model: str | None) -> list[EvalResult]:
    """Measured figures in the Hub's form."""
    found = []
    for name, row in record.get("text", {}).items():
        protocol = row["protocol"]
        arguments = {"context": protocol["context"], "stride": protocol["stride"], "windows": protocol["windows"]}
        common: dict[str, Any] = {
            "task_type": "text-generation",
            "task_name": "Text generation",
            "dataset_type": re.sub(r"[^\w./-]+", "-", name).strip("-").lower(),
            "dataset_name": name,
            "dataset_args": arguments,
        }
        metrics = (
            ("perplexity", "Perplexity", row["perplexity"]),
            ("kl-divergence", "KL divergence from the dense model, nats per token", row.get("kl")),
            ("top-1-agreement", "Share of tokens with the dense model's first choice", row.get("top1")),
        )
        found += [
            EvalResult(**common, metric_type=kind, metric_name=title, metric_value=value)
            for kind, title, value in metrics
            if value is not None
        ]
    for name, row in record.get("tasks", {}).items():
        for metric, value in row["metrics"].items():
            found.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text generation",
                    dataset_type=name.partition(",")[0],
                    dataset_name=name,
                    metric_type=metric.partition(" ")[0],
                    metric_name=f"{metric}, {row['questions']} questions",
                    metric_value=value["value"],
                )
            )
    return found


def command_line(report: Mapping[str, Any], model: str, output: str) -> str:
    """The `mcmoe compress` that gives this model again: what differs from the defaults is in it.

    Args:
        report: of the compression.
        model: the dense model.
        output: folder.
    """
    config = report["config"]
    words = ["mcmoe", "compress", model or "MODEL", "--output", output]
    rank = config.get("rank")
    if not rank or rank["base"] or rank["mean"] == "auto":  # else the average follows from ranks alone
        words += ["--bits", f"{config['average_bits']:g}"]
    defaults = MCMoEConfig(preset=config.get("preset")).to_dict()
    if config.get("preset"):
        words += ["--preset", config["preset"]]
    for name, value in config.items():
        if name not in _APART and name in defaults and value != defaults[name]:
            words += _words(name, value)
    words += _dataset(report)
    kinds = {"prune": PruneConfig, "rank": RankConfig, "odp": ODPConfig, "otp": OTPConfig}
    for name, kind in kinds.items():
        if config.get(name):
            plain = kind().to_dict()
            given = {
                key: value for key, value in config[name].items() if value is not None and value != plain.get(key)
            }
            words += [f"--{name}-options", json.dumps(given)] if given or name != "odp" else [f"--{name}"]
    if report.get("plan_given"):
        words += ["--plan", "config.json"]
    if report.get("dtype"):
        words += ["--dtype", report["dtype"]]
    return " ".join(_quoted(word) for word in words)


def _dataset(report: Mapping[str, Any]) -> list[str]:
    source, given = report.get("calibration_source"), report["config"].get("dataset")
    if isinstance(given, Mapping):
        return ["--dataset", json.dumps(given)]
    if isinstance(given, str):
        return ["--dataset", given]
    return ["--dataset", "TEXTS_GIVEN_IN_MEMORY"] if source == "given in memory" else []


def _words(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [flag, ",".join(f"{width}:{count}" for width, count in value.items())] if value else []
    if isinstance(value, list | tuple):
        return [flag, ",".join(map(str, value))] if value else []
    return [] if value is None else [flag, f"{value:g}" if isinstance(value, float) else str(value)]


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\\''") + "'"
