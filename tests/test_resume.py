# SPDX-License-Identifier: Apache-2.0
"""A run that was killed goes on where it was, to the same bytes: at every point where something becomes finished."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, compressed, quick_config, save_dense, tiny_model, tokens

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.models import stream
from transformers_mcmoe.models.stream import LayerStream, NotStreamable
from transformers_mcmoe.pipeline.rounding import ExpertRounder
from transformers_mcmoe.workdir import WorkDir

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "a budget per layer": {"budget": "layer"},
    "paper": {"preset": "paper", "bits": 2.54},
    "data-free": {"rounding": "nearest", "allocation": "uniform"},
    "uniform": {"allocation": "uniform"},
    "blocks": {"allocation": "bsp", "expert_bits": (2, 4)},
    "tuned": {"tuning_steps": 2},
    "dropped": {"prune": 0.25, "bits": 2.2},
    "factors": {"rank": {"mean": 32, "base": True}, "bits": 7.5},
    "gpt_oss": {},
    "deepseek_v3": {"rank": "auto", "bits": 3.4},
    "joint": {"prune": "auto", "rank": "auto", "bits": 2.6, "num_samples": 16, "dataset": tokens(16, 32)},
}
# points at which a run is killed, as shares of all
SOME = (0.3, 0.55, 0.9)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "default"]


class Killed(BaseException):
    """The process ends."""


def compress(folder: Path, config: MCMoEConfig, monkeypatch: Any, most: int | None = None) -> tuple[Any, int]:
    """The model, and how often something became finished on the way; with `most` the run is killed at that point.

    Nothing is cleaned up behind a run that is killed.
    """
    count, model = 0, None
    replace = os.replace

    def counted(source: Any, target: Any) -> None:
        nonlocal count
        if count == most:
            raise Killed
        count += 1
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", counted)
        if most is None:
            model = compressed(folder, config)
        else:
            patched.setattr(WorkDir, "clean", lambda self, finished=False: None)
            with pytest.raises(Killed):
                compressed(folder, config)
    return model, count


def told(model: Any, work: Path) -> tuple[dict[str, bytes], dict[str, Any], dict[str, torch.Tensor]]:
    """What a compression wrote, its report without times, and the model's tensors."""
    report = {name: value for name, value in compression_report(model).items() if name not in ("seconds", "created")}
    return (
        {file.name: file.read_bytes() for file in work.glob("*.safetensors")},
        report,
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def same(a: Any, b: Any) -> bool:
    return a[:2] == b[:2] and all(torch.equal(x, b[2][name]) for name, x in a[2].items())


@pytest.mark.parametrize("name", ["default", pytest.param("every point", marks=pytest.mark.slow), *SLOW])
def test_a_killed_run_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    folder = save_dense(name if name in TINY else "mixtral", tmp_path / "dense")
    made = lambda **more: quick_config(**CONFIGS.get(name, {}) | more)  # noqa: E731
    model, points = compress(folder, made(work_dir=tmp_path / "whole"), monkeypatch)
    whole = told(model, tmp_path / "whole")
    assert points > 4
    some = sorted({int(share * points) for share in SOME})
    for point in range(points) if name == "every point" else some[-1:] if name == "tuned" else some:
        work = tmp_path / f"work{point}"
        compress(folder, made(work_dir=work), monkeypatch, point)
        resumed = compressed(folder, made(work_dir=work, resume=True))
        assert same(told(resumed, work), whole), point
        assert sorted(f.name for f in work.iterdir()) == sorted(f.name for f in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize("name", ["default", pytest.param("joint", marks=pytest.mark.slow)])
def test_finished_layers_are_not_rounded_again(name, tmp_path, monkeypatch):
    folder = save_dense("mixtral", tmp_path / "dense")
    model = compressed(folder, quick_config(**CONFIGS[name], work_dir=tmp_path / "work"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something is done again")

    monkeypatch.setattr(ExpertRounder, "__init__", refuse)
    monkeypatch.setattr(LayerStream, "advance", refuse)
    again = compressed(folder, quick_config(**CONFIGS[name], work_dir=tmp_path / "work", resume=True))
    ids = tokens(2, 24)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    mine, others = compression_report(again), compression_report(model)
    assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in others.items() if k != "seconds"}
    for stage in ("allocate", "quantize"):  # of both runs together
        assert mine["seconds"][stage] >= 0.5 * others["seconds"][stage]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95])
def test_what_two_plans_are_compared_by_is_not_done_again(share, tmp_path, monkeypatch):
    """A run that is killed behind the first of two roundings goes on behind it."""
    folder, config = save_dense("mixtral", tmp_path / "dense"), CONFIGS["joint"]
    _, points = compress(folder, quick_config(**config, work_dir=tmp_path / "whole"), monkeypatch)
    work = tmp_path / "work"
    compress(folder, quick_config(**config, work_dir=work), monkeypatch, int(share * points))
    finished = {file.name: file.stat().st_mtime_ns for file in (work / "records").glob("*.safetensors")}
    compressed(folder, quick_config(**config, work_dir=work, resume=True))
    assert finished
    assert all((work / "records" / name).stat().st_mtime_ns == time for name, time in finished.items())


@pytest.mark.slow
def test_models_that_are_loaded_whole_go_on_too(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotStreamable("a test")

    monkeypatch.setattr(stream, "LayerStream", refuse)
    folder = save_dense("mixtral", tmp_path / "dense")
    model, points = compress(folder, quick_config(work_dir=tmp_path / "whole"), monkeypatch)
    whole = told(model, tmp_path / "whole")
    for point in range(1, points):
        work = tmp_path / f"work{point}"
        compress(folder, quick_config(work_dir=work), monkeypatch, point)
        resumed = compressed(folder, quick_config(work_dir=work, resume=True))
        assert same(told(resumed, work), whole), point


def test_a_layer_whose_file_is_gone_is_done_again(tmp_path):
    folder = save_dense("mixtral", tmp_path / "dense")
    work = tmp_path / "work"
    whole = told(compressed(folder, quick_config(work_dir=work)), work)
    (work / "layer-00001.safetensors").unlink()
    assert same(told(compressed(folder, quick_config(work_dir=work, resume=True)), work), whole)


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match=r"resume=True is not valid.*work_dir"):
        MCMoEConfig(resume=True)


def test_another_compression_is_refused(tmp_path):
    folder = save_dense("mixtral", tmp_path / "dense")
    work = tmp_path / "work"
    compressed(folder, quick_config(work_dir=work))
    for changed, what in (({"seed": 1}, "config"), ({"dataset": tokens(8, 24)}, "dataset")):
        with pytest.raises(ValueError, match=f"work_dir '.*work' holds a compression of another {what};"):
            compressed(folder, quick_config(work_dir=work, resume=True, **changed))
    changed_model = tiny_model("mixtral")
    changed_model.model.norm.weight.data.mul_(2)
    changed_model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="of another checkpoint;"):
        compressed(tmp_path / "other", quick_config(work_dir=work, resume=True))
