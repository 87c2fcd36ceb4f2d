# SPDX-License-Identifier: Apache-2.0
"""MCMoEConfig: every knob of a compression, validated on construction and stored as JSON in config.json.

Knows no model: whether a budget is feasible depends on shapes and is checked by the pipeline.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_mcmoe.config.otp import OTPConfig
from transformers_mcmoe.config.pruning import ODPConfig
from transformers_mcmoe.config.structure import PruneConfig, RankConfig
from transformers_mcmoe.config.validation import validate
from transformers_mcmoe.config.values import (
    PRESETS,
    as_bytes,
    as_widths,
    check,
    is_local,
    is_mixture,
    read_plan,
    refuse_unknown,
)
from transformers_mcmoe.plan import Plan

logger = logging.getLogger(__name__)

QUANT_METHOD = "mcmoe"
FORMAT_VERSION = 1
# belong to one run on one machine, never stored
RUNTIME = (
    "tokenizer",
    "processor",
    "work_dir",
    "max_memory",
    "target_size",
    "device",
    "progress",
    "asked",
    "resume",
    "world_size",
    "leaves",
    "blocks",
)


class MCMoEConfig(QuantizationConfigMixin):
    """How to compress a Mixture-of-Experts model, and, in a packed checkpoint, how it was compressed.

    Args:
        bits: average code width over all quantized weights, in bits; the papers' "2.54". Group scales and zeros
            (0.25 bits per weight at groups of 128), embeddings and lm_head are not counted.
        target_size: bytes (or "16GB") that the weights' files may take, scales, zeros and what is not quantized included; it
            takes the place of `bits`.
        expert_bits: candidate widths per expert, each of 1, 2, 3, 4, 8.
        attention_bits: width of attention projections; 16 leaves them as they are (and out of the average). Several are candidates, of
            which one is chosen per projection within `bits`: where one program spans the model (`whole`), with (4, 8) the default; else 4.
        shared_expert_bits: the same for shared experts and dense MLPs.
        group_size: most columns that share a scale, a multiple of 32; the largest multiple of 32 that divides a
            matrix's in_features is taken.
        budget: "layer" gives every layer the same bits per expert weight (the papers); "model" spends one budget
            over all layers (two streamed passes). Default: "model" where costs of layers compare, that is for "pmq" with
            eps="final" and for "bsp"; else "layer".
        allocation: "pmq" (significance phi^alpha * w^beta * eps^gamma, arXiv 2410.06270) or a baseline: "uniform",
            "random", "frequency", "routing_weight", "f_norm", "hessian" (HAWQ), or "bsp" (whole layers at one of two
            expert_bits by their block score).
        alpha: exponent of the routing frequency phi. 0 here, 1 in the paper: eps already sums over the tokens routed
            to an expert, each with its routing weight (docs/quantization.md has what the factors cost).
        beta: exponent of the routing weight w; 0 here, 1.5 in the paper.
        gamma: exponent of the error eps.
        eps: "final" measures errors with the quantizer that is used, on sequences kept from its Hessians, relative to
            the hidden states; "nearest" with plain rounding over the whole range, absolute, as the papers do.
        granularity: "expert" gives all matrices of an expert one width; "projection" chooses for gate and up, and for down, apart, and
            "layer" gives all experts of a layer one, which formats of other engines need (`mcmoe export`); both where one program
            spans the model (`whole`), with "projection" the default.
        expert_parallel: ranks that the experts will be served on, in blocks of equal size; each rank's experts get the same share of the
            budget, so that no rank holds more bytes than another, and the report says what each is sent (docs/scale.md).
        at_least: width -> least number of experts of a layer that take it; {3: 1, 2: 1} is the papers' constraint.
        tuning_steps: steps of training on the KL divergence from the dense model's output, once the model is packed: scales and
            zeros of all matrices, norms and routers move, codes stay. A step is one calibration sequence, or several that have
            1,024 tokens together; the packed model is in memory, with 40 bytes per group and the logits of a sequence beside it
            (docs/streaming.md).
        tuning_rate: highest learning rate of that: a step changes a value by about this share.
        preset: "fast" is one pass over 32 sequences with uniform widths; "best" has eight sweeps of coordinate descent
            instead of two, and 128 tuning_steps; "default" sets nothing; "paper" sets what the text of arXiv 2410.06270 says: PMQ per
            layer with alpha 1, beta 1.5, gamma 2, errors of plain rounding, at least one 3-bit and one 2-bit expert a layer.
        rounding: "gptq" (error feedback on calibration data) or "nearest" (data-free).
        fit: grid of a group: "search" (clipped range of least error), "minmax", or "hqq" (half-quadratic zero).
        symmetric: grids are symmetric around 0.
        integer_zeros: zeros are rounded to a code.
        act_order: GPTQ rounds columns with large activations first; groups keep their columns.
        damping: share of its mean that is added to a Hessian's diagonal.
        sequential: down projections are fitted and rounded behind the rounded gate and up projections, whose errors they
            make up for; one more pass over a layer.
        sweeps: rounds of coordinate descent over codes and grids that follow GPTQ; 0 for none.
        activations: a layer is calibrated on what the "compressed" layers before it return, or the "dense" ones.
        dataset: calibration text: Hub id "org/name[:subset[:split[:field]]]" or a dict with path, subset, split,
            field; a local .txt, .jsonl or .parquet file; a list of strings; token ids [N, T]; or several ids and files with
            their shares, {"web.txt": 0.7, "code.jsonl": 0.3}. Default: C4. For vision-language models also samples with images, which
            is their default (docs/vision.md): a list of {"image": .., "text": ..} or of chat messages, a folder with images and a
            .jsonl file, or a Hub id.
        num_samples: calibration sequences.
        seq_len: tokens per calibration sequence; the most of a sample with images.
        tokenizer: tokenizer object or id; default the model's own.
        processor: processor object or id, for samples with images; default the model's own.
        image_weight: what a token of an image counts in significances and errors relative to one of text.
        modules_to_not_convert: names or patterns of modules that stay as they are.
        seed: seed of every random choice.
        work_dir: folder for hidden states and finished layers; default a temporary one.
        resume: go on with what an earlier run of the same compression has finished in `work_dir`, if it has.
        world_size: processes that torchrun or accelerate has started and that share the work; each gets the model (docs/scale.md). Default:
            this process works alone.
        max_memory: bytes (or "12GB") that compression may take; checked against the estimate before it starts.
        device: where layers are run; default "cpu".
        plan: a plan (dict, or path of a JSON file, also a packed model's config.json) that is used instead of the allocation; GPTQ still needs a dataset.
        prune: drop experts for good, before the rest is quantized: their share of all experts, or a `PruneConfig`.
        rank: two thin factors in the place of the experts' matrices, or beside them: their mean rank, or a `RankConfig`.
        odp: dynamic expert pruning at run time: True, or an `ODPConfig`. None keeps what a packed checkpoint was saved
            with, False switches it off.
        otp: learned expert pruning instead: True, or an `OTPConfig`; its routers are trained on the calibration data once the
            model is compressed. For a packed checkpoint that has them, False switches it off, True on, and an
            `OTPConfig(target=...)` changes the share that is skipped.
        progress: called with a `progress.Progress` after every step; default logging and a progress bar.

    Raises:
        ValueError: an option has a value outside its range.
        TypeError: there is no such option.
    """

    def __init__(
        self,
        bits: float = 2.54,
        *,
        target_size: int | str | None = None,
        expert_bits: Sequence[int] = (1, 2, 3, 4),
        attention_bits: int | Sequence[int] | None = None,
        shared_expert_bits: int | Sequence[int] | None = None,
        group_size: int = 128,
        budget: str | None = None,
        allocation: str = "pmq",
        alpha: float = 0.0,
        beta: float = 0.0,
        gamma: float = 2.0,
        eps: str = "final",
        granularity: str | None = None,
        expert_parallel: int = 1,
        at_least: Mapping[int, int] | None = None,
        preset: str | None = None,
        rounding: str = "gptq",
        fit: str = "search",
        symmetric: bool = False,
        integer_zeros: bool = False,
        act_order: bool = True,
        damping: float = 0.01,
        sequential: bool = True,
        sweeps: int = 2,
        activations: str = "compressed",
        tuning_steps: int = 0,
        tuning_rate: float = 2e-3,
        dataset: Any = None,
        num_samples: int = 128,
        seq_len: int = 2048,
        tokenizer: Any = None,
        processor: Any = None,
        image_weight: float = 1.0,
        modules_to_not_convert: Sequence[str] | None = None,
        seed: int = 0,
        work_dir: str | Path | None = None,
        resume: bool = False,
        world_size: int | None = None,
        max_memory: int | str | None = None,
        device: str | torch.device | None = None,
        plan: Mapping[str, Any] | str | Path | Plan | None = None,
        prune: float | str | PruneConfig | Mapping[str, Any] | None = None,
        rank: float | str | RankConfig | Mapping[str, Any] | None = None,
        odp: bool | ODPConfig | Mapping[str, Any] | None = None,
        otp: bool | OTPConfig | Mapping[str, Any] | None = None,
        progress: Callable[[Any], None] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a plain string, as for any external method
        self.bits, self.target_size = bits, target_size
        self.expert_bits = tuple(expert_bits) if isinstance(expert_bits, Sequence) else expert_bits
        self.granularity = granularity
        self.expert_parallel = expert_parallel
        self.attention_bits, self.shared_expert_bits = as_widths(attention_bits), as_widths(shared_expert_bits)
        self.group_size = group_size
        self.budget = budget
        self.allocation = allocation
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        # JSON has only strings for keys
        self.at_least = {int(w) if str(w).isdigit() else w: count for w, count in (at_least or {}).items()}
        self.eps = eps
        self.preset = preset
        self.rounding = rounding
        self.fit, self.symmetric, self.integer_zeros = fit, symmetric, integer_zeros
        self.act_order, self.damping = act_order, damping
        self.sequential = sequential
        self.sweeps = sweeps
        self.activations = activations
        self.tuning_steps, self.tuning_rate = tuning_steps, tuning_rate
        self.dataset = dataset
        self.num_samples = num_samples
        self.seq_len = seq_len
        self.tokenizer, self.processor = tokenizer, processor
        self.image_weight = image_weight
        self.modules_to_not_convert = modules_to_not_convert or []
        self.seed = seed
        self.work_dir = Path(work_dir) if work_dir is not None else None
        self.resume = resume
        self.world_size = world_size
        self.max_memory = max_memory
        self.device = torch.device(device) if device is not None else None
        self.plan = read_plan(plan)
        self.prune, self.rank = PruneConfig.read(prune), RankConfig.read(rank)
        self.odp = ODPConfig.read(odp) if odp is not False else False
        self.otp = OTPConfig.read(otp) if otp is not False else False
        # whether ranks other than the first end once the layers are written
        self.leaves = False
        # matrices of 2 and 3 bits go onto llama.cpp's grids; the export sets it on a copy (`integrations.exports.requantized`)
        self.blocks = False
        # what a config given beside a packed checkpoint asks of its pruning
        self.asked: dict[str, Any] = {}
        self.progress = progress
        refuse_unknown(unknown)
        self._apply_preset()
        if self.budget is None:
            self.budget = "model" if self.relative_errors or allocation == "bsp" else "layer"
        choice = (4, 8) if self.whole else 4
        self.attention_bits = choice if self.attention_bits is None else self.attention_bits
        self.shared_expert_bits = choice if self.shared_expert_bits is None else self.shared_expert_bits
        if self.granularity is None:
            self.granularity = "projection" if self.whole else "expert"
        validate(self)

    @property
    def whole(self) -> bool:
        """Whether one program spans the model, in which all kinds of matrices compare: "pmq" with eps="final" and budget="model", alpha and
        beta 0, no at_least, and matrices to choose widths for."""
        plain = self.relative_errors and not (self.alpha or self.beta or self.at_least or self.only_factors)
        return plain and self.budget == "model"

    @property
    def joint(self) -> bool:
        """Whether one program chooses widths, ranks and what is dropped."""
        return (self.prune is not None and self.prune.auto) or (self.rank is not None and self.rank.auto)

    @property
    def drops(self) -> PruneConfig | None:
        """How a given share of the experts is dropped before widths are chosen; None if none is."""
        return None if self.prune is None or self.prune.auto else self.prune

    @property
    def factors(self) -> RankConfig | None:
        """The given mean rank; None if there is none."""
        return None if self.rank is None or self.rank.auto else self.rank

    @property
    def factored(self) -> bool:
        """Whether some experts may get factors, by a given plan or otherwise."""
        planned = self.plan is not None and any(any(widths.ranks) for widths in self.plan.experts.values())
        return planned or self.rank is not None

    @property
    def only_factors(self) -> bool:
        """Whether factors take the place of the experts' matrices, so that there are no widths to choose."""
        return self.factors is not None and not self.factors.base

    @property
    def relative_errors(self) -> bool:
        """Whether eps is relative to the hidden states that a token's error enters; the papers' is absolute."""
        return self.allocation == "pmq" and self.eps == "final"

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        check(self.preset in PRESETS, "preset", self.preset, f"one of {tuple(PRESETS)}")
        defaults = inspect.signature(MCMoEConfig.__init__).parameters
        for name, value in PRESETS[self.preset].items():
            given, default = getattr(self, name), defaults[name].default
            if given not in (value, default, {}):
                raise ValueError(
                    f"preset={self.preset!r} sets {name}={value!r}, but {name}={given!r} is given; drop one."
                )
            setattr(self, name, value)

    @property
    def max_memory_bytes(self) -> int:
        """`max_memory` in bytes, 0 if there is none."""
        return as_bytes(self.max_memory)

    @property
    def target_bytes(self) -> int:
        """`target_size` in bytes, 0 if there is none."""
        return as_bytes(self.target_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON form. The average is called `average_bits`: the Hub reads a field `bits` as an integer."""
        data = {key: value for key, value in self.__dict__.items() if key not in RUNTIME and not key.startswith("_")}
        data["average_bits"] = data.pop("bits")
        data["format_version"] = FORMAT_VERSION
        data["expert_bits"] = list(self.expert_bits)
        for name in ("attention_bits", "shared_expert_bits"):
            value = getattr(self, name)
            data[name] = list(value) if isinstance(value, tuple) else value
        data["at_least"] = {str(width): count for width, count in self.at_least.items()}
        data["plan"] = self.plan.to_dict() if self.plan is not None else None
        data["prune"] = self.prune.to_dict() if self.prune is not None else None
        data["rank"] = self.rank.to_dict() if self.rank is not None else None
        data["odp"] = self.odp.to_dict() if isinstance(self.odp, ODPConfig) else None
        data["otp"] = self.otp.to_dict() if isinstance(self.otp, OTPConfig) else None
        # texts and token ids given in memory are not stored, and of a file its name: folders are this machine's own
        data["dataset"] = self.dataset if isinstance(self.dataset, str | dict) else None
        if isinstance(self.dataset, Path) or (isinstance(self.dataset, str) and is_local(self.dataset)):
            data["dataset"] = Path(self.dataset).name
        if is_mixture(self.dataset):
            data["dataset"] = {Path(n).name if is_local(n) else str(n): share for n, share in self.dataset.items()}
        return data

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of a config that is given beside a packed checkpoint replaces the saved value."""
        asked = {"odp": self.odp, "otp": self.otp}
        return {"asked": {name: value for name, value in asked.items() if value is not None}}

    def __deepcopy__(self, memo: dict[int, Any]) -> MCMoEConfig:
        """transformers copies model configs with what is in them; data, tokenizer and callback are shared."""
        return copy.copy(self)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`; keys that this release does not know are ignored with a warning.

        Raises:
            ValueError: the checkpoint has a newer format version.
        """
        data = dict(config_dict)
        version = data.pop("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has mcmoe format version {version}, this release reads up to {FORMAT_VERSION}; "
                "update transformers_mcmoe."
            )
        data.pop("quant_method", None)
        if "average_bits" in data:
            data["bits"] = data.pop("average_bits")
        known = set(cls().__dict__)
        unknown = sorted(set(data) - known)
        if unknown:
            logger.warning("Ignoring unknown keys of quantization_config: %s.", ", ".join(unknown))
        return super().from_dict(
            {key: value for key, value in data.items() if key in known}, return_unused_kwargs, **kwargs
        )


# importing twice (a reload, a second install path) must not fail
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(MCMoEConfig)
