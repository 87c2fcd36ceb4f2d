# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: calibration with images, compression, saving and loading; samples of every kind and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors import safe_open
from tiny import compressed as compressed_text
from tiny import families, quick_config, relative_rms, save_dense, tokens
from tiny_vlm import IMAGE, VLMS, Processor, picture, samples, save_vlm, vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from transformers_mcmoe import MCMoEConfig, ODPConfig, compression_report, expert_pruning_stats, set_expert_pruning
from transformers_mcmoe.calibration.images import calibration_sequences
from transformers_mcmoe.evaluation import evaluate_samples
from transformers_mcmoe.models import stream
from transformers_mcmoe.models.names import CheckpointNames
from transformers_mcmoe.models.stream import Checkpoint, LayerStream, computing, open_runner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.nn import PackedLinear
from transformers_mcmoe.routing import attached

FAMILIES = families(VLMS, ["qwen3_vl_moe", "ernie4_5_vl_moe"])


def sequences(family: str, count: int = 4) -> Any:
    return calibration_sequences(
        vlm(family), samples(count), None, processor=Processor(family), num_samples=count, seq_len=64, seed=0
    )


def image_config(family: str, **changes: Any) -> MCMoEConfig:
    given = {"dataset": samples(8), "processor": Processor(family), "num_samples": 8, "seq_len": 64}
    return quick_config(**given | changes)


def compressed(folder: Path, config: MCMoEConfig) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_full_forward(family: str, tmp_path: Path):
    """Every layer's output of every sequence, with images, as in a pass of the whole model; also after a restart."""
    folder, model = save_vlm(family, tmp_path / "dense"), vlm(family)
    given = sequences(family)
    with torch.device("meta"):
        meta = type(model)._from_config(model.config, dtype=torch.float32)
    work = tmp_path / "work"
    work.mkdir()
    structure = Structure(meta)
    names = CheckpointNames(meta)
    with computing():
        runner = open_runner(
            meta, Checkpoint(sorted(folder.glob("*.safetensors"))), names, list(structure.experts), given, work,
            dtype=torch.float32, device=torch.device("cpu"), batch_tokens=64,
        )  # fmt: skip
        assert isinstance(runner, LayerStream), runner.reason
        expected: dict[str, list[torch.Tensor]] = {path: [] for path in runner.layers}
        for path in runner.layers:
            model.get_submodule(path).register_forward_hook(
                lambda m, a, out, path=path: expected[path].append(out[0] if isinstance(out, tuple) else out)
            )
        for batch in given.batches(1):
            model(input_ids=batch.ids, use_cache=False, **batch.inputs)
        for again in (False, True):
            for i, path in enumerate(runner.layers):
                with runner.loaded(i):
                    runner.advance(i)
                for n, full in enumerate(expected[path]):
                    torch.testing.assert_close(runner._hidden[slice(n, n + 1)], full, rtol=1e-5, atol=1e-5)
            if not again:
                runner.restart()
        tower = next(p for name, p in meta.named_parameters() if "vision" in name or "visual" in name)
        assert tower.is_meta  # images are looked at once


@pytest.mark.parametrize("family", FAMILIES)
def test_compress_save_reload_generate(family: str, tmp_path: Path):
    folder = save_vlm(family, tmp_path / "dense")
    model = compressed(folder, image_config(family))
    report = compression_report(model)
    assert report["image_tokens"] == 8 * (18 if family == "ernie4_5_vl_moe" else 16)
    one = sequences(family, 1).batch(slice(0, 1))
    with torch.no_grad():
        logits = model(input_ids=one.ids, **one.inputs).logits
        dense = vlm(family)(input_ids=one.ids, **one.inputs).logits
    assert 0 < relative_rms(logits, dense) < 1
    model.save_pretrained(tmp_path / "packed")
    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=one.ids, **one.inputs).logits, logits)
    made = again.generate(input_ids=one.ids, **one.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, one.ids.shape[1] + 4)
    # all that is not quantized is as it was, byte for byte
    before, after = tensors(folder), tensors(tmp_path / "packed")
    untouched = [name for name in before if "vis" in name or "projector" in name]
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def test_tokens_of_images_are_counted_apart(tmp_path: Path):
    """Experts of images see image tokens only, experts of text the others; and both count in a shared module."""
    report = compression_report(
        compressed(save_vlm("ernie4_5_vl_moe", tmp_path / "a"), image_config("ernie4_5_vl_moe"))
    )
    for path, coverage in report["coverage"].items():
        expected = coverage["tokens"] if "vision" in path else [0] * 8
        assert coverage["image_tokens"] == expected
    report = compression_report(compressed(save_vlm("aria", tmp_path / "b"), image_config("aria")))
    for coverage in report["coverage"].values():
        assert sum(coverage["image_tokens"]) == 8 * 16 * 2  # two slots a token
        assert sum(coverage["tokens"]) > sum(coverage["image_tokens"])


@pytest.mark.slow
def test_image_weight(tmp_path: Path):
    """Errors of experts that only images reach rise against those that only text reaches; on the average nothing changes."""
    folder = save_vlm("ernie4_5_vl_moe", tmp_path)
    one, four = (
        compression_report(compressed(folder, image_config("ernie4_5_vl_moe", image_weight=weight)))
        for weight in (1.0, 4.0)
    )
    share = one["image_tokens"] / one["calibration_tokens"]
    mean = 1 + 3 * share
    for path, errors in one["errors"].items():
        factor = ((4 if "vision" in path else 1) / mean) ** 0.5
        expected = [factor * error for error in errors["2"]]
        assert four["errors"][path]["2"] == pytest.approx(expected, rel=1e-4)


def test_streamed_equals_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that is loaded whole is calibrated on the same images."""
    folder = save_vlm("qwen3_vl_moe", tmp_path / "dense")
    plans = [compressed(folder, image_config("qwen3_vl_moe")).hf_quantizer.quantization_config.plan]

    def refuse(*args: Any) -> None:
        raise stream.NotStreamable("a test")

    monkeypatch.setattr(stream, "LayerStream", refuse)
    model = compressed(folder, image_config("qwen3_vl_moe"))
    plans.append(model.hf_quantizer.quantization_config.plan)
    assert plans[0] == plans[1]
    assert compression_report(model)["image_tokens"] == 8 * 16


@pytest.mark.slow
def test_tuning_and_learned_pruning_use_images(tmp_path: Path):
    folder = save_vlm("aria", tmp_path / "dense")
    config = image_config("aria", tuning_steps=2, otp={"target": 0.2, "objective": "layers"})
    model = compressed(folder, config)
    assert compression_report(model)["tuning"]["steps"] == 2
    one = sequences("aria", 1).batch(slice(0, 1))
    with torch.no_grad():
        model(input_ids=one.ids, **one.inputs)
    assert 0 < expert_pruning_stats(model)["prefill"]["slots_skipped"] < 0.5


def watched(protected: Any, found: list[torch.Tensor]) -> Any:
    def run(index: torch.Tensor) -> torch.Tensor:
        found.append(protected(index))
        return found[-1]

    return run


def test_tokens_of_images_are_protected_apart(tmp_path: Path):
    model = AutoModelForImageTextToText.from_pretrained(save_vlm("aria", tmp_path), dtype=torch.float32).eval()
    given = sequences("aria")
    for protect, images in ((0.25, 0.5), (0.0, 0.5), (0.25, 0.0)):
        odp = ODPConfig(threshold=1.0, protect=protect, protect_images=images)
        set_expert_pruning(model, odp, dataset=given)
        found: list[torch.Tensor] = []
        for layer in attached(model).layers.values():
            layer._protected = watched(layer._protected, found)
        one = given.batch(slice(0, 1))
        with torch.no_grad():
            model(input_ids=one.ids, **one.inputs)
        seen = one.images.flatten()
        for whole in found:
            assert (
                int(whole[seen].sum()) in (round(images * 16), round(images * 16) + 1)
                if images
                else not whole[seen].any()
            )
            text = int((~seen).sum())
            assert int(whole[~seen].sum()) >= int(protect * text) if protect else not whole[~seen].any()
            assert int(whole[~seen].sum()) <= int(protect * text) + 2


class TestData:
    def rows(self, folder: Path, count: int = 4) -> list[dict[str, Any]]:
        folder.mkdir(exist_ok=True)
        for n in range(count):
            picture(n).save(folder / f"{n}.png")
        return [{"file_name": f"{n}.png", "text": f"5 6 {7 + n}"} for n in range(count)]

    def read(self, dataset: Any, count: int = 4, **options: Any) -> Any:
        given = {"processor": Processor("aria"), "num_samples": count, "seq_len": 64, "seed": 0} | options
        return calibration_sequences(vlm("aria"), dataset, None, **given)

    def test_every_kind(self, tmp_path: Path):
        """A list of rows, of chat messages, a folder, its file, and rows of other data sets' shapes give the same."""
        rows = self.rows(tmp_path / "data")
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / "data" / "metadata.jsonl").write_text(lines)
        paths = [tmp_path / "data" / row["file_name"] for row in rows]
        messages = [
            [{"role": "user", "content": [{"type": "image", "path": str(p)}, {"type": "text", "text": r["text"]}]}]
            for p, r in zip(paths, rows, strict=True)
        ]
        turns = [{"from": "human", "value": "<image>\n5 6"}, {"from": "gpt", "value": ""}]
        kinds = [
            [{"image": str(p), "text": r["text"]} for p, r in zip(paths, rows, strict=True)],
            [{"images": [str(p)], "text": r["text"]} for p, r in zip(paths, rows, strict=True)],
            messages,
            [{"messages": own} for own in messages],
            tmp_path / "data",
            str(tmp_path / "data" / "metadata.jsonl"),
            [
                {"image": str(p), "conversations": [turns[0] | {"value": f"<image>\n{r['text']}"}, turns[1]]}
                for p, r in zip(paths, rows, strict=True)
            ],
            [{"images": [str(p)], "texts": [{"user": r["text"]}]} for p, r in zip(paths, rows, strict=True)],
        ]
        expected = self.read(kinds[0])
        for kind in kinds:
            found = self.read(kind)
            assert found.fingerprint() == expected.fingerprint()
            assert found.image_tokens() == 4 * 16

    def test_mixed_with_text(self, tmp_path: Path):
        self.rows(tmp_path / "data")
        lines = "\n".join(json.dumps(row) for row in self.rows(tmp_path / "data"))
        (tmp_path / "data" / "metadata.jsonl").write_text(lines)

        class Words:
            eos_token_id = None

            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [int(word) for word in text.split()]}

        text = tmp_path / "text.txt"
        text.write_text(" ".join(["7"] * 600))
        found = calibration_sequences(
            vlm("aria"),
            {str(tmp_path / "data"): 1, str(text): 1},
            Words(),
            processor=Processor("aria"),
            num_samples=8,
            seq_len=64,
            seed=0,
        )
        assert len(found) == 8
        assert found.image_tokens() == 4 * 16
        assert sorted({bool(found.images(n).any()) for n in range(2)}) == [False, True]

    def test_parquet(self, tmp_path: Path):
        """As data sets on the Hub are stored, with the images in the file."""
        self.rows(tmp_path)
        columns = {"image": [str(tmp_path / f"{n}.png") for n in range(4)], "text": [f"5 6 {7 + n}" for n in range(4)]}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / "data.parquet")
        expected = self.read([{"image": image, "text": text} for image, text in zip(*columns.values(), strict=True)])
        assert self.read(tmp_path / "data.parquet").fingerprint() == expected.fingerprint()

    def test_the_hub(self, monkeypatch: pytest.MonkeyPatch):
        """Without a dataset a model that sees gets the default one, one that does not still gets text."""
        asked: list[Any] = []
        conversation = [{"from": "human", "value": "<image>\n5 6"}, {"from": "gpt", "value": "7"}]
        rows = [{"image": picture(n), "conversations": conversation} for n in range(6)]
        # instructions without an image are among them
        rows[1] = {"image": None, "conversations": [{"from": "human", "value": "8 9"}, {"from": "gpt", "value": "10"}]}

        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            asked.append((args[0], kwargs["streaming"]))
            return datasets.IterableDataset.from_generator(lambda: iter(rows))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        found = self.read(None, 6)
        assert asked == [("lmms-lab/LLaVA-NeXT-Data", True)]
        rows.insert(0, rows.pop(1))  # the first one that comes has none
        assert self.read(None, 6).image_tokens() == 5 * 16
        assert {name for name, _ in asked} == {"lmms-lab/LLaVA-NeXT-Data"}
        assert found.image_tokens() == 5 * 16
        assert sorted(map(len, found.ids)) == [3, *[21] * 5]

    def test_rows_without_an_image_and_with_two(self):
        rows = [
            {"image": picture(0), "text": "5"},
            {"text": "6 7"},
            {"images": [picture(1), picture(2)], "text": "5 <image> 6 <image> 7"},
        ]
        found = self.read(rows, 3)
        assert [int(found.images(n).sum()) for n in range(3)] == [16, 0, 32]
        assert [bool(found.inputs(n).get("pixel_values") is not None) for n in range(3)] == [True, False, True]

    def test_images_of_chats(self, tmp_path: Path):
        """Images beside messages go to the marks, or to the first thing that the user says; parts keep their own."""
        rows = [
            {
                "messages": [{"role": "system", "content": "5"}, {"role": "user", "content": ["6", {"text": " 7"}]}],
                "image": picture(0),
            },
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, "6"]},
                    {"role": "assistant", "content": None},
                ],
                "image": picture(1),
            },
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(tmp_path / "x.png")}}, "8"]}],
        ]
        picture(2).save(tmp_path / "x.png")
        # an image of a part that is beside the messages, too, is one; empty fields are none
        rows.append({"messages": rows[2], "images": [str(tmp_path / "x.png")], "image": ""})
        found = self.read(rows, 4)
        assert torch.equal(found.ids[2], found.ids[3])
        found = self.read(rows, 4)[:3]
        assert [ids[ids < IMAGE].tolist() for ids in found.ids] == [[5, 6, 7], [6], [8]]
        assert [int(own.nonzero()[0]) for own in map(found.images, range(3))] == [2, 1, 1]

    def test_a_template_is_followed(self):
        class Templated(Processor):
            chat_template = "something"

            def apply_chat_template(self, messages: Any, **options: Any) -> Any:
                assert options == {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
                images = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
                words = [
                    self.image_token if part["type"] == "image" else part["text"]
                    for turn in messages
                    for part in turn["content"]
                ]
                return self(images, " ".join(["9", *words]), "pt")

        found = self.read(samples(2), 2, processor=Templated("aria"))
        assert all(ids[0] == 9 for ids in found.ids)

    def test_names_of_files_are_not_images_everywhere(self, tmp_path: Path):
        """A corpus of text that says which file a text is of."""
        file = tmp_path / "code.jsonl"
        file.write_text("\n".join(json.dumps({"text": "5 6 7", "file_name": f"{n}.py"}) for n in range(40)))

        class Words:
            eos_token_id = None

            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [int(word) for word in text.split()]}

        found = calibration_sequences(vlm("aria"), str(file), Words(), num_samples=2, seq_len=16, seed=0)
        assert found.are_text
        with pytest.raises(ValueError, match="dataset is a text of 300 characters; give texts as a list"):
            calibration_sequences(vlm("aria"), "x" * 300, Words(), num_samples=2, seq_len=16, seed=0)

    def test_an_image_that_changes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("transformers_mcmoe.calibration.sequences.KEPT", 0)
        self.rows(tmp_path, 2)
        found = self.read([{"image": str(tmp_path / f"{n}.png"), "text": "5"} for n in range(2)], 2)
        found.batch(slice(0, 1))
        picture(9).save(tmp_path / "0.png")
        with pytest.raises(
            ValueError, match="The image of sample 0 of the dataset changed while it was calibrated on"
        ):
            found.batch(slice(0, 1))

    def test_long_samples_are_passed_over(self):
        rows = samples(4)
        rows[1] = {"image": picture(1), "text": " ".join(["5"] * 100)}
        assert len(self.read(rows, 3)) == 3
        with pytest.raises(
            ValueError, match=r"gives 3 samples of up to seq_len=64 tokens \(of 4; the longest has 118\)"
        ):
            self.read(rows, 4)

    def test_inputs_are_made_again(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("transformers_mcmoe.calibration.sequences.KEPT", 0)
        found = self.read(samples(2), 2)
        first, again = (found.batch(slice(1, 2)).inputs["pixel_values"] for _ in range(2))
        assert first is not again
        assert torch.equal(first, again)

    def test_text_for_a_model_that_sees(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            assert self.read(tokens(4, 16)).image_tokens() == 0
        assert "sees images, but the calibration data are text" in caplog.text
        with pytest.raises(ValueError, match=r"vision_moe.*none of them was of an image: give samples with images"):
            compressed(save_vlm("ernie4_5_vl_moe", tmp_path), quick_config())

    def test_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        rows = self.rows(tmp_path / "data")
        file = tmp_path / "data" / "metadata.jsonl"
        (tmp_path / "data" / "2.png").write_bytes(b"no image")
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match=r"'2.png' of line 3 of '.*metadata.jsonl' cannot be read \(Unidentified"):
            self.read(tmp_path / "data")
        with pytest.raises(ValueError, match=r"'x.png' of sample 0 of the dataset cannot be read \(FileNotFoundError"):
            self.read([{"image": "x.png", "text": "5"}], 1)
        with pytest.raises(ValueError, match="The dataset has no image in any of its 2 samples"):
            self.read([{"text": "5 6"}, {"text": "7"}], 2)
        with pytest.raises(ValueError, match="sample 0 of the dataset has neither 'text' nor messages"):
            self.read([{"image": picture(0)}], 1)
        two = {"images": [picture(0), picture(1)], "text": "5 <image> 6"}
        with pytest.raises(ValueError, match="sample 0 of the dataset has 2 images for 1 places in its text"):
            self.read([two], 1)
        video = [
            {"role": "user", "content": [{"type": "video", "path": "x.mp4"}, {"type": "image", "image": picture(0)}]}
        ]
        with pytest.raises(ValueError, match="has a part of type 'video'; calibration takes text and images"):
            self.read([video], 1)
        with pytest.raises(ValueError, match="has a part of type 'text'"):
            self.read([[{"role": "user", "content": [{"type": "text", "content": "5"}]}, {"image": picture(0)}]], 1)
        with pytest.raises(ValueError, match="has videos or sounds"):
            self.read([{"text": "5", "videos": ["a.mp4"], "image": picture(0)}], 1)
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "data.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="has no image in any of its 0 samples"):
            self.read(tmp_path / "empty")
        with pytest.raises(ValueError, match="has a message of type str"):
            self.read([{"messages": ["5 6"]}], 1)
        file.unlink()
        with pytest.raises(ValueError, match=r"has 0 \.jsonl files"):
            self.read(tmp_path / "data")
        with pytest.raises(ValueError, match=r"There is no processor for '.*' to read calibration images with"):
            self.read(samples(2), 2, processor=str(tmp_path))
        rows = [{"image": picture(0), "text": "5 6"}]
        monkeypatch.setattr(Processor, "__call__", lambda *args, **kwargs: {"input_ids": torch.tensor([[5, 6]])})
        with pytest.raises(ValueError, match=rf"No token .* stands for an image \(ids \[{IMAGE}\]\)"):
            self.read(rows, 1)

    def test_a_model_of_text_takes_none(self, tmp_path: Path):
        folder = save_dense("mixtral", tmp_path / "dense")
        with pytest.raises(ValueError, match="has images, but MixtralForCausalLM takes none"):
            compressed_text(folder, quick_config(dataset=samples(8), processor=Processor("aria")))


def test_evaluation_scores_the_text_alone():
    model, given = vlm("aria"), sequences("aria", 3)
    found = evaluate_samples(model, given, model)
    assert found.kl == 0
    assert found.top1 == 1
    nll, count = 0.0, 0
    for batch in given.batches(1):
        with torch.no_grad():
            logits = model(input_ids=batch.ids, **batch.inputs).logits[0].log_softmax(-1)
        for t in range(batch.ids.shape[1] - 1):
            if batch.ids[0, t + 1] != IMAGE:
                nll, count = nll - float(logits[t, batch.ids[0, t + 1]]), count + 1
    assert found.tokens == count
    assert found.nll == pytest.approx(nll / count, rel=1e-5)
    other = evaluate_samples(vlm("aria", initializer_range=0.05), samples(3), model, processor=Processor("aria"))
    assert other.kl is None or other.kl >= 0


class RemoteProcessor(Processor):
    """Makes what `remote_vlm` is given."""

    def __call__(self, images: Any, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        made = super().__call__(images, text, return_tensors)
        if images:
            made["images"] = made.pop("pixel_values")
            made["images_seq_mask"] = made["input_ids"] == IMAGE
        return made


def test_remote_code_with_experts_in_a_list(tmp_path: Path):
    """A model of DeepSeek-VL2's shape from a folder with its own code: compressed with images, saved, loaded again."""
    import remote_vlm

    torch.manual_seed(0)
    folder, packed = tmp_path / "remote", tmp_path / "packed"
    dense = remote_vlm.RemoteVLForCausalLM(remote_vlm.RemoteVLConfig()).eval()
    dense.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "remote_vlm.RemoteVLConfig",
        "AutoModelForCausalLM": "remote_vlm.RemoteVLForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(Path(remote_vlm.__file__), folder)

    def load(name: Path, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float32, **options)

    given = {"dataset": samples(8), "processor": RemoteProcessor("aria"), "num_samples": 8, "seq_len": 64}
    model = load(folder, quantization_config=quick_config(**given))
    report = compression_report(model)
    assert report["image_tokens"] == 8 * 16
    assert not any("whole dense model" in note for note in report["fallbacks"])  # streamed
    assert sorted(report["coverage"]) == [f"language.model.layers.{i}.mlp.experts" for i in (1, 2)]
    assert all(sum(own["image_tokens"]) == 8 * 16 * 2 for own in report["coverage"].values())
    shared = model.language.model.layers[1].mlp.shared_experts.gate_proj
    assert isinstance(shared, PackedLinear)
    assert shared.bits in (4, 8)
    one = RemoteProcessor("aria")([picture(0)], "<image> 5 6 7", "pt")
    with torch.no_grad():
        logits = model(**one).logits
        assert 0 < relative_rms(logits, dense(**one).logits) < 1
        model.save_pretrained(packed)
        shutil.copy(Path(remote_vlm.__file__), packed)
        assert torch.equal(load(packed)(**one).logits, logits)
    before, after = tensors(folder), tensors(packed)
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(("vision", "projector")))


def test_page_and_card_tell_of_images(tmp_path: Path):
    from transformers_mcmoe.integrations.card import build_card
    from transformers_mcmoe.integrations.plots.compression import image_shares, report_figures

    report = compression_report(compressed(save_vlm("aria", tmp_path), image_config("aria")))
    shares = image_shares(report)
    assert len(shares) == len(report["coverage"])
    assert all(0 <= share <= 1 for row in shares for share in row if share == share)
    assert "images" in [figure.name for figure in report_figures(report, {})]
    card = str(build_card("me/it", report, {}))
    assert f"{report['image_tokens']:,} of them of images" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert 'processor = AutoProcessor.from_pretrained("me/it")' in card


@pytest.mark.slow
def test_many_experts(tmp_path: Path):
    """64 experts of which a token takes 6, shared ones at 4 bits: every expert has a width, also those that nothing reached."""
    text = VLMS["aria"]["text_config"] | {"moe_num_experts": 64, "moe_topk": 6, "moe_num_shared_experts": 2}
    folder = save_vlm("aria", tmp_path, text_config=text)
    model = compressed(folder, image_config("aria", bits=2.57, shared_expert_bits=4, attention_bits=4))
    report = compression_report(model)
    assert report["average_bits"] <= 2.57
    for path, widths in report["expert_bits"].items():
        assert len(widths) == 64
        coverage = report["coverage"][path]
        unseen = sum(count == 0 for count in coverage["image_tokens"])
        assert 0 < unseen < 64  # some are reached by text alone, or by nothing
        assert all(digit in "1234" for digit in widths)
    assert all(
        module.bits == 4 for name, module in model.named_modules() if "shared" in name and hasattr(module, "bits")
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
@pytest.mark.parametrize(
    "options",
    [
        {"prune": 0.25},
        {"prune": {"ratio": 0.25, "importance": "loss"}},
        {"prune": "auto", "rank": "auto"},
        {"tuning_steps": 2},
        {"odp": {"rate": 0.2, "protect": 0.1, "protect_images": 0.3}},
        {"odp": {"quantile": 0.5, "layers": "auto", "max_kl": 5.0}},
        {"target_size": "600KB"},
    ],
)
def test_everything_else_works_on_samples_with_images(family: str, options: dict[str, Any], tmp_path: Path):
    folder = save_vlm(family, tmp_path, tie_word_embeddings=False)
    if options.get("rank") == "auto" and family == "ernie4_5_vl_moe":
        pytest.skip("its matrices are too small for ranks")
    given = dict(options)
    if "target_size" in given:
        dense = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        given["target_size"] = int(0.8 * dense)
    config = image_config(family, **given) if "target_size" not in given else image_config(family, bits=2.54, **given)
    model = compressed(folder, config)
    report = compression_report(model)
    if "prune" in options and options["prune"] != "auto":
        dropped = report["dropped_experts"]
        assert dropped["count"] == dropped["of"] // 4
        assert all(0 <= value < 1e3 for values in dropped["importance"].values() for value in values)
    if "tuning_steps" in options:
        assert report["tuning"]["steps"] == 2
    one = sequences(family, 1).batch(slice(0, 1))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=one.ids, **one.inputs).logits).all()
    if "rate" in options.get("odp", {}):
        with torch.no_grad():
            for batch in sequences(family, 8).batches(1):
                model(input_ids=batch.ids, **batch.inputs)
        assert expert_pruning_stats(model)["prefill"]["bytes_skipped"] == pytest.approx(0.2, abs=0.06)
