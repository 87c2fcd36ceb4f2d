# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks of lm-eval on a loaded model, packed or not; the sets that the papers report, by one name.

Knows lm-eval (extra `eval`) and how it finds data; the model is handed to its `HFLM` as it is.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers_mcmoe.evaluation.protocol import dtype_of, evaluating, seed_of
from transformers_mcmoe.evaluation.record import machine
from transformers_mcmoe.version import versions

TASKS = Path(__file__).parent / "tasks"
PAPER = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mathqa", "mmlu")
# group -> tasks with their shots; None is the task's own number
GROUPS: dict[str, tuple[tuple[str, int | None], ...]] = {
    # table 4 of arXiv 2410.06270: eight sets without examples, and MMLU with five
    "paper": (*((task, 0) for task in PAPER), ("mmlu", 5)),
    "hard": (("gsm8k", None), ("humaneval_pass_at_10", None), ("longbench", None)),
}
UNSAFE = "humaneval"


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    data: str | Path | None = None,
    allow_code: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Run tasks of lm-eval.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks and groups, and "paper" or "hard".
        shots: examples before each question, for all tasks; default a group's or the task's own.
        limit: questions per task; default all. A figure with a limit says so.
        batch: questions at a time.
        data: folder with local data sets, DATA/org/name for the Hub's org/name, as `hf download org/name --repo-type dataset
            --local-dir DATA/org/name` writes them; what is not there comes from the Hub.
        allow_code: run programs that the model writes (HumanEval).
        seed: of examples and of sampling.

    Returns:
        JSON-serialisable, by "task, n-shot": `metrics` with `value` and `stderr`, `questions`, `shots`, `subtasks` for groups,
        and the protocol, seed and versions.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task is unknown, or has to run programs without leave.
        OSError: a task's data cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("Benchmark tasks need lm-eval; pip install transformers-mcmoe[eval].") from error
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"The task data '{data}' is no folder; give one with data sets in it as DATA/org/name.")
    asked = [pair for name in tasks for pair in GROUPS.get(name, ((name, None),))]
    manager = _manager(TaskManager)
    unknown = [name for name, _ in asked if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists them all.")
    if not allow_code and any(name.startswith(UNSAFE) for name, _ in asked):
        raise ValueError(
            "HumanEval runs programs that the model writes; allow it (allow_code=True, --allow-code) or leave it out."
        )
    found: dict[str, Any] = {}
    with evaluating(model), _inside(data):
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        for name, own_shots in asked:
            wanted = own_shots if shots is None else shots
            try:
                result = simple_evaluate(
                    own,
                    tasks=[name],
                    num_fewshot=wanted,
                    limit=limit,
                    log_samples=False,
                    bootstrap_iters=1000,
                    task_manager=manager,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    confirm_run_unsafe_code=allow_code,
                )
            except ImportError as error:
                raise ImportError(f"Task '{name}' needs further packages: {' '.join(str(error).split())}") from error
            except (ConnectionError, FileNotFoundError, OSError) as error:
                raise OSError(
                    f"The data of task '{name}' cannot be read ({type(error).__name__}); go online, or put it into a folder "
                    "of local data sets (data=, --task-data)."
                ) from error
            row = _row(name, result)
            protocol = {"limit": limit, "batch": batch, "dtype": dtype_of(model), "task_seed": seed}
            about = {"protocol": protocol, "seed": seed_of(model), "machine": machine()}
            libraries = {"versions": versions() | {"lm_eval": version("lm_eval")}}
            found[f"{name}, {row['shots']}-shot"] = row | about | libraries
    return found


@functools.cache
def _manager(kind: Any) -> Any:
    """lm-eval's index of tasks, with ours; making it takes seconds."""
    return kind(include_path=str(TASKS))


@contextlib.contextmanager
def _inside(data: str | Path | None) -> Iterator[None]:
    """While open, a folder is the current one: `datasets` takes a local folder "org/name" before the Hub's data set."""
    if data is None:
        yield
        return
    before = Path.cwd()
    os.chdir(data)
    try:
        yield
    finally:
        os.chdir(before)


def _row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval found of one task or group."""
    table = {**result["results"], **result.get("groups", {})}
    subtasks = sorted(set(table) - {name})
    if name not in table:  # a tag: lm-eval gives its tasks and no mean of them
        raise ValueError(f"'{name}' is a tag of lm-eval; name one of its tasks: {', '.join(subtasks)}.")
    samples = result.get("n-samples", {})
    leaves = [task for task in (subtasks or [name]) if task in samples]
    shots = {result["n-shot"][task] for task in leaves if task in result.get("n-shot", {})}
    row = {
        "metrics": _metrics(table[name]),
        "questions": sum(samples[task]["effective"] for task in leaves),
        "shots": shots.pop() if len(shots) == 1 else "mixed",
        "task_version": result.get("versions", {}).get(name),
    }
    if subtasks:
        row["subtasks"] = {task: _metrics(table[task]) for task in subtasks}
    return row


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, which = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{which}")
            name = metric if which == "none" else f"{metric} ({which})"
            found[name] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return found
