# SPDX-License-Identifier: Apache-2.0
"""Widths, ranks and dropping in one program: what is chosen, that bytes are kept, and that the better plan wins."""

import pytest
import torch
from test_routers import spread
from tiny import compressed, load, quick_config, tiny_model, tokens

from transformers_mcmoe import MCMoEConfig, PruneConfig, RankConfig, compression_report
from transformers_mcmoe.models.routers import SlicedRouter
from transformers_mcmoe.pipeline.job import Job
from transformers_mcmoe.pipeline.joint import JointProgram

IDS = tokens(2, 24)
IDLE = 3  # an expert that hardly any token is sent to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mixtral with an expert in each layer that is never among the best."""
    path = tmp_path_factory.mktemp("idle") / "dense"
    model = spread(tiny_model("mixtral", intermediate_size=96))
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight.data
        rows[IDLE] = rows[[e for e in range(8) if e != IDLE]].mean(0)
    model.save_pretrained(path)
    return path


def config_for(**changes):
    return quick_config(**({"bits": 2.6, "dataset": tokens(16, 32), "num_samples": 16} | changes))


def plan_of(model):
    return model.hf_quantizer.quantization_config.plan


@pytest.fixture
def tried(monkeypatch):
    """The plans that the program gave, and those of widths."""
    found = []
    plan = JointProgram.plan

    def keep(self, widths, *args, **kwargs):
        joint = plan(self, widths, *args, **kwargs)
        sizes = [
            None if p is None else sum(m.packed_bytes(128) for m in self._structure.matrices(p))
            for p in (widths, joint)
        ]
        found.append((widths, joint, sizes))
        return joint

    monkeypatch.setattr(JointProgram, "plan", keep)
    return found


@torch.no_grad()
def test_an_expert_without_tokens_goes(folder, tried, tmp_path):
    model = compressed(folder, config_for(prune="auto"))
    _, joint, (widths_bytes, joint_bytes) = tried[-1]
    assert joint is not None
    assert joint_bytes <= widths_bytes
    assert any(IDLE not in widths.kept for widths in joint.experts.values())
    report = compression_report(model)
    compared = report["compared_plans"]
    chosen = plan_of(model)
    assert (chosen == joint) == (compared["joint"] < compared["widths"])
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(IDS).logits, logits)


@pytest.mark.parametrize("better", ["joint", "widths"])
@torch.no_grad()
def test_the_better_plan_is_kept(folder, monkeypatch, tried, better, tmp_path):
    """Whatever plan has the lower divergence: its files, its routers, its report."""
    values = iter([0.2, 0.1] if better == "joint" else [0.1, 0.2])
    monkeypatch.setattr(Job, "_corrected", lambda self, widths, measured, d: self._joint.plan(widths, measured))
    monkeypatch.setattr("transformers_mcmoe.models.stream.LayerStream.divergence", lambda *args: next(values))
    model = compressed(folder, config_for(prune="auto", work_dir=tmp_path / "work"))
    widths, joint, _ = tried[-1]
    assert plan_of(model) == (joint if better == "joint" else widths)
    sliced = [isinstance(module, SlicedRouter) for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert any(sliced) == (better == "joint")
    names = sorted(file.name for file in (tmp_path / "work").glob("*.safetensors"))
    assert names == [f"{name}-{i:05d}.safetensors" for name in ("joint", "layer") for i in range(2)]
    report = compression_report(model)
    assert report["compared_plans"] == {
        "widths": 0.2 if better == "joint" else 0.1,
        "joint": 0.1 if better == "joint" else 0.2,
    }
    assert (report["dropped_experts"] is not None) == (better == "joint")
    reached = report["coverage"]["model.layers.0.mlp.experts"]["tokens"]
    assert sum(reached) == 14 * 32 * 2  # two sequences of 16 are judged on, and not counted
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed")(IDS).logits, model(IDS).logits)


def test_dropping_is_tried_before_it_is_believed(folder, monkeypatch, tried):
    """Where the dense model without the dropped experts is far worse than reckoned, the program drops fewer."""
    monkeypatch.setattr(Job, "_judge", lambda self: 1e3)
    model = compressed(folder, config_for(prune="auto"))
    dropped = [0 if joint is None else sum(8 - len(w.kept) for w in joint.experts.values()) for _, joint, _ in tried]
    assert dropped[0] > 0
    assert dropped[-1] < dropped[0]
    assert compression_report(model)["sizes"]["total_bytes"] > 0


@torch.no_grad()
def test_ranks_are_options(tmp_path, tried):
    """Matrices that are products of thin ones are kept as such."""
    model = spread(tiny_model("mixtral", intermediate_size=96))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            thin = [torch.randn(8, parameter.shape[n], 8, generator=generator) for n in (1, 2)]
            parameter.data.copy_(0.01 * thin[0] @ thin[1].transpose(1, 2))
    folder = tmp_path / "thin"
    model.save_pretrained(folder)
    config = config_for(bits=3.4, expert_bits=(1, 8), rank=RankConfig("auto", bits=4))
    compressed(folder, config)
    _, joint, (widths_bytes, joint_bytes) = tried[0]
    assert joint is not None
    assert any(any(widths.ranks) for widths in joint.experts.values())
    assert joint_bytes <= widths_bytes


def test_a_layer_keeps_its_slots(folder, tried):
    """However little dropping costs, a token finds as many experts as it is sent to."""
    config = config_for(prune="auto")
    compressed(folder, config)
    for _, joint, _ in tried:
        if joint is not None:
            assert all(len(widths.kept) >= 2 for widths in joint.experts.values())


class TestRefused:
    @pytest.mark.parametrize("options", [{"prune": "auto"}, {"rank": "auto"}])
    def test_without_one_program(self, options):
        with pytest.raises(ValueError, match="'auto' is not valid: it must be used with allocation='pmq'"):
            MCMoEConfig(budget="layer", attention_bits=4, **options)

    def test_layers_that_do_not_run_alone(self, folder, monkeypatch):
        from transformers_mcmoe.models.stream import streamed

        def refuse(self):
            raise streamed.NotStreamable("its layers need each other")

        monkeypatch.setattr(streamed.LayerStream, "_probe", refuse)
        with pytest.raises(
            NotImplementedError,
            match=r"auto runs hidden states through single layers, .* \(its layers need each other\)",
        ):
            compressed(folder, config_for(prune="auto"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"prune": "auto", "rank": 64},
                "prune='auto' is not valid: it must be used without a number for the other",
            ),
            (
                {"prune": 0.25, "rank": "auto"},
                "rank='auto' is not valid: it must be used without a number for the other",
            ),
            ({"prune": "auto", "activations": "dense"}, "used with activations='compressed'"),
            ({"prune": "auto", "num_samples": 1}, "num_samples=1 is not valid: it must be 2 or more"),
            ({"prune": {"ratio": "auto", "method": "reap"}}, "left without method"),
        ],
    )
    def test_what_does_not_go_together(self, options, message):
        with pytest.raises(ValueError, match=message):
            MCMoEConfig(**options)

    def test_options(self):
        assert MCMoEConfig(prune="auto").prune == PruneConfig("auto")
        assert MCMoEConfig(rank="auto").rank == RankConfig("auto")
        assert MCMoEConfig(prune="auto").joint
        assert not MCMoEConfig(prune=0.5).joint
