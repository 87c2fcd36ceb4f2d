# SPDX-License-Identifier: Apache-2.0
"""What documentation and cards say can be found: links, commands and options, families, metadata."""

import re
import shlex
from pathlib import Path

import mini_hub
import pytest
import typer
import yaml
from tiny import TINY

from transformers_mcmoe.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    """Every `mcmoe` that stands in a block or in backticks has the options that it is given."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(mcmoe [^`]+)`", text)
    commands = typer.main.get_command(app).commands
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words or words[0] != "mcmoe" or words[1].startswith("-"):
            continue
        options = {
            name for parameter in commands[words[1]].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= options, line


def test_every_family_is_in_the_table():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) - {"model_type"} == set(TINY)


def test_there_are_cards():
    assert len(CARDS) >= 2


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_cards(card):
    text = card.read_text(encoding="utf-8")
    assert mini_hub.metadata_errors(text) == []
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["license"] == "apache-2.0"
    results = data["model-index"][0]["results"][0]["metrics"]
    perplexity = next(metric["value"] for metric in results if metric["type"] == "perplexity")
    assert f"| perplexity | {perplexity:.3f} |" in text
    # the command is one that can be run
    words = shlex.split(re.search(r"^mcmoe compress .*$", text, re.MULTILINE)[0])
    typer.main.get_command(app).commands["compress"].make_context("compress", words[2:])
