# SPDX-License-Identifier: Apache-2.0
"""Packed models on the Hub, over real HTTP to a local stand-in: upload in both modes, download, revisions, failures, cuts.

`test_hub` runs this file in a process of its own: the Hub's client reads its address when it is imported.
"""

import json
import os
import re
import shutil
from pathlib import Path

import mini_hub

os.environ["HF_ENDPOINT"] = mini_hub.start().url
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MCMOE_RETRY_SECONDS"] = "0.05"

import pytest
import torch
import yaml
from example_data import EXAMPLES, take_few_documents
from tiny import compressed, save_dense, save_text, save_tokenizer, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_mcmoe import compression_report
from transformers_mcmoe.cli import app

HUB = mini_hub.start()
README = "---\nlicense: cc-by-4.0\nlanguage: en\npipeline_tag: text-generation\n---\n# A dense model\n"


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", mini_hub.TOKEN)
    HUB.reset()
    HUB.repositories["tester/dense"] = []
    HUB.commit("tester/dense", {"README.md": README.encode(), "config.json": b"{}"})
    return HUB


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folder of a packed model."""
    folder = tmp_path_factory.mktemp("hub")
    compressed(save_dense("mixtral", folder / "dense")).save_pretrained(folder / "packed")
    return folder / "packed"


def _push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


@pytest.mark.parametrize("mode", ["lfs", "regular"])
def test_push_and_load(tmp_path, hub, mode):
    hub.mode = mode
    model = compressed(save_dense("mixtral", tmp_path / "dense"))
    model.push_to_hub("packed", base_model="tester/dense", tags=["tiny"])
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="tester/saved")
    for name in ("tester/packed", "tester/saved"):
        again = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        ids = tokens(2, 16, seed=1)
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert compression_report(again) == compression_report(model)
        again.save_pretrained(tmp_path / "saved-again")
    assert any(path.startswith("/lfs/") for _, path in hub.requests) == (mode == "lfs")
    for name in ("tester/packed", "tester/saved"):
        files = hub.files(name)
        assert {"config.json", "model.safetensors", "mcmoe_report.json", "README.md"} <= set(files)
        assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "mcmoe"
    report = json.loads((tmp_path / "saved-again" / "mcmoe_report.json").read_text())
    assert report == json.loads(files["mcmoe_report.json"])
    assert str(tmp_path) not in json.dumps(report)
    card = hub.files("tester/packed")["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == "tester/dense"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "cc-by-4.0"
    assert data["library_name"] == "transformers"
    assert {"mcmoe", "tiny"} <= set(data["tags"])
    assert "model-index" not in data  # nothing was measured
    assert 'from_pretrained("tester/packed")' in card
    assert "Nothing has been measured" in card
    for path in re.findall(r"\]\((figures/[^)]+)\)", card):
        assert hub.files("tester/packed")[path].startswith(b"\x89PNG")
    assert str(tmp_path) not in card


def test_second_push_replaces_the_weights_and_a_branch_is_made(tmp_path, hub, packed):
    assert _push(packed, "tester/again").exit_code == 0
    hub.commit(
        "tester/again", hub.files("tester/again") | {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    )
    done = _push(packed, "tester/again", "--revision", "new", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == hub.at("tester/again", "new")[0]
    files = set(hub.files("tester/again"))
    assert {"notes.txt", "model.safetensors"} <= files
    assert "model-00001-of-00002.safetensors" not in files


def test_a_revision_is_downloaded(tmp_path, hub, packed):
    assert _push(packed, "tester/old").exit_code == 0
    commit = hub.repositories["tester/old"][-1][0]
    hub.commit("tester/old", {"config.json": b"broken"})
    model = AutoModelForCausalLM.from_pretrained("tester/old", revision=commit)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert compression_report(model) == json.loads((packed / "mcmoe_report.json").read_text())
    with pytest.raises(OSError, match="not a valid git identifier"):
        AutoModelForCausalLM.from_pretrained("tester/old", revision="0" * 40)


@pytest.mark.parametrize("kind", ["lfs", "commit"])
def test_a_cut_connection_is_tried_again(tmp_path, hub, packed, kind):
    hub.cut[kind] = 2
    done = _push(packed, "tester/cut")
    assert done.exit_code == 0, done.stderr
    assert hub.cut[kind] == 0
    assert hub.files("tester/cut")["model.safetensors"] == (packed / "model.safetensors").read_bytes()
    uploads = [path for _, path in hub.requests if path.startswith("/lfs/")]
    # after a cut commit nothing large is sent again
    assert len(uploads) == len(set(uploads)) + (2 if kind == "lfs" else 0)


def test_a_connection_that_stays_cut(tmp_path, hub, packed):
    hub.cut["commit"] = 99
    done = _push(packed, "tester/cut")
    assert done.exit_code == 1
    assert "The connection to the Hub failed 4 times" in done.stderr
    assert "Traceback" not in done.stderr
    hub.cut["commit"] = 0
    assert _push(packed, "tester/cut").exit_code == 0
    uploads = [path for _, path in hub.requests if path.startswith("/lfs/")]
    assert len(uploads) == len(set(uploads))


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["tester/none"], "", "without a valid token"),
        (["tester/none"], "hf_wrong", "without a valid token"),
        (["a/b/c"], mini_hub.TOKEN, "a/b/c"),
        (["tester/none", "--license", "mine"], mini_hub.TOKEN, "license must be one of"),
        (["tester/none", "--create-pr", "--revision", "nothing"], mini_hub.TOKEN, "no such branch"),
    ],
)
def test_refusals_are_one_sentence(packed, monkeypatch, arguments, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    done = _push(packed, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr


def test_no_network(hub, packed):
    hub.cut["any"] = 99
    done = _push(packed, "tester/none")
    assert done.exit_code == 1
    assert "The connection to the Hub failed 4 times" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_repository():
    done = CliRunner().invoke(app, ["generate", "tester/nothing", "text"])
    assert done.exit_code == 1
    assert "the Hub gives out no model of that name" in done.stderr
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("tester/nothing")


def test_what_is_no_packed_model(tmp_path, hub, packed):
    for folder in (tmp_path, packed.parent / "dense"):
        done = _push(folder, "tester/none")
        assert done.exit_code == 1
        assert "holds no packed model" in done.stderr
    assert "There is no folder" in _push(tmp_path / "missing", "tester/none").stderr
    assert "tester/none" not in hub.repositories


def test_a_card_of_the_users_own_stays(tmp_path, hub, packed):
    shutil.copytree(packed, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    done = _push(tmp_path / "mine", "tester/mine")
    assert done.exit_code == 0, done.stderr
    assert hub.files("tester/mine")["README.md"].decode().endswith("Mine.\n")
    assert Path(packed / "README.md").exists() is False


def test_no_folder_of_this_machine_and_no_old_figures_get_out(tmp_path, hub):
    save_dense("mixtral", tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    save_text(tmp_path / "text.txt")
    options = ["--bits", "3", "--dataset", tmp_path / "text.txt", "--num-samples", "8", "--seq-len", "32"]
    command = ["compress", tmp_path / "dense", "--output", tmp_path / "out", *options, "--rounding", "nearest"]
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0
    (tmp_path / "out" / "mcmoe_evaluation.json").write_text(
        '{"record_version": 1, "checkpoint": "another", "text": {}}'
    )
    assert _push(tmp_path / "out", "tester/shared").exit_code == 0
    files = hub.files("tester/shared")
    assert "mcmoe_evaluation.json" not in files
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []
    assert json.loads(files["config.json"])["quantization_config"]["dataset"] == "text.txt"
    assert "--dataset text.txt" in files["README.md"].decode()


def test_the_example(hub, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    take_few_documents(monkeypatch)
    import push_to_hub

    assert "/tester/demo/commit/" in push_to_hub.main("tester/demo", samples=8)
    card = hub.files("tester/demo")["README.md"].decode()
    assert re.search(r"On Python documentation, held out: [\d,]+ tokens, windows of 256", card)
    assert mini_hub.metadata_errors(card) == []
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["license"] == "apache-2.0"  # from the dense model's own card
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] > 40
