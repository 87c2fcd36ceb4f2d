# SPDX-License-Identifier: Apache-2.0
"""Runs `hub_scenes` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_scenes(tmp_path):
    scenes = Path(__file__).parent / "hub_scenes.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        str(scenes),
    ]
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(scenes.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scenes.parent)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
