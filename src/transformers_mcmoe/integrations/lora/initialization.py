# SPDX-License-Identifier: Apache-2.0
"""Adapters that start from the quantization error: B A is the part of W - Q(W) that calibration activations feel most.

The dense checkpoint is streamed one decoder layer at a time, as in compression; each layer is then given Q(W) + s B A, so that
the layers behind it see what the finished model will compute. Knows layers, Hessians and adapters; not how codes were chosen.

Source of the math: EoRA (arXiv 2410.21271) weighs the error by the activations' Hessian before its SVD; LoftQ (arXiv
2310.08659) starts LoRA from it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.hessians import PROBED, ExpertHessians, Hessian, observe_linears, probe_inputs
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.integrations.lora.layers import LoraExperts, LoraPackedLinear
from transformers_mcmoe.models.experts import Experts
from transformers_mcmoe.models.stream import Checkpoint, LayerRunner, checkpoint_files, computing, open_runner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline import BATCH_TOKENS
from transformers_mcmoe.pipeline.prepare import tokens_for
from transformers_mcmoe.pipeline.rounding import chunks

logger = logging.getLogger(__name__)

# bytes of Hessians held at a time, one expert's at least
HESSIANS = 512 << 20
# added to a Hessian's diagonal, in parts of its mean: as for GPTQ, directions without data count a little
DAMPING = 0.01

Layers = dict[str, LoraPackedLinear | LoraExperts]


def low_rank(error: Tensor, hessian: Tensor, rank: int, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The B A of a rank that is nearest to an error in the metric of a Hessian: least |(E - B A) C|, C C^T = H.

    Args:
        error: [out, in] float32.
        hessian: [in, in] float32, sum or mean of x x^T; any scale.
        rank: r; more than min(out, in) is filled with zeros.
        damping: see `DAMPING`.

    Returns:
        B [out, r] and A [r, in], float32, with the singular values shared evenly between them.
    """
    h = hessian.to(torch.float64)
    mean = h.diagonal().mean()
    if not mean > 0:
        h, mean = torch.eye(len(h), dtype=h.dtype, device=h.device), torch.ones((), dtype=h.dtype)
    h = h + damping * mean.to(h.device) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    root = torch.linalg.cholesky(h / mean)
    weighted = error.to(torch.float64) @ root
    # right singular vectors from the Gram matrix: the largest are wanted, and n^3 is cheaper than an SVD of [out, in]
    squares, vectors = torch.linalg.eigh(weighted.T @ weighted)
    kept = min(rank, *error.shape)
    v = vectors[:, -kept:].flip(1)
    share = squares[-kept:].flip(0).clamp(min=1e-30) ** 0.25  # root of the singular values
    b = torch.zeros(error.shape[0], rank, device=error.device)
    a = torch.zeros(rank, error.shape[1], device=error.device)
    b[:, :kept] = (weighted @ v / share).float()  # U S^1/2
    # S^1/2 V^T C^-1
    a[:kept] = torch.linalg.solve_triangular(root, share[:, None] * v.T, upper=False, left=False).float()
    return b, a


def initialize_lora(
    model: Any,
    dense: str | Path,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    adapter_name: str = "default",
    damping: float = DAMPING,
) -> dict[str, float]:
    """Set an adapter to the best low-rank part of the quantization error, before training.

    Adapted matrices that are not packed keep B = 0.

    Args:
        model: a packed model with a LoRA adapter, e.g. of `LoraConfig(init_lora_weights="mcmoe")`; changed in place.
        dense: id or folder of the dense checkpoint in safetensors that was compressed.
        dataset: calibration text, as in `MCMoEConfig`.
        tokenizer: tokenizer object or id; default that of the dense checkpoint.
        processor: processor object or id, for samples with images; default that of the dense checkpoint.
        num_samples: calibration sequences.
        seq_len: tokens of each.
        seed: seed of the choice of text.
        adapter_name: which adapter.
        damping: part of the mean diagonal that is added to each Hessian.

    Returns:
        By module path, the share of the weighted squared error that the adapter takes away, 0 to 1.

    Raises:
        ValueError: there is no such adapter on packed modules, it is merged, or the dense checkpoint is another model's.
        OSError: there is no such checkpoint.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = _layers(base, adapter_name)
    files = checkpoint_files(str(dense))
    data = {"dataset": dataset, "tokenizer": str(dense) if tokenizer is None else tokenizer, "seed": seed}
    data["processor"] = str(dense) if processor is None else processor
    tokens = tokens_for(base, MCMoEConfig(num_samples=num_samples, seq_len=seq_len, **data))
    dtype = base.dtype
    with torch.device("meta"):
        meta = type(base)(type(base.config).from_pretrained(str(dense))).to(dtype)
    with computing(), ExitStack() as stack, tempfile.TemporaryDirectory(prefix="mcmoe-lora-") as folder:
        structure = Structure(meta)
        _check_same(structure, layers)
        device = base.get_input_embeddings().weight.device
        runner = open_runner(
            meta, Checkpoint(files), structure.names, list(structure.experts), tokens, Path(folder),
            dtype=dtype, device=device, batch_tokens=BATCH_TOKENS,
        )  # fmt: skip
        if device.type == "cpu" and dtype.itemsize == 2:
            for experts in structure.experts.values():
                stack.enter_context(experts.in_blocks())
        gained = _Initializer(structure, runner, layers, adapter_name, damping).run()
    logger.info(
        "Adapter '%s' takes away %.3f of the weighted quantization error (mean of %d modules).",
        adapter_name, sum(gained.values()) / len(gained), len(gained),
    )  # fmt: skip
    return gained


def _layers(base: Any, adapter: str) -> Layers:
    found: Layers = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, LoraPackedLinear | LoraExperts) and adapter in module.lora_A
    }
    if not found:
        raise ValueError(f"No packed module has an adapter '{adapter}'; call get_peft_model with a LoraConfig first.")
    merged = next((path for path, module in found.items() if module.merged), None)
    if merged is not None:
        raise ValueError(f"The adapter of '{merged}' is merged; call unmerge_adapter() first.")
    return found


def _check_same(structure: Structure, layers: Layers) -> None:
    """Raise ValueError if adapted modules are not those of the dense model."""
    for path, layer in layers.items():
        try:
            if isinstance(layer, LoraExperts):
                experts = structure.experts[path.rpartition(".")[0]]
                sizes = {p.name: (p.out_features, p.in_features) for p in experts.projections}
                own = {p.name: (p.out_features, p.in_features) for p in layer.base_layer.projections}
                same = own.items() <= sizes.items() and experts.num_experts == layer.base_layer.num_experts
            else:
                shape = structure.model.get_submodule(path).weight.shape
                same = tuple(shape) == (layer.base_layer.out_features, layer.base_layer.in_features)
        except (AttributeError, KeyError):
            same = False
        if not same:
            raise ValueError(f"The dense checkpoint does not fit: '{path}' is not there or has another shape; give the "
                             "checkpoint that was compressed.")  # fmt: skip


class _Initializer:
    """One pass over the dense layers."""

    def __init__(
        self, structure: Structure, runner: LayerRunner, layers: Layers, adapter: str, damping: float
    ) -> None:
        self._structure, self._runner, self._layers = structure, runner, layers
        self._adapter, self._damping = adapter, damping
        self._gained: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        for i, layer in enumerate(self._runner.layers):
            inside = {path: module for path, module in self._layers.items() if path.startswith(layer + ".")}
            with self._runner.loaded(i):
                self._linears(i, {p: m for p, m in inside.items() if isinstance(m, LoraPackedLinear)})
                paths = {path.rpartition(".")[0] for path, m in inside.items() if isinstance(m, LoraExperts)}
                for path in sorted(paths):
                    self._experts(i, path, inside)
                if i + 1 < len(self._runner.layers):
                    self._runner.advance(i)
            logger.info("Adapters of layer %d of %d.", i + 1, len(self._runner.layers))
        return self._gained

    def _linears(self, i: int, layers: Mapping[str, LoraPackedLinear]) -> None:
        modules: dict[str, Any] = {path: self._runner.weights.model.get_submodule(path) for path in layers}
        if not modules:
            return
        inside = [e for path, e in self._structure.experts.items() if path.startswith(self._runner.layers[i] + ".")]
        groups, busy = probe_inputs(modules, inside, lambda: self._runner.replay(i, PROBED))
        hessians = {p: Hessian.zeros(1, modules[p].weight.shape[1], modules[p].weight.device) for p in groups}
        with ExitStack() as stack:
            for experts in [] if busy else inside:
                stack.enter_context(experts.idle())
            stack.enter_context(observe_linears(modules, hessians))
            self._runner.replay(i)
        for leader, paths in groups.items():
            for path in paths:
                weight, layer = modules[path].weight.data, layers[path]
                gains = _Gains()
                weight.copy_(self._solve(layer, 0, [weight], hessians[leader].total[0], gains)[0])
                self._gained[path] = gains.share

    def _experts(self, i: int, path: str, layers: Layers) -> None:
        experts = self._structure.experts[path]
        roles = {role: layers[f"{path}.{role}"] for role in ("gate_up", "down") if f"{path}.{role}" in layers}
        kept = next(iter(roles.values())).base_layer.experts
        gains = {role: _Gains() for role in roles}
        matrices: dict[tuple[int, str], Tensor] = {}
        for which in chunks(experts, kept, HESSIANS):
            hessians = self._count(i, experts, which)
            for role, layer in roles.items():
                names = [p.name for p in layer.base_layer.projections]
                for n, expert in enumerate(which):
                    dense = [experts.matrix(expert, name) for name in names]
                    done = self._solve(layer, expert, dense, hessians.roles[role].total[n], gains[role])
                    matrices |= {(expert, name): matrix for name, matrix in zip(names, done, strict=True)}
        # only now: the Hessians of all experts are those of the layer as it came
        for (expert, name), matrix in matrices.items():
            experts.matrix(expert, name).copy_(matrix)
        for expert in set(range(experts.num_experts)) - set(kept):
            experts.drop(expert)
        self._gained |= {f"{path}.{role}": own.share for role, own in gains.items()}

    def _count(self, i: int, experts: Experts, which: Sequence[int]) -> ExpertHessians:
        hessians = ExpertHessians(experts, which)
        with experts.observe(hessians.record):
            self._runner.replay(i)
        return hessians

    def _solve(self, layer: Any, expert: int, dense: Sequence[Tensor], hessian: Tensor, gains: _Gains) -> list[Tensor]:
        """Sets an adapter's factors for matrices that read the same input; returns what they now stand for."""
        own = [linear for linear, other, _ in layer._matrices() if other == expert]
        packed = torch.cat([linear.dequantize(torch.float32) for linear in own])
        error = torch.cat([matrix.to(torch.float32) for matrix in dense]).to(packed.device) - packed
        b, a = low_rank(error, hessian.to(packed.device), layer.r[self._adapter], self._damping)
        gains.add(error, error - b @ a, hessian.to(packed.device))
        layer.set_factors(self._adapter, expert, a, b / layer.scaling[self._adapter])
        return list((packed + b @ a).split([matrix.shape[0] for matrix in dense]))


class _Gains:
    """Sums of tr(E H E^T) before and after."""

    def __init__(self) -> None:
        self._before = self._after = 0.0

    def add(self, before: Tensor, after: Tensor, hessian: Tensor) -> None:
        self._before += float(((before @ hessian) * before).sum())
        self._after += float(((after @ hessian) * after).sum())

    @property
    def share(self) -> float:
        return 1 - self._after / self._before if self._before > 0 else 0.0
