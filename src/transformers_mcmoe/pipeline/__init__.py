# SPDX-License-Identifier: Apache-2.0
"""compress(): the one ordered list of stages from a dense checkpoint to packed layer files.

1. prepare: which matrices there are, whether the budget can be met, calibration tokens, the work folder
2. allocate: run the layers, measure routing and errors, choose a width per expert
3. quantize: round, pack and write every layer

With a budget per layer, 2 and 3 happen layer by layer in one pass over the model; with one budget for the model 3 is
a second pass. Nothing here knows transformers' hooks (`quantizer`) or the modules that run packed weights (`nn`).
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers_mcmoe.allocation import SCORES, solve, uniform
from transformers_mcmoe.allocation.budget import LayerSize, expert_budgets
from transformers_mcmoe.allocation.significance import ExpertStatistics
from transformers_mcmoe.calibration.data import calibration_tokens
from transformers_mcmoe.calibration.statistics import ExpertInputs, RoutingStatistics, output_errors
from transformers_mcmoe.config import FORMAT_VERSION, MCMoEConfig
from transformers_mcmoe.models.experts import Experts, FusedExperts
from transformers_mcmoe.models.stream import Checkpoint, LayerRunner, computing, open_runner, return_free_memory
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.plan import ExpertWidths, Matrix, Plan
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.quantization import dequantize, group_size_for, pack, quantize
from transformers_mcmoe.quantization.grid import CHUNK
from transformers_mcmoe.version import __version__
from transformers_mcmoe.workdir import WorkDir, fingerprint

logger = logging.getLogger(__name__)

# tokens per forward pass of a layer: activations stay small beside the weights
BATCH_TOKENS = 2048
# allocations that need the errors of every width
MEASURED = ("pmq", "f_norm")
# memory beside weights: activations of one batch, fp32 copies of one expert, libraries' buffers (docs/streaming.md)
OVERHEAD = 512 << 20

# (expert, width) -> its packed matrices by projection
Candidates = dict[tuple[int, int], dict[str, Tensor]]


@dataclass
class LayerResult:
    """What was measured of one experts module.

    Attributes:
        routing: token counts and routing weights, None if no tokens were run.
        errors: width -> eps of every expert.
        starved: experts that saw too few tokens to be measured on their own.
    """

    routing: RoutingStatistics | None = None
    errors: dict[int, list[float]] = field(default_factory=dict)
    starved: list[int] = field(default_factory=list)


@dataclass
class Compressed:
    """The result of `compress`.

    Attributes:
        plan: widths of every matrix.
        files: packed layer files, to be read after the dense ones.
        replaced: checkpoint names that packed tensors replace under other names.
        matrices: every matrix under the plan.
        layers: measurements by experts path.
        fallbacks: what was done otherwise than usual, and why.
        seconds: time per stage.
        tokens: calibration tokens run, 0 if none.
    """

    plan: Plan
    files: list[Path]
    replaced: list[str]
    matrices: list[Matrix]
    layers: dict[str, LayerResult]
    fallbacks: list[str]
    seconds: dict[str, float]
    tokens: int


def compress(
    model: Any, checkpoint_files: Sequence[str | Path], config: MCMoEConfig, *, dtype: torch.dtype, work_dir: Path
) -> Compressed:
    """Compress a dense checkpoint into packed layer files.

    Args:
        model: the transformers model on meta; it is not changed.
        checkpoint_files: its dense safetensors files.
        config: what to do.
        dtype: floating dtype of the layers while they are run.
        work_dir: folder for hidden states and for the finished layers, `layer-00000.safetensors`, ...

    Raises:
        ValueError, NotImplementedError, OSError: one sentence each, before any weight is read where possible.
    """
    started = time.monotonic()
    device = config.device or torch.device("cpu")
    meter = Meter(config.progress)
    with computing(), ExitStack() as stack:
        stack.callback(meter.close)
        structure = Structure(
            copy.deepcopy(model), config.attention_bits, config.shared_expert_bits, config.modules_to_not_convert
        )
        checkpoint = Checkpoint(checkpoint_files)
        budgets, tokens = _prepare(structure, config)
        _check_memory(structure, config, dtype)
        work = WorkDir(work_dir, _fingerprint(structure, config, checkpoint_files, tokens))
        work.claim(_disk_need(structure, tokens, dtype))
        stack.callback(work.clean)
        runner = open_runner(
            structure.model,
            checkpoint,
            structure.names,
            list(structure.experts),
            tokens,
            work.path,
            dtype=dtype,
            device=device,
            batch=max(1, BATCH_TOKENS // tokens.shape[1]),
            limit=config.max_memory_bytes or None,
        )
        if device.type == "cpu" and dtype.itemsize == 2:
            for experts in structure.experts.values():
                stack.enter_context(experts.in_blocks())
        job = _Job(structure, runner, config, budgets, work, meter)
        job.seconds["prepare"] = time.monotonic() - started
        plan, files = job.run()
    return Compressed(
        plan=plan,
        files=files,
        replaced=job.replaced,
        matrices=structure.matrices(plan),
        layers=job.layers,
        fallbacks=job.fallbacks,
        seconds=job.seconds,
        tokens=0 if config.plan is not None else tokens.numel(),
    )


def _prepare(structure: Structure, config: MCMoEConfig) -> tuple[dict[str, int], Tensor]:
    """Budget of every experts module, and calibration tokens; a given plan needs neither."""
    if config.plan is not None:
        structure.check(config.plan)
        return {}, torch.zeros(1, 8, dtype=torch.int64)
    linears = structure.linear_weights()
    sizes = [LayerSize(e.num_experts, structure.expert_weights(path)) for path, e in structure.experts.items()]
    fixed = sum(linears[path] * bits for path, bits in structure.linears.items())
    budgets = expert_budgets(config.bits, sizes, config.expert_bits, sum(linears.values()), fixed)
    _check_at_least(config, sizes, budgets)
    model = structure.model
    tokens = calibration_tokens(
        config.dataset,
        config.tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        model_name=getattr(model.config, "name_or_path", ""),
    )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens.shape[1] > limit:
        raise ValueError(f"seq_len={tokens.shape[1]} is longer than the {limit} positions of this model; lower it.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise ValueError(
            f"The calibration tokens reach id {int(tokens.max())}, but the model has {vocabulary} embeddings; "
            "give the model's own tokenizer."
        )
    return dict(zip(structure.experts, budgets, strict=True)), tokens


def _check_at_least(config: MCMoEConfig, sizes: Sequence[LayerSize], budgets: Sequence[int]) -> None:
    """Raise ValueError if a layer's budget cannot give `at_least` experts their widths."""
    asked = sum(config.at_least.values())
    for size, budget in zip(sizes, budgets, strict=True):
        least = sum(bits * count for bits, count in config.at_least.items())
        least += config.expert_bits[0] * (size.num_experts - asked)
        if asked > size.num_experts or least > budget:
            raise ValueError(
                f"at_least={config.at_least} cannot be met: a layer of {size.num_experts} experts has {budget} bits at "
                f"bits={config.bits}, but that takes {least}; ask for fewer, or raise bits."
            )


def _fingerprint(structure: Structure, config: MCMoEConfig, files: Sequence[str | Path], tokens: Tensor) -> str:
    parts = {
        "version": __version__,
        "format": FORMAT_VERSION,
        "config": config.to_dict(),
        "model": structure.model.config.to_dict(),
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return fingerprint(parts, files)


def _check_memory(structure: Structure, config: MCMoEConfig, dtype: torch.dtype) -> None:
    """Raise ValueError if `max_memory` is below the bound on the peak (docs/streaming.md)."""
    if config.max_memory is None:
        return
    layer, rest = (weights * dtype.itemsize for weights in structure.layer_sizes())
    need = 4 * layer + rest + OVERHEAD
    if need > config.max_memory_bytes:
        raise ValueError(
            f"max_memory={config.max_memory!r} is too little: 4 decoder layers of {layer / 1e9:.2f} GB, "
            f"{rest / 1e9:.2f} GB of embeddings and {OVERHEAD / 1e9:.2f} GB beside them may take {need / 1e9:.2f} GB; "
            "raise max_memory."
        )


def _disk_need(structure: Structure, tokens: Tensor, dtype: torch.dtype) -> int:
    """Bytes that hidden states and packed layers (at 4 bits) take at most."""
    hidden = next(iter(structure.experts.values())).projections[0].in_features
    weights = sum(structure.linear_weights().values())
    weights += sum(structure.expert_weights(path) * e.num_experts for path, e in structure.experts.items())
    return tokens.numel() * hidden * dtype.itemsize + weights // 2


class _Job:
    """The stages over the layers of one model."""

    def __init__(
        self,
        structure: Structure,
        runner: LayerRunner,
        config: MCMoEConfig,
        budgets: dict[str, int],
        work: WorkDir,
        meter: Meter,
    ) -> None:
        self.structure, self.runner, self.config = structure, runner, config
        self.budgets, self.work, self.meter = budgets, work, meter
        self.layers: dict[str, LayerResult] = {path: LayerResult() for path in structure.experts}
        self.index = {path: index for index, path in enumerate(structure.experts)}
        self.replaced: list[str] = []
        self.fallbacks = [f"The whole dense model was loaded: {runner.reason}."] if runner.reason else []
        self.seconds: dict[str, float] = {}
        self.keys: dict[str, list[str]] = {}  # model tensor -> checkpoint tensors it is made of
        self.originals: dict[str, str] = {}  # model name after renamings only -> checkpoint tensor
        for key, target in sorted(runner.weights.targets.items()):
            self.keys.setdefault(target, []).append(key)
            self.originals[structure.names.renamed(key)] = key

    def run(self) -> tuple[Plan, list[Path]]:
        """All stages; returns the plan and the packed files."""
        plan = self.config.plan
        if plan is not None:
            plan = plan if plan.linears else Plan(plan.experts, self.structure.linears)
        elif self.config.budget == "layer" or self.config.allocation == "uniform":
            return self._timed("quantize", self._layer_by_layer)
        else:
            plan = self._timed("allocate", self._allocate_model)
        return plan, self._timed("quantize", lambda: self._quantize(plan))

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        self.meter.start(stage, len(self.runner.layers))
        started = time.monotonic()
        result = work()
        self.seconds[stage] = time.monotonic() - started
        return result

    def _inside(self, i: int, paths: Any) -> list[str]:
        """Those of the module paths that lie in decoder layer i."""
        return [path for path in paths if path.startswith(self.runner.layers[i] + ".")]

    def _layer_by_layer(self) -> tuple[Plan, list[Path]]:
        """One pass: each layer is measured, allocated and packed; the next one sees its rounded outputs."""
        widths: dict[str, ExpertWidths] = {}
        files = []
        for i in range(len(self.runner.layers)):
            paths = self._inside(i, self.structure.experts)
            packed: dict[str, Candidates] = {}
            with self.runner.loaded(i):
                if paths:
                    inputs, _ = self._observe(paths, self.runner.replay, i)
                    packed = {path: self._measure(path, inputs[path]) for path in paths}
                    widths |= {path: ExpertWidths.of(self._allocate_layer(path)) for path in paths}
                files.append(self._write(i, Plan(widths, self.structure.linears), packed))
                packed.clear()
                if i + 1 < len(self.runner.layers) and not self.runner.recomputes:
                    self.runner.advance(i)
            self.meter.layer_done()
        return Plan(widths, self.structure.linears), files

    def _allocate_model(self) -> Plan:
        """First pass of a model-wide budget: costs of all layers on dense activations, then one program."""
        cost, price, group = [], [], []
        for i in range(len(self.runner.layers)):
            paths = self._inside(i, self.structure.experts)
            with self.runner.loaded(i):
                inputs, norm = self._observe(paths, self.runner.advance, i)
                for path in paths:
                    self._measure(path, inputs[path])
                    # errors of different layers compare relative to the hidden states they are added to
                    cost.append(self._cost(path, 1 / max(norm, 1e-30)))
                    price.append(self._price(path))
                    group.append(np.full(len(price[-1]), self.index[path]))
            self.meter.layer_done()
        groups = np.concatenate(group)
        weights = {path: self.structure.expert_weights(path) for path in self.structure.experts}
        budget = sum(bits * weights[path] for path, bits in self.budgets.items())
        choice = solve(np.concatenate(cost), np.concatenate(price), budget, group=groups, at_least=self._at_least())
        bits = np.asarray(self.config.expert_bits)[choice]
        widths = {path: ExpertWidths.of(bits[groups == index]) for path, index in self.index.items()}
        return Plan(widths, self.structure.linears)

    def _quantize(self, plan: Plan) -> list[Path]:
        """Pack every layer under a plan; rounding needs no activations, so nothing is run."""
        files = []
        for i in range(len(self.runner.layers)):
            with self.runner.loaded(i):
                files.append(self._write(i, plan, {}))
            self.meter.layer_done()
        return files

    def _observe(self, paths: list[str], run: Callable[[int], float], i: int) -> tuple[dict[str, ExpertInputs], float]:
        """Run layer i, and count and sample what reaches its experts; also the norm of the layer's outputs."""
        inputs: dict[str, ExpertInputs] = {}
        with ExitStack() as stack:
            for path in paths:
                file = self.work.path / f"expert_inputs-{len(inputs)}.bin"
                inputs[path] = ExpertInputs(self.structure.experts[path].num_experts, file, self.config.seed)
                stack.enter_context(self.structure.experts[path].observe(inputs[path].record))
            norm = run(i)
        for path, seen in inputs.items():
            self.layers[path].routing = seen.routing
        return inputs, norm

    def _measure(self, path: str, inputs: ExpertInputs) -> Candidates:
        """Errors of every width of every expert; returns the packed matrices they were measured with."""
        experts, result = self.structure.experts[path], self.layers[path]
        result.starved = [e for e in range(experts.num_experts) if inputs.is_starved(e)]
        packed: Candidates = {}
        if self.config.allocation not in MEASURED:
            return packed
        if result.starved:
            self._fall_back(
                f"{path}: experts {result.starved} saw too few calibration tokens; their errors were measured on "
                "tokens of all experts of the layer, and those that saw none count as if they had seen one."
            )
        every = list(range(experts.num_experts))
        for bits in self.config.expert_bits:
            packed |= {(e, bits): p for e, p in self._round(experts, every, {"gate_up": bits, "down": bits}).items()}
        result.errors = {bits: [] for bits in self.config.expert_bits}
        for expert in every:
            rebuilt = (
                {p.name: dequantize(packed[expert, bits][p.name], bits, p.in_features) for p in experts.projections}
                for bits in self.config.expert_bits
            )
            errors = output_errors(experts, expert, inputs.sample(expert), rebuilt)
            for bits, error in zip(self.config.expert_bits, errors, strict=True):
                result.errors[bits].append(error)
            self.meter.expert_done(expert, experts.num_experts)
        return packed

    def _fall_back(self, reason: str) -> None:
        logger.warning(reason)
        self.fallbacks.append(reason)

    def _round(self, experts: Experts, which: list[int], bits: dict[str, int]) -> dict[int, dict[str, Tensor]]:
        """Packed matrices of some experts, each projection at the width of its role.

        Rows are rounded one by one, so small experts are rounded many at a time.
        """
        packed: dict[int, dict[str, Tensor]] = {expert: {} for expert in which}
        for p in experts.projections:
            size = group_size_for(p.in_features, self.config.group_size)
            together = max(1, CHUNK // (p.out_features * p.in_features))
            for start in range(0, len(which), together):
                part = which[start : start + together]
                rows = torch.cat([experts.matrix(expert, p.name) for expert in part])
                rounded = pack(quantize(rows, bits[p.role], size)).cpu()
                for expert, matrix in zip(part, rounded.split(p.out_features), strict=True):
                    packed[expert][p.name] = matrix.clone()
                return_free_memory()
        return packed

    def _cost(self, path: str, scale: float = 1.0) -> np.ndarray:
        """Cost [E, J] of every width for every expert of a module, errors multiplied by `scale`."""
        config, result = self.config, self.layers[path]
        if result.routing is None or int(result.routing.tokens.sum()) == 0:
            raise ValueError(f"No calibration token reached the experts of '{path}'; use other calibration data.")
        count = len(result.routing.tokens)
        errors = [result.errors.get(bits, [0.0] * count) for bits in config.expert_bits]
        # an expert without tokens is of little significance, not of none
        tokens, weight = result.routing.tokens.to(torch.float64).numpy(), result.routing.weight.numpy()
        statistics = ExpertStatistics(
            np.maximum(tokens, 1.0),
            np.where(tokens > 0, weight, weight.sum() / tokens.sum()),
            np.asarray(errors, dtype=np.float64).T * scale,
        )
        return SCORES[config.allocation](
            statistics,
            config.expert_bits,
            alpha=config.alpha,
            beta=config.beta,
            gamma=config.gamma,
            rng=np.random.default_rng([config.seed, self.index[path]]),
        )

    def _price(self, path: str) -> np.ndarray:
        """Bits [E, J] of every width for every expert of a module."""
        widths = np.asarray(self.config.expert_bits, dtype=np.float64)
        return np.tile(widths * self.structure.expert_weights(path), (self.structure.experts[path].num_experts, 1))

    def _at_least(self) -> dict[int, int] | None:
        return {self.config.expert_bits.index(bits): n for bits, n in self.config.at_least.items()} or None

    def _allocate_layer(self, path: str) -> np.ndarray:
        """Widths [E] of one experts module under its own budget."""
        config, bits = self.config, np.asarray(self.config.expert_bits)
        if config.allocation == "uniform":
            rng = np.random.default_rng([config.seed, self.index[path]])
            count = self.structure.experts[path].num_experts
            return bits[uniform(count, config.expert_bits, self.budgets[path], rng)]
        budget = self.budgets[path] * self.structure.expert_weights(path)
        return bits[solve(self._cost(path), self._price(path), budget, at_least=self._at_least())]

    def _write(self, i: int, plan: Plan, packed: dict[str, Candidates]) -> Path:
        """Pack layer i into its file, and give the layer in memory the rounded weights."""
        tensors: dict[str, Tensor] = {}
        for path in self._inside(i, self.structure.experts):
            self._pack_experts(self.structure.experts[path], plan.experts[path], packed.get(path, {}), tensors)
        for path in self._inside(i, plan.linears):
            self._pack_linear(path, plan.linears[path], tensors)
        return self.work.write_layer(i, tensors)

    def _pack_experts(
        self, experts: Experts, widths: ExpertWidths, candidates: Candidates, tensors: dict[str, Tensor]
    ) -> None:
        leaves = self.structure.names.leaves(experts)
        ready = self._choose(experts, widths, candidates)
        for expert in range(experts.num_experts):
            if expert not in ready:
                experts.drop(expert)
                for p in experts.projections:
                    name = experts.tensor(expert, leaves[p.name])
                    self.replaced += self.keys.get(f"{name}.weight", []) + self.keys.get(f"{name}.bias", [])
                continue
            for p in experts.projections:
                name, packed = experts.tensor(expert, leaves[p.name]), ready[expert][p.name]
                tensors[self._published(f"{name}.weight")] = packed
                rebuilt = dequantize(packed, widths.of_role(p.role)[expert], p.in_features)
                experts.matrix(expert, p.name).copy_(rebuilt)
                bias = experts.bias(expert, p.name)
                if bias is not None and isinstance(experts, FusedExperts):
                    tensors[self._published(f"{name}.bias")] = bias.to("cpu", copy=True).contiguous()
            return_free_memory()
        if isinstance(experts, FusedExperts):
            self._replace(experts, tensors)

    def _choose(self, experts: Experts, widths: ExpertWidths, candidates: Candidates) -> dict[int, dict[str, Tensor]]:
        """Packed matrices of every expert that is kept, at its widths; those already measured are not rounded again."""
        ready: dict[int, dict[str, Tensor]] = {}
        missing: dict[tuple[int, int], list[int]] = {}
        for expert, pair in enumerate(zip(widths.gate_up, widths.down, strict=True)):
            if pair[0] == pair[1] and (expert, pair[0]) in candidates:
                ready[expert] = candidates[expert, pair[0]]
            elif pair[1]:
                missing.setdefault(pair, []).append(expert)
        for (gate_up, down), which in missing.items():
            ready |= self._round(experts, which, {"gate_up": gate_up, "down": down})
        return ready

    def _replace(self, experts: FusedExperts, tensors: dict[str, Tensor]) -> None:
        """The guard tensor of families that are fused on disk; names of dense tensors that nothing reads any more."""
        keys = [key for name in experts.parameter_names() for key in self.keys.get(f"{experts.path}.{name}", [])]
        if self.structure.names.is_fused_on_disk(experts):
            tensors[keys[0]] = torch.empty(0, dtype=torch.uint8)
        self.replaced += [key for key in keys if key not in tensors]

    def _pack_linear(self, path: str, bits: int, tensors: dict[str, Tensor]) -> None:
        weight = self.structure.model.get_submodule(path).weight.data
        rounded = quantize(weight, bits, group_size_for(weight.shape[1], self.config.group_size))
        tensors[self._published(f"{path}.weight")] = pack(rounded).cpu()
        weight.copy_(rounded.dequantize())

    def _published(self, name: str) -> str:
        """The checkpoint's own name for a tensor, or the family's where the checkpoint has none."""
        if name in self.originals:
            return self.originals[name]
        layer = ".".join(name.split(".")[:-4])
        example = next((key for target, keys in self.keys.items() if target.startswith(layer) for key in keys), None)
        return self.structure.names.published(name, example)


def unread_patterns(structure: Structure, replaced: Sequence[str]) -> set[str]:
    """Patterns for the loader's names of dense tensors that packed ones replace under other names."""
    names = structure.names
    return {f"^{re.escape(name)}$" for key in replaced for name in (names.renamed(key), names.unprefixed(key))}
