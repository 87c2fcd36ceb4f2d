# SPDX-License-Identifier: Apache-2.0
"""Run by `test_distributed`, by itself and under torchrun: compresses tiny models and writes down what came out.

python ranks.py FOLDER CASE...
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import compressed, quick_config, save_dense, tokens

from transformers_mcmoe import compression_report
from transformers_mcmoe.distributed import launched, world
from transformers_mcmoe.models import stream
from transformers_mcmoe.pipeline.journal import Journal

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("mixtral", {}),
    "a budget per layer": ("mixtral", {"budget": "layer"}),
    "paper": ("mixtral", {"preset": "paper", "bits": 2.54}),
    "hessian": ("mixtral", {"allocation": "hessian"}),
    "data-free": ("mixtral", {"rounding": "nearest", "eps": "final", "budget": "layer"}),
    "blocks": ("mixtral", {"allocation": "bsp", "expert_bits": (2, 4)}),
    "shared expert": ("qwen2_moe", {}),
    "groups": ("deepseek_v3", {}),
    "factors": ("mixtral", {"rank": {"mean": 32, "base": True}, "bits": 7.5}),
    "dropped": ("mixtral", {"prune": 0.25, "bits": 2.2}),
    "tuned": ("mixtral", {"tuning_steps": 2}),
    "joint": ("mixtral", {"prune": "auto", "rank": "auto", "bits": 2.6, "dataset": tokens(16, 32), "num_samples": 16}),
    "loaded whole": ("mixtral", {}),
}


def told(model: Any) -> dict[str, Any]:
    """Hashes of a model's tensors, and its report without times."""
    report = {name: value for name, value in compression_report(model).items() if name != "seconds"}
    hashes = {
        name: hashlib.sha256(x.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, x in model.state_dict().items()
    }
    return {"tensors": hashes, "report": json.loads(json.dumps(report))}


def refuse(*args: Any, **kwargs: Any) -> None:
    raise stream.NotStreamable("a test")


def killed_after(records: int) -> None:
    """The last rank is killed once so many layers are finished."""
    write, count = Journal.write, 0

    def counted(self: Journal, *args: Any) -> None:
        nonlocal count
        if count == records and self._world.rank == self._world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        write(self, *args)

    Journal.write = counted  # type: ignore[method-assign]


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    ranks = world(launched())
    found = {}
    for name in names:
        family, changes = CASES[name]
        dense, work = folder / family, folder / f"{name} {ranks.size}"
        ranks.first(lambda: dense.exists() or save_dense(family, dense))  # noqa: B023
        streamed = stream.LayerStream
        if name == "loaded whole":
            stream.LayerStream = refuse  # type: ignore[assignment,misc]
        if "KILLED" in os.environ:
            killed_after(int(os.environ["KILLED"]))
        if "WORK" in os.environ:
            work = Path(os.environ["WORK"])
        model = compressed(
            dense, quick_config(**changes, work_dir=work, resume="WORK" in os.environ, world_size=ranks.size)
        )
        stream.LayerStream = streamed  # type: ignore[misc]
        found[name] = told(model)
        everywhere = ranks.gather(found[name])
        assert all(other == found[name] for other in everywhere)
    if ranks.leads:
        (folder / f"found {ranks.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
