# SPDX-License-Identifier: Apache-2.0
"""Runs a decoder layer for what is seen of its tokens: routing, samples of experts' inputs, Hessians, rounded linear layers.

Knows one layer at a time and writes what it sees into `layers`; it chooses and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from transformers_mcmoe.calibration.hessians import DownHessians, ExpertHessians
from transformers_mcmoe.calibration.images import sees_images
from transformers_mcmoe.calibration.observing import LayerTokens
from transformers_mcmoe.calibration.statistics import ExpertInputs
from transformers_mcmoe.config import MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.memory import return_free_memory
from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.models.stream import LayerRunner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.allocating import MEASURED, LayerResult
from transformers_mcmoe.pipeline.journal import Record
from transformers_mcmoe.pipeline.rounding import chunks, round_linears
from transformers_mcmoe.routing import RoutingRatios, check_top_k, record_routing
from transformers_mcmoe.workdir import WorkDir

logger = logging.getLogger(__name__)


class Watcher:
    """Looks at the layers of one model.

    Args:
        structure: what is quantized.
        runner: runs its layers.
        config: how.
        work: where samples lie.
        limit: bytes that Hessians may take at once.

    Attributes:
        structure, runner, config: as given.
        layers: measurements by experts path.
        fallbacks: what was done otherwise than usual, and why.
    """

    def __init__(
        self, structure: Structure, runner: LayerRunner, config: MCMoEConfig, work: WorkDir, limit: int
    ) -> None:
        self.structure, self.runner, self.config = structure, runner, config
        self._work, self._limit = work, limit
        self.layers: dict[str, LayerResult] = {path: LayerResult() for path in structure.experts}
        self.fallbacks = [f"The whole dense model was loaded: {runner.reason}."] if runner.reason else []

    def tokens_of_layer(self) -> LayerTokens:
        """What will be known of a layer's tokens."""
        known = self.runner.tokens
        share = known.image_tokens() / max(1, known.numel())
        return LayerTokens(lambda: self.runner.images, self.config.image_weight, share)

    def inside(self, i: int, paths: Iterable[str]) -> list[str]:
        """Those of the module paths that lie in decoder layer i."""
        return [path for path in paths if path.startswith(self.runner.layers[i] + ".")]

    def linears(self, i: int, widths: Mapping[str, int], quick: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Linear layers of decoder layer i at their widths, see `round_linears`."""
        experts = [self.structure.experts[path] for path in self.inside(i, self.structure.experts)]

        def unreached(path: str) -> None:
            self.fall_back(f"{path}: no calibration token reached it; it was rounded to nearest.")

        return round_linears(self.runner, i, widths, experts, self.config, self._limit, unreached, quick)

    def passes(
        self, i: int, path: str, which: list[int], roles: Sequence[str], held_out: bool = False
    ) -> Iterator[tuple[list[int], ExpertHessians | None, ExpertInputs]]:
        """Runs of experts, with their Hessians of the roles that are asked for, and samples of all experts' inputs.

        The first pass over the tokens counts routing, too; each further run of experts costs one more pass. With
        `held_out`, some sequences are kept from the Hessians, and the samples are drawn from those alone.
        """
        experts = self.structure.experts[path]
        inputs: ExpertInputs | None = None
        if not which:  # all of them are other ranks'
            self.observe(i, path, None, held_out)
            return
        for run in chunks(experts, which, self._limit) if roles else [which]:
            counted = ExpertHessians(experts, run, roles) if roles else None
            if inputs is None:
                inputs = self.observe(i, path, counted, held_out)
            elif counted is not None:
                self._watch(i, path, counted, None, held_out)
            if counted is not None:
                for expert in (expert for expert in run if inputs.is_starved(expert)):
                    counted.clear(expert)
                    counted.record(expert, inputs.sample(expert).x)
            yield run, counted, inputs
            del counted
            return_free_memory()

    def deal(self, path: str, which: Sequence[int]) -> list[int]:
        """Those of a module's experts that this rank measures and rounds."""
        experts, config, routing = self.structure.experts[path], self.config, self.layers[path].routing
        tokens = None if routing is None else routing.tokens.tolist()
        even = self.runner.tokens.numel() / experts.num_experts
        shapes = [(p.out_features, p.in_features) for p in experts.projections]
        # products of weights and of factorizations, and of tokens with themselves
        rounding = sum((1 + 2 * config.sweeps) * rows * columns**2 for rows, columns in shapes)
        columns = {p.role: p.in_features for p in experts.projections}.values()
        rounding += sum(4 * size**3 for size in columns)
        each = sum(size**2 for size in columns)
        costs = [rounding + (even if tokens is None else tokens[expert]) * each for expert in which]
        world = self.runner.world
        return world.deal(which, world.first(lambda: costs))

    def behind(
        self, i: int, path: str, rounded: Mapping[int, Mapping[str, Tensor]], inputs: ExpertInputs
    ) -> DownHessians:
        """Hessians of the down projections of experts whose input projections are rounded; one more pass."""
        counted = DownHessians(self.structure.experts[path], rounded)
        self._watch(i, path, counted, None, False)
        for expert in (expert for expert in rounded if inputs.is_starved(expert)):
            counted.clear(expert)
            counted.record(expert, inputs.sample(expert).x)
        return counted

    def _watch(
        self,
        i: int,
        path: str,
        hessians: ExpertHessians | DownHessians | None,
        inputs: ExpertInputs | None,
        held_out: bool,
    ) -> None:
        """Run layer i with idle experts and record what reaches them."""
        experts, tokens = self.structure.experts[path], self.tokens_of_layer()

        def record(
            expert: int, x: Tensor, weights: Tensor | None, position: Tensor | None
        ) -> Callable[[], None] | None:
            position = tokens.find(x) if position is None else position
            held = tokens.held_out(expert, position, x.shape[0], self.runner.sequences) if held_out else None
            if inputs is not None:
                seen = tokens.of_images(position), tokens.counts(position, x.shape[0])
                inputs.record(expert, x, weights, tokens.norms(position), held, *seen)
            if hessians is None or expert not in hessians:
                return None
            counted = x if held is None else x[~held]
            return lambda: hessians.record(expert, counted)

        model = self.structure.model
        layer = model.get_submodule(self.runner.layers[i])
        # experts of a list are called one by one, with their own tokens
        block = None if isinstance(experts, FusedExperts) else model.get_submodule(path.rpartition(".")[0])
        with experts.idle(), experts.observe(record), tokens.observe(layer, experts.module, block):
            self.runner.replay(i)

    def observe(self, i: int, path: str, hessians: ExpertHessians | None, held_out: bool = False) -> ExpertInputs:
        """Run layer i with idle experts; count and sample what reaches them."""
        experts, result = self.structure.experts[path], self.layers[path]
        samples = self._work.scratch / "expert_inputs.bin"
        inputs = ExpertInputs(experts.num_experts, samples, self.config.seed)
        ratios = RoutingRatios(experts.num_experts)
        with record_routing(experts.module, experts, ratios):
            self._watch(i, path, hessians, inputs, held_out)
        if int(inputs.routing.tokens.sum()) == 0:
            raise ValueError(self.unreached(path))
        known = result.routing is not None
        result.routing, result.ratios = inputs.routing, ratios
        if isinstance(self.config.odp, ODPConfig) or isinstance(self.config.otp, OTPConfig):
            check_top_k(ratios.slots, path)
        result.starved = [e for e in self.structure.kept_of(path) if inputs.is_starved(e)]
        if result.starved and not known and (self.config.rounding == "gptq" or self.config.allocation in MEASURED):
            self.fall_back(
                f"{path}: experts {result.starved} saw too few calibration tokens; their errors and Hessians were "
                "taken from tokens of all experts of the layer, and those that saw none count as if they had seen one."
            )
        return inputs

    def unreached(self, path: str) -> str:
        """What to say where no token reached an experts module."""
        known, advice = self.runner.tokens, "use other calibration data"
        if sees_images(self.structure.model.config):
            if not known.image_tokens():
                advice = "none of them was of an image: give samples with images"
            elif known.image_tokens() == known.numel():
                advice = "all of them were of images: mix in text"
        return f"No calibration token reached the experts of '{path}'; {advice}."

    def remember(self, i: int, record: Record) -> None:
        """Put what was measured of the experts of layer i into a record."""
        record.data["layers"] = {}
        for path in self.inside(i, self.structure.experts):
            data, tensors = self.layers[path].to_record()
            record.data["layers"][path] = data
            record.tensors |= {f"{path}|{name}": tensor for name, tensor in tensors.items()}

    def recall(self, record: Record) -> None:
        """Inverse of `remember`."""
        for path, data in record.data["layers"].items():
            mine = {key.rpartition("|")[2]: x for key, x in record.tensors.items() if key.startswith(f"{path}|")}
            vars(self.layers[path]).update(vars(LayerResult.from_record(data, mine)))

    def fall_back(self, reason: str) -> None:
        """Log, and keep for the report, what is done otherwise than usual."""
        logger.warning(reason)
        self.fallbacks.append(reason)
