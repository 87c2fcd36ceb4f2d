# SPDX-License-Identifier: Apache-2.0
"""Converts the HQQ checkpoint of a model to one of ours; knows files and the model's structure, not HQQ's layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.integrations.hqq.matrix import HQQMatrix, common_group_size, open_source, read
from transformers_mcmoe.models.experts import Experts, stacks_of
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.plan import ExpertWidths, Plan, average_bits
from transformers_mcmoe.report import REPORT_NAME
from transformers_mcmoe.workdir import check_replaceable, replace_directory

_SHARD_BYTES = 4 << 30
_COPIED = (".json", ".jinja", ".model", ".txt")  # tokenizer, chat template, generation config


def convert_hqq(source: str | Path, output: str | Path, group_size: int | None = None) -> Plan:
    """Convert the HQQ checkpoint of a Mixture-of-Experts model to one that `from_pretrained` loads packed.

    Its tensors must have the published names, one matrix per expert and projection. HQQ matrices for which the model
    has no packed module (routers, lm_head) become dense fp16. At most one shard of 4 GiB is in memory.

    Args:
        source: folder with config.json and safetensors files or hqq's `qmodel.pt`.
        output: folder to write; it appears as a whole at the end.
        group_size: see `from_hqq`.

    Returns:
        The plan, as written to config.json.

    Raises:
        ValueError: see `from_hqq` and `Structure`; or the model has no routed expert in HQQ, a layer has some, or an
            expert's input projections differ in width; or `output` is not empty and holds no compressed model.
    """
    source, output = Path(source), Path(output).resolve()
    check_replaceable(output, REPORT_NAME)
    output.parent.mkdir(parents=True, exist_ok=True)
    config = transformers.AutoConfig.from_pretrained(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        structure = Structure(getattr(transformers, config.architectures[0])(config))
    matrices, rest = open_source(source)
    plan, names = _plan(structure, matrices)
    packed = [matrix for matrix in matrices if matrix.name in names]
    size = common_group_size(packed, group_size)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for matrix in matrices:
            yield from (matrix.tensors(size) if matrix.name in names else matrix.dense_tensors()).items()
        yield from ((name, read(value)) for name, value in rest.items())

    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        new = Path(temporary) / output.name
        new.mkdir()
        _write(tensors(), new)
        average = round(average_bits(matrix.matrix for matrix in packed), 6)
        # what HQQ did, in our words
        ours = MCMoEConfig(average, group_size=size, plan=plan, rounding="nearest", fit="hqq")
        config.quantization_config = ours.to_dict()
        config.save_pretrained(new)
        for file in source.iterdir():
            known = file.name == "config.json" or file.name.endswith(".index.json")
            if file.suffix in _COPIED and not known:
                shutil.copy(file, new)
        replace_directory(new, output)
    return plan


def _plan(structure: Structure, matrices: Iterable[HQQMatrix]) -> tuple[Plan, set[str]]:
    """The widths of a model's HQQ matrices, and the names of those that packed modules take."""
    found = {structure.names.renamed(f"{m.name}.weight").removesuffix(".weight"): m for m in matrices}
    experts: dict[str, ExpertWidths] = {}
    names: set[str] = set()
    for path, adapter in structure.experts.items():
        leaves = structure.names.leaves(adapter)
        own = [
            {p.name: found.pop(adapter.tensor(expert, leaves[p.name]), None) for p in adapter.projections}
            for expert in range(adapter.num_experts)
        ]
        held = [m for expert in own for m in expert.values() if m is not None]
        if not held:
            continue  # a dense layer stays dense
        if len(held) < adapter.num_experts * len(adapter.projections):
            raise ValueError(f"Some but not all experts of '{path}' are HQQ matrices; quantize all of them.")
        experts[path] = ExpertWidths(_widths(adapter, own, "gate_up"), _widths(adapter, own, "down"))
        names |= {m.name for m in held}
    if not experts:
        raise ValueError("The checkpoint has no routed experts in HQQ matrices; quantize them, one matrix per expert.")
    stacks = tuple(f"{stack}." for stack in stacks_of(structure.experts))
    linears = {name: m for name, m in found.items() if name.startswith(stacks) and _is_linear(structure.model, name)}
    names |= {m.name for m in linears.values()}
    return Plan(experts, {name: m.bits for name, m in linears.items()}), names


def _widths(adapter: Experts, own: Sequence[Mapping[str, HQQMatrix | None]], role: str) -> tuple[int, ...]:
    widths: list[int] = []
    for expert, matrices in enumerate(own):
        bits = {m.bits for p in adapter.projections if p.role == role and (m := matrices[p.name]) is not None}
        if len(bits) > 1:
            raise ValueError(
                f"Expert {expert} of '{adapter.path}' has input projections of {sorted(bits)} bits; a plan has one width "
                "for them."
            )
        widths += bits
    return tuple(widths)


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _write(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors as they come, in shards with an index."""
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    total = held = 0

    def flush() -> None:
        file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.detach().contiguous()
        total, held = total + tensor.nbytes, held + tensor.nbytes
        if held >= _SHARD_BYTES:
            flush()
            held = 0
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
