# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same bytes as one, work that is dealt evenly, and a rank that is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES
from tiny import save_dense, save_text, save_tokenizer

from transformers_mcmoe.distributed import World

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
QUICK = ("default", "shared expert")


def torchrun(*arguments: object, size: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """Run something with several processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [*command, *map(str, arguments)], env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600
    )


def both(folder: Path, names: tuple[str, ...], size: int = 2, threads: int = 1) -> tuple[dict, dict]:
    """What one process and several came to, with so many threads each."""
    script = Path(__file__).parent / "ranks.py"
    own = {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, str(script), str(folder), *names], env=ENVIRONMENT | own, check=True, timeout=600)
    found = torchrun(script, folder, *names, size=size, **own)
    assert found.returncode == 0, found.stderr[-4000:]
    one, several = (json.loads((folder / f"found {n}.json").read_text()) for n in (1, size))
    return one, several


def check_same(one: dict, several: dict) -> None:
    for name in one:
        assert several[name]["tensors"] == one[name]["tensors"], name
        assert several[name]["report"] == one[name]["report"], name


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_write_what_one_writes(threads, tmp_path):
    check_same(*both(tmp_path, QUICK, threads=threads))


@pytest.mark.slow
def test_two_processes_write_what_one_writes_in_every_mode(tmp_path):
    check_same(*both(tmp_path, tuple(name for name in CASES if name not in QUICK)))


@pytest.mark.slow
def test_more_processes_than_experts(tmp_path):
    check_same(*both(tmp_path, ("default",), size=9))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_a_lost_rank_ends_the_run_and_it_goes_on_with_another_number(size, tmp_path):
    script = Path(__file__).parent / "ranks.py"
    subprocess.run([sys.executable, str(script), str(tmp_path), "default"], env=ENVIRONMENT, check=True, timeout=600)
    work = tmp_path / "work"
    lost = torchrun(script, tmp_path, "default", KILLED="3", WORK=str(work))
    assert lost.returncode != 0
    assert "Another of the 2 processes has ended" in lost.stderr
    finished = sorted(file.name for file in (work / "records").iterdir())
    assert finished == [f"{name}.safetensors" for name in ("allocate-00000", "allocate-00001", "layers-00000", "plan")]
    resumed = torchrun(script, tmp_path, "default", size=size, WORK=str(work))
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    whole = json.loads((tmp_path / "found 1.json").read_text())
    check_same(whole, json.loads((tmp_path / f"found {size}.json").read_text()))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny checkpoint with a tokenizer, and calibration text."""
    folder = tmp_path_factory.mktemp("dense")
    save_dense("mixtral", folder / "dense")
    save_tokenizer(folder / "dense")
    save_text(folder / "text.txt")
    return folder


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    options = ["--bits", "3.0", "--dataset", str(folder / "text.txt"), "--num-samples", "16", "--seq-len", "32"]
    return ["-m", "transformers_mcmoe", "compress", str(folder / "dense"), "--output", str(output), *options, *more]


@pytest.mark.slow
def test_command(dense, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *arguments(dense, one)], env=ENVIRONMENT, check=True, timeout=600)
    found = torchrun("--no-python", sys.executable, *arguments(dense, two, "--world-size", "2"))
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stderr.count("2 processes share the work.") == 1
    assert found.stdout.count("average bits") == 1
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    refused = torchrun("--no-python", sys.executable, *arguments(dense, tmp_path / "out", "--world-size", "4"))
    assert refused.returncode != 0
    assert "world_size=4 was asked for, but 2 processes run" in " ".join(refused.stderr.split())
    foreign = torchrun("--no-python", sys.executable, *arguments(dense, dense))
    assert foreign.returncode != 0
    assert "holds no compressed model" in " ".join(foreign.stderr.split())


@pytest.mark.slow
def test_one_process_where_more_were_asked_for(dense, tmp_path):
    command = [sys.executable, *arguments(dense, tmp_path / "out", "--world-size", "2")]
    found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 1
    assert "world_size=2 was asked for, but 1 process runs" in " ".join(found.stderr.split())


class TestDeal:
    def test_every_item_is_dealt_once_and_evenly(self):
        costs = [float(n % 7 + 1) for n in range(30)]
        parts = [World(rank, 4).deal(range(30), costs) for rank in range(4)]
        assert sorted(n for part in parts for n in part) == list(range(30))
        loads = [sum(costs[n] for n in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs)
        assert all(part == sorted(part) for part in parts)

    def test_fewer_items_than_ranks(self):
        parts = [World(rank, 4).deal(["a", "b"]) for rank in range(4)]
        assert parts == [["a"], ["b"], [], []]

    def test_one_process(self):
        assert World().deal([3, 1, 2], [1.0, 9.0, 2.0]) == [3, 1, 2]


def test_a_single_process_hands_itself_what_it_has():
    alone, x = World(), torch.arange(3)
    assert alone.gather(1) == [1]
    assert alone.merge({"a": 1}) == {"a": 1}
    assert alone.first(lambda: 2) == 2
    assert alone.union({"a": x})["a"] is x
    assert alone.share(x, 0) is x
    alone.agree(None)
    with pytest.raises(ValueError, match="wrong"):
        alone.agree("wrong")
    assert alone.device(None) == torch.device("cpu")
