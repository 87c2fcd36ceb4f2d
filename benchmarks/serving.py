# SPDX-License-Identifier: Apache-2.0
"""Requests and tokens per second of servers: vLLM with a packed and with the dense model, and `mcmoe serve`, over real HTTP.

python benchmarks/serving.py --model DENSE --packed PACKED --text TEXT --venv .venv-vllm
python benchmarks/serving.py --docs

Servers are started one after the other, in as many rounds as asked for; rows are medians. Each request has a prompt of so many words
of the text and an answer of so many tokens; clients ask again as soon as they are answered.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from http_load import Load, ask, free_port, running
from machine import here
from pages import replace_part

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
CLIENTS = (1, 4, 16)
SERVERS = ("vLLM, dense", "vLLM, packed", "mcmoe serve, packed")


def command(server: str, model: Path, port: int, options: argparse.Namespace) -> list[str]:
    """What starts a server."""
    if server.startswith("mcmoe"):
        start = [sys.executable, "-m", "transformers_mcmoe", "serve", str(model), "--host", "127.0.0.1"]
        return [*start, "--port", str(port), "--dtype", options.dtype, "--continuous-batching"]
    start = [str(options.venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    start += ["--port", str(port), "--dtype", options.dtype, "--max-model-len", "1024", "--max-num-seqs", "16"]
    return start + ["--no-enable-prefix-caching"] + (["--enforce-eager"] if options.eager else [])


def measure(server: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One server under all numbers of clients."""
    model = options.model if server.endswith("dense") else options.packed
    words = options.text.read_text(encoding="utf-8").split()
    size = options.prompt
    prompts = [" ".join(words[n * size : (n + 1) * size]) for n in range(64)]
    port, rows, whole = free_port(), list[dict[str, Any]](), server.startswith("vLLM")
    with (
        tempfile.TemporaryDirectory() as folder,
        running(command(server, model, port, options), port, Path(folder) / "log"),
    ):
        ask(port, str(model), prompts, 1, 0.1, options.new, whole)  # the first request warms up
        for clients in CLIENTS:
            load: Load = ask(port, str(model), prompts, clients, options.seconds, options.new, whole)
            if load.errors:
                print(f"{server}, {clients} clients: {len(load.errors)} errors, the first: {load.errors[0]}")
            row = {
                "model": options.model.name,
                "server": server,
                "clients": clients,
                "requests_per_second": round(len(load.answers) / load.seconds, 3),
                "tokens_per_second": round(load.tokens / load.seconds, 2),
                "errors": len(load.errors),
                "prompt_words": size,
                "new_tokens": options.new,
                "dtype": options.dtype,
                "eager": options.eager,
            }
            rows.append(row)
    return rows


def write_docs() -> None:
    """The newest row of each kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(r["model"], r["server"], r["clients"]): r for r in rows}
    lines: list[str] = []
    for model in dict.fromkeys(key[0] for key in newest):
        own = {key[1:]: row for key, row in newest.items() if key[0] == model}
        one = next(iter(own.values()))
        lines += [
            f"{model}, {one['dtype']}, prompts of {one['prompt_words']} words, {one['new_tokens']} new tokens, medians of {one['rounds']} round{'s' * (one['rounds'] > 1)} in turns; "
            f"{one['processor']}, {one['cpus']} cores, load {one['load']}, {one['date']}; vLLM 0.32{' without torch.compile' if one['eager'] else ''}.",
            "",
            "| server | " + " | ".join(f"{n} client{'s' * (n > 1)}" for n in CLIENTS) + " |",
            "|---" * (1 + len(CLIENTS)) + "|",
        ]
        for server in SERVERS:
            cells = [own.get((server, n)) for n in CLIENTS]
            if any(cells):
                told = [
                    f"{c['tokens_per_second']:.1f} tokens/s, {c['requests_per_second']:.2f} requests/s" if c else ""
                    for c in cells
                ]
                lines.append(f"| {server} | " + " | ".join(told) + " |")
        lines.append("")
    replace_part("serving.md", "serving", lines[:-1])


def main() -> None:
    """Append the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="dense model")
    parser.add_argument("--packed", type=Path, help="the same, packed")
    parser.add_argument("--text", type=Path, help="prompts are cut from it")
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="environment with vLLM")
    parser.add_argument("--servers", nargs="*", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--seconds", type=float, default=20, help="of each number of clients")
    parser.add_argument("--prompt", type=int, default=64, help="words of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="write docs/serving.md's table from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    rounds = [row for _ in range(options.rounds) for server in options.servers for row in measure(server, options)]
    for server in options.servers:
        for clients in CLIENTS:
            own = [r for r in rounds if (r["server"], r["clients"]) == (server, clients)]
            middle = {
                name: statistics.median(r[name] for r in own) for name in ("requests_per_second", "tokens_per_second")
            }
            row = own[0] | middle | {"errors": sum(r["errors"] for r in own), "rounds": options.rounds} | here()
            print(json.dumps(row), flush=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
