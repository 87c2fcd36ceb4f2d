# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: fixed seeds, no progress bars, no network."""

import gc
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start: one worker per core is running
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; test_hub starts its own server in a subprocess

import pytest
import torch
import transformers
from tiny import save_dense

import transformers_mcmoe  # noqa: F401

# what the libraries hold is not searched for garbage after every layer: a third of a tiny compression's time
gc.freeze()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny dense Mixtral's folder."""
    return save_dense("mixtral", tmp_path_factory.mktemp("mixtral") / "dense")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # models are tiny: a second thread only waits
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def table_of_models():
    """Keeps a row on a family that passed, where a file for it is given (benchmarks/models.py does)."""

    def write(**row):
        path = os.environ.get("MCMOE_MODELS")
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return write


# they take minutes: begun last, one of them would run alone at the end
SLOWEST = (
    "test_examples.py",
    "test_triton.py",
    "test_hub.py",
    "test_end_to_end.py",
    "test_benchmarks.py",
    "test_kernels.py",
    "test_fresh_process.py",
    "test_serve.py",
)


def pytest_collection_modifyitems(items):
    names = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: names.get(item.path.name, len(names)))
