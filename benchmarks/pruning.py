# SPDX-License-Identifier: Apache-2.0
"""What expert pruning costs in quality and saves in time, on a packed model that recorded its routing.

Quality: perplexity, and KL divergence to the dense model and to the packed model without pruning, on text that
calibration never saw, for every method at equal shares of skipped expert bytes, for a sweep of thresholds and protected
shares, for several lengths, for prompts cut into chunks, and for trained routers; protected tokens are chosen from whole
windows, as the paper does, and causally, as in decoding. Time: prefill and decoding with and without pruning in turns,
experts timed apart. Rows go to results/pruning.jsonl; `--docs` writes docs/pruning.md from them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import here
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from transformers_mcmoe import (
    ODPConfig,
    OTPConfig,
    PackedExperts,
    backend_info,
    compression_report,
    expert_pruning_stats,
    set_expert_pruning,
    train_expert_pruning,
)
from transformers_mcmoe.evaluation import evaluate

RESULTS = Path(__file__).parent / "results" / "pruning.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "pruning.md"
DROP = 0.02  # share of tokens that "drop_all" lets skip everything


class Wrapped(torch.nn.Module):
    """What `evaluate` wants to know of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    dtype = property(lambda self: self.model.dtype)
    device = property(lambda self: self.model.device)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()


class Chunked(Wrapped):
    """A model that is handed each window in chunks, over a cache, as a server with chunked prefill does."""

    def __init__(self, model: Any, size: int) -> None:
        super().__init__(model)
        self.size = size

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        cache, logits = DynamicCache(config=self.config), []
        for chunk in input_ids.split(self.size, dim=1):
            logits.append(self.model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
        return SimpleNamespace(logits=torch.cat(logits, dim=1))


class Remembered(Wrapped):
    """A model whose logits are computed once per window."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.known: dict[bytes, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, **kwargs).logits
        return SimpleNamespace(logits=self.known[key])


def methods(rate: float) -> dict[str, ODPConfig]:
    """ODP, the threshold alone, and the comparators, at one share of skipped expert bytes."""
    named = {"ODP": ODPConfig(rate=rate), "threshold alone (NAEE)": ODPConfig(rate=rate, protect=0)}
    named |= {method: ODPConfig(method=method, rate=rate) for method in ("random", "mean", "variance", "kurtosis")}
    named["ODP, least important 2 % skip all"] = ODPConfig(rate=rate, drop_all=DROP)
    return named


def sweep() -> dict[str, ODPConfig]:
    """Thresholds by protected shares."""
    return {
        f"{level or 'median'}, {100 * protect:.0f} % protected": ODPConfig(threshold=level, protect=protect)
        for level in (0.4, 0.5, 0.6, 0.7, None)
        for protect in (0.0, 0.01, 0.02, 0.05, 0.1)
    }


def causal_too(odp: ODPConfig) -> list[ODPConfig]:
    """The options, and where tokens are ranked also the causal way."""
    data = odp.to_dict()
    return [odp, ODPConfig(**(data | {"causal": True}))] if _ranks(data) else [odp]


def equalized(model: Any, test: torch.Tensor, odp: ODPConfig, context: int, unit: str) -> ODPConfig:
    """The options with the rate that gives the share asked for on the text measured, where layers before are pruned, too."""
    if odp.rate is None or odp.method == "random":
        return odp
    wanted, options = odp.rate, odp
    for _ in range(3):
        set_expert_pruning(model, options)
        options = ODPConfig(**(odp.to_dict() | {"rate": options.rate * wanted / _share(model, test, context, unit)}))
    return options


def equalized_target(model: Any, test: torch.Tensor, target: float, context: int) -> float:
    """The target of trained routers that gives this share of slots on the text measured."""
    asked = target
    for _ in range(3):
        set_expert_pruning(model, otp=asked)
        asked *= target / _share(model, test, context, "slots_skipped")
    return asked


def _share(model: Any, test: torch.Tensor, context: int, unit: str) -> float:
    with torch.no_grad():
        for start in (0, len(test) // 2):
            model(test[start : start + context][None], use_cache=False, logits_to_keep=1)
    return expert_pruning_stats(model)["prefill"][unit]


def measure(
    model: Any,
    dense: Any,
    test: torch.Tensor,
    odp: ODPConfig | float | None,
    context: int,
    windows: int,
    chunk: int = 0,
    unit: str = "bytes_skipped",
) -> dict:
    """Scores and shares of one setting, a number for trained routers; windows are cut into chunks where a size is given."""
    if isinstance(odp, float):
        set_expert_pruning(model, otp=equalized_target(model, test, odp, context))
    else:
        set_expert_pruning(model, equalized(model, test, odp, context, unit) if odp else False)
    started = time.monotonic()
    whole_or_cut = Chunked(model, chunk) if chunk else model
    scores = evaluate(whole_or_cut, test, dense, context=context, limit=windows, batch=1)
    row = scores.to_dict() | {"seconds": round(time.monotonic() - started, 1)}
    if odp is not None:
        stats = expert_pruning_stats(model)["prefill"]
        stats |= {"layers": {path: layer[unit] for path, layer in stats["layers"].items()}}
        row |= {"skipped": stats, "unit": unit, "odp": None if isinstance(odp, float) else odp.to_dict()}
    return row


def quality(options: argparse.Namespace, model: Any, dense: Any, test: torch.Tensor, bits: float) -> None:
    """Append the rows of one packed model."""
    settings: list[tuple[str, str, ODPConfig | float | None, int]] = [("", "no pruning", None, options.context)]
    chunks: dict[str, int] = {}
    if "rates" in options.parts:
        for rate in options.rates:
            for name, odp in methods(rate).items():
                settings += [(f"{100 * rate:.0f} %", name, each, options.context) for each in causal_too(odp)]
    if "sweep" in options.parts:
        for name, odp in sweep().items():
            settings += [("sweep", name, each, options.context) for each in causal_too(odp)]
    if "lengths" in options.parts:
        for length in options.lengths:
            odps = {
                "no pruning": None,
                "ODP": ODPConfig(rate=0.15),
                "threshold alone (NAEE)": ODPConfig(rate=0.15, protect=0),
            }
            for name, odp in odps.items():
                each = [None] if odp is None else causal_too(odp)
                settings += [("lengths", name, one, length) for one in each]
    if "chunks" in options.parts:
        for size in (0, *options.chunks):
            name = f"in chunks of {size}" if size else "in one call"
            chunks[name] = size
            settings += [("chunks", name, odp, options.context) for odp in causal_too(ODPConfig(rate=0.15))]
    training = {}
    if "learned" in options.parts:
        for share in options.learned:
            compared = {
                "threshold alone (NAEE)": ODPConfig(rate=share, protect=0),
                "ODP": ODPConfig(rate=share, causal=True),
                "variance": ODPConfig(rate=share, method="variance", causal=True),
                "OTP": share,
            }
            settings += [(f"slots, {100 * share:.0f} %", name, odp, options.context) for name, odp in compared.items()]
        begun = time.monotonic()
        length = min(512, options.context)
        train_expert_pruning(model, options.calibration, 0.2, options=OTPConfig(steps=options.steps), seq_len=length)
        training = {"trained": {"seconds": round(time.monotonic() - begun), "target": 0.2, "steps": options.steps}}
        print(training, flush=True)
    for table, name, odp, context in settings:
        windows = max(2, options.windows * options.context // context)
        row = {
            "model": options.name,
            "bits": bits,
            "table": table,
            "row": name,
            "causal": isinstance(odp, ODPConfig) and odp.causal and not table.startswith("slots"),
        }
        unit = "slots_skipped" if table.startswith("slots") else "bytes_skipped"
        row |= measure(model, dense, test, odp, context, windows, chunks.get(name, 0), unit)
        row |= {"test": options.test.name, "seed": 0} | (training if isinstance(odp, float) else {})
        _append(row)
        share = f"{100 * row['skipped'][unit]:.2f} % skipped, " if odp else ""
        print(f"{bits} {table} {name}{' (causal)' if row['causal'] else ''}, {context}: {share}"
              f"perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}", flush=True)  # fmt: skip


@contextmanager
def timed(model: Any) -> Iterator[list[float]]:
    """While open, sums up the seconds spent in the experts' products, and those spent in choosing what to skip."""
    total, started = [0.0, 0.0], [0.0]
    modules = [module for module in model.modules() if isinstance(module, PackedExperts)]
    handles = []

    def enter(module: Any, args: Any) -> None:
        started[0] = time.perf_counter()

    def leave(module: Any, args: Any, output: Any) -> None:
        total[0] += time.perf_counter() - started[0]

    def watched(pruning: Any) -> Any:
        def run(*args: Any) -> Any:
            begun = time.perf_counter()
            routing = pruning(*args)
            spent = time.perf_counter() - begun
            total[0], total[1] = total[0] - spent, total[1] + spent
            return routing

        return run

    prunings = [module.pruning for module in modules]
    for module in modules:
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        module.pruning = module.pruning and watched(module.pruning)
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()
        for module, pruning in zip(modules, prunings, strict=True):
            module.pruning = pruning


def speed(options: argparse.Namespace, model: Any, bits: float) -> None:
    """Prefill and decoding of random tokens with and without pruning, in turns."""
    settings: dict[str, ODPConfig | float | None] = {"no pruning": None}
    settings["nothing skipped, tokens ranked"] = ODPConfig(threshold=0)
    for rate in options.rates:
        settings |= {f"ODP {100 * rate:.0f} %": ODPConfig(rate=rate)}
        settings |= {f"threshold alone {100 * rate:.0f} %": ODPConfig(rate=rate, protect=0)}
    seen: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # what the routers decide does not matter here
    random = torch.randint(0, vocabulary, (4, 64), generator=torch.Generator().manual_seed(1))
    train_expert_pruning(model, random, 0.15, options=OTPConfig(objective="layers"), num_samples=4, seq_len=64)
    settings["OTP 15 %"] = 0.15
    test = torch.randint(
        0, vocabulary, (options.context + options.new_tokens,), generator=torch.Generator().manual_seed(0)
    )
    ids = test[: options.context][None]
    for _ in range(options.rounds):
        for name, odp in settings.items():
            if isinstance(odp, float):
                set_expert_pruning(model, otp=odp)
            else:
                set_expert_pruning(model, odp or False)
            for phase in ("prefill", "decode"):
                with torch.no_grad(), timed(model) as inside:
                    if phase == "prefill":
                        started = time.perf_counter()
                        cache = model(ids, use_cache=True).past_key_values
                    else:
                        started = time.perf_counter()
                        for t in range(options.new_tokens):
                            model(test[options.context + t].view(1, 1), past_key_values=cache)
                    whole = time.perf_counter() - started
                skipped = expert_pruning_stats(model)[phase]["bytes_skipped"] if odp else 0.0
                seen.setdefault((phase, name), []).append((whole, inside[0], inside[1], skipped))
    for (phase, name), runs in seen.items():
        whole, inside, choosing = (statistics.median(run[i] for run in runs) for i in (0, 1, 2))
        base_whole, base_inside = (statistics.median(run[i] for run in seen[phase, "no pruning"]) for i in (0, 1))
        share = runs[-1][3]
        tokens = options.context if phase == "prefill" else options.new_tokens
        row = {
            "model": options.name, "bits": bits, "table": f"speed, {phase}", "row": name, "context": options.context, "tokens": tokens,
            "tokens_per_s": tokens / whole, "experts_s": inside, "choosing_s": choosing, "skipped_share": share, "rounds": options.rounds,
            "times_unpruned": base_whole / whole, "expert_time_saved": 1 - inside / base_inside,
            "threads": torch.get_num_threads(), "backend": backend_info()["instruction_set"],
        }  # fmt: skip
        _append(row)
        print(f"{bits} {phase} {name}: {row['tokens_per_s']:.2f} tokens/s, x{row['times_unpruned']:.3f}; {100 * share:.1f} % "
              f"skipped, {100 * row['expert_time_saved']:.1f} % of expert time saved", flush=True)  # fmt: skip


def _append(row: dict[str, Any]) -> None:
    row |= here()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """Measure the packed models given, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packed", type=Path, nargs="+", default=[], help="folders of packed models")
    parser.add_argument("--dense", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--name", default="smolmoe", help="what rows call the model")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--parts", nargs="+", default=["rates", "sweep", "lengths", "chunks", "learned", "speed"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.15, 0.25])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--calibration", type=Path, help="text that routers are trained on")
    parser.add_argument("--learned", type=float, nargs="+", default=[0.15, 0.2, 0.3], help="shares of slots")
    parser.add_argument("--steps", type=int, default=60, help="steps of training on the output")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6, help="windows of --context tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--docs", action="store_true", help="write docs/pruning.md from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    torch.set_num_threads(options.threads)
    if set(options.parts) - {"speed"}:
        tokenizer = AutoTokenizer.from_pretrained(options.dense)
        test = tokenizer(options.test.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        dense = Remembered(AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.float32))
    for folder in options.packed:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        bits = compression_report(model)["config"]["average_bits"]
        if set(options.parts) - {"speed"}:
            quality(options, model, dense, test, bits)
        if "speed" in options.parts:
            speed(options, model, bits)


def write_docs() -> None:
    """docs/pruning.md: the text above its tables, and the newest row of each kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {
        (r["model"], r["bits"], r["table"], r["row"], r.get("causal"), r.get("protocol", {}).get("context")): r
        for r in rows
    }
    text = DOCS.read_text(encoding="utf-8")
    parts = [text[: text.index(MARK) + len(MARK)], ""]
    for model, bits in dict.fromkeys(key[:2] for key in newest):
        own = [row for key, row in newest.items() if key[:2] == (model, bits)]
        parts.append(f"## {model}, {bits:.4g} bits\n")
        base = next((row for row in own if row["table"] == ""), None)
        if base is not None:
            protocol = base["protocol"]
            parts.append(
                f"{protocol['windows']} windows of {protocol['context']} tokens of {base['test']}, {base['tokens']:,} predictions, bf16 beside an fp32 dense model; "
                f"without pruning perplexity {base['perplexity']:.2f}, KL to the dense model {base['kl']:.4f} ± {base['kl_se']:.4f}. "
                "Each cell: perplexity / KL to the dense model.\n"
            )
        for table in dict.fromkeys(
            row["table"] for row in own if row["table"] and not row["table"].startswith("speed")
        ):
            parts += _table(table, [row for row in own if row["table"] == table])
        timed_rows = [row for row in own if row["table"].startswith("speed")]
        if timed_rows:
            parts += _speed(timed_rows)
    DOCS.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _table(table: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line per setting, whole windows and causal beside each other."""
    titles = {
        "sweep": "Thresholds by protected shares",
        "lengths": "Lengths, 15 % of expert bytes",
        "chunks": "ODP, 15 % of expert bytes, prompts cut into calls",
    }
    title = titles.get(table, f"{table} of the routed expert bytes")
    if table.startswith("slots"):
        return _learned_table(table, rows)
    lines = [f"### {title}\n", "| | skipped | whole windows (paper) | causal |", "|---|---|---|---|"]
    keys = dict.fromkeys((row["row"], row["protocol"]["context"]) for row in rows)
    for name, context in keys:
        own = {row["causal"]: row for row in rows if (row["row"], row["protocol"]["context"]) == (name, context)}
        cells = []
        for causal in (False, True):
            row = own.get(causal)
            if row is None and _ranks(own[False].get("odp")):
                cells.append("not measured")
                continue
            row = row or own[False]  # what does not rank tokens is the same
            cells.append(f"{row['perplexity']:.2f} / {row['kl']:.3f} ± {row['kl_se']:.3f}")
        skipped = f"{100 * own[False]['skipped']['bytes_skipped']:.1f} %" if "skipped" in own[False] else ""
        label = f"{name}, {context} tokens" if table == "lengths" else name
        lines.append(f"| {label} | {skipped} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def _learned_table(table: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line per rule at one share of skipped slots; all are causal."""
    lines = [
        f"### {table.removeprefix('slots, ')} of the routed slots\n",
        "| causal | skipped | perplexity | KL |",
        "|---|---|---|---|",
    ]
    for row in rows:
        skipped = f"{100 * row['skipped']['slots_skipped']:.1f} %"
        lines.append(f"| {row['row']} | {skipped} | {row['perplexity']:.2f} | {row['kl']:.4f} ± {row['kl_se']:.4f} |")
    trained = next((row["trained"] for row in rows if "trained" in row), None)
    if trained:
        lines.append(
            f"\nOTP's routers were trained once, for {100 * trained['target']:.0f} %, in {trained['seconds']} s on one thread of a "
            "busy machine."
        )
    return [*lines, ""]


def _ranks(odp: dict[str, Any] | None) -> bool:
    """Whether tokens are compared with each other."""
    return odp is not None and bool(odp["protect"] or odp["drop_all"] or odp["method"] not in ("odp", "random"))


def _speed(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    lines = [
        f"### Time\n\n{first['threads']} threads, {first['cpus']} CPU cores ({first['backend']}), prompt of {first['context']} "
        f"tokens, batch 1, medians of {first['rounds']} rounds in turns.\n",
        "| | skipped | tokens/s | times unpruned | expert time saved | choosing, share of the time |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['table'].removeprefix('speed, ')}, {row['row']} | {100 * row['skipped_share']:.1f} % | {row['tokens_per_s']:.2f} "
            f"| {row['times_unpruned']:.3f} | {100 * row['expert_time_saved']:.1f} % "
            f"| {100 * row['choosing_s'] * row['tokens_per_s'] / row['tokens']:.1f} % |"
        )
    return [*lines, ""]


MARK = "<!-- below this line: written by benchmarks/pruning.py --docs -->"

if __name__ == "__main__":
    main()
