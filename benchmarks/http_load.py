# SPDX-License-Identifier: Apache-2.0
"""OpenAI-compatible servers as processes, and clients that ask them over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp

# what vLLM wants of a small machine without a GPU
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(command: Sequence[str], port: int, log: Path, timeout: float = 600, health: bool = True) -> Iterator[Any]:
    """A server's process, from when it answers on its port.

    Args:
        command: starts it.
        port: it listens there.
        log: file for what it prints.
        timeout: seconds until it must answer.
        health: wait for an answer.

    Raises:
        RuntimeError: it has ended, or does not answer in time.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | SETTINGS
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            begun = time.monotonic()
            while health:
                try:
                    with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                        if answer.status == 200:
                            break
                except OSError:
                    pass
                if server.poll() is not None or time.monotonic() - begun > timeout:
                    raise RuntimeError(f"The server does not answer:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield server
        finally:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(server.pid, sent)
                    server.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


@dataclass
class Load:
    """What clients saw.

    Attributes:
        answers: (prompt, text) of every request that was answered.
        tokens: new ones.
        errors: of requests that failed.
        seconds: from the first request to the last answer.
    """

    answers: list[tuple[int, str]] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def ask(
    port: int, model: str, prompts: Sequence[str], clients: int, seconds: float, new_tokens: int, whole: bool = True
) -> Load:
    """So many clients, each with one request after the other until time is over; every one gets its answer.

    Args:
        port: of the server.
        model: as it is named there.
        prompts: asked in turn.
        clients: at once.
        seconds: no request begins later.
        new_tokens: of every answer.
        whole: answers do not end at the model's own end; vLLM alone can be asked for that.
    """
    options = {"model": model, "max_tokens": new_tokens, "temperature": 0} | ({"ignore_eos": True} if whole else {})
    return asyncio.run(_ask(port, prompts, clients, seconds, options))


async def _ask(port: int, prompts: Sequence[str], clients: int, seconds: float, options: dict[str, Any]) -> Load:
    load, begun, asked = Load(), time.monotonic(), 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal asked
        while time.monotonic() - begun < seconds:
            which, asked = asked % len(prompts), asked + 1
            try:
                async with session.post("/v1/completions", json=options | {"prompt": prompts[which]}) as answer:
                    answer.raise_for_status()
                    found = await answer.json()
                load.answers.append((which, found["choices"][0]["text"]))
                load.tokens += found["usage"]["completion_tokens"]
            except (aiohttp.ClientError, TimeoutError, KeyError, json.JSONDecodeError) as error:
                load.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    patient = aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=patient) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    load.seconds = time.monotonic() - begun
    return load
