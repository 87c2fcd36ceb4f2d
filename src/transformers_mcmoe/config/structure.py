# SPDX-License-Identifier: Apache-2.0
"""PruneConfig and RankConfig: which experts are dropped for good, and what takes the place of the others' matrices.

Knows options and their ranges, no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers_mcmoe.config.pruning import is_number, read_options
from transformers_mcmoe.config.values import check, is_width
from transformers_mcmoe.quantization.packing import WIDTHS

METHODS = ("moe_i2", "naee", "reap", "frequency", "random")
IMPORTANCES = ("local", "loss")


@dataclass(frozen=True)
class PruneConfig:
    """Dropping experts before what is left is quantized.

    A token that was routed to a dropped expert is routed anew among the kept ones. `bits` stays the average over all weights,
    of which those of dropped experts take none: the kept ones get more.

    Args:
        ratio: share of all experts that is dropped, or "auto": one program chooses widths and what is dropped, and its plan is taken
            only if it is nearer to the dense model on sequences kept for that than the plan of widths alone (docs/structure.md).
        method: "moe_i2" (arXiv 2411.01016, stage 1: layers drop by their importance, sets are searched for and combined over
            neighbouring layers), "naee" (arXiv 2402.14800: the best set of each layer, the same number everywhere), "reap"
            (arXiv 2510.13999: those of the least mean routing weight times output norm), "frequency" (those that fewest tokens are
            routed to), or "random".
        importance: of an expert, for "moe_i2": "local" is the change of its block's output without it, "loss" that of the
            model's loss, which takes a pass through the later layers for every expert.
        tokens: calibration tokens that blocks are looked at on; fewer where experts are so many that their inner
            products, of `field` layers together, would take more than 192 MB.
        candidates: K, sets of each layer that are combined with those of its neighbours.
        field: T, layers whose sets are combined, and which are in memory together.
        population: of the genetic search, where not all sets can be tried.
        generations: of it.

    Raises:
        ValueError: an option is outside its range.
    """

    ratio: float | str = 0.25
    method: str = "moe_i2"
    importance: str = "local"
    tokens: int = 4096
    candidates: int = 3
    field: int = 3
    population: int = 100
    generations: int = 50

    def __post_init__(self) -> None:
        share = is_number(self.ratio) and 0 < self.ratio < 1  # type: ignore[operator]
        check(share or self.auto, "prune", self.ratio, "a share in (0, 1), or 'auto'")
        check(self.method in METHODS, "method", self.method, f"one of {METHODS}")
        check(self.importance in IMPORTANCES, "importance", self.importance, f"one of {IMPORTANCES}")
        fixed = (
            "method",
            "importance",
            "candidates",
            "field",
            "population",
            "generations",
        )  # all but ratio and tokens
        given = [name for name in fixed if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        check(
            not (self.auto and given),
            "prune",
            "auto",
            f"left without {', '.join(given)}, which the program has no use for",
        )
        local = self.importance == "local" or self.method == "moe_i2"
        check(
            local, "importance", self.importance, "'local' with another method than 'moe_i2', which has no use for it"
        )
        for name, least in (("tokens", 1), ("candidates", 1), ("field", 1), ("population", 4), ("generations", 0)):
            value = getattr(self, name)
            integer = isinstance(value, int) and not isinstance(value, bool)
            check(integer and value >= least, name, value, f"an integer >= {least}")

    @property
    def auto(self) -> bool:
        """Whether a program chooses what is dropped."""
        return self.ratio == "auto"

    @property
    def share(self) -> float:
        """`ratio` as a number, 0 where a program chooses."""
        return 0.0 if isinstance(self.ratio, str) else self.ratio

    @property
    def even(self) -> bool:
        """Whether all layers drop the same share, up to remainders and groups."""
        return self.method != "moe_i2"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def read(cls, value: Any) -> PruneConfig | None:
        """What a user or config.json gives: None and False are none, a number or "auto" the ratio, True a quarter, a dict the JSON form.

        Raises:
            ValueError: something else, or an unknown option.
        """
        return cls(ratio=value) if is_number(value) or value == "auto" else read_options(cls, "prune", value)


@dataclass(frozen=True)
class RankConfig:
    """Two thin factors in the place of every matrix of the experts, or beside it (arXiv 2411.01016, stage 2).

    Args:
        mean: rank, over the kept experts of a layer, met as far as multiples of `step` allow, or "auto": one program chooses widths and ranks, as with `PruneConfig`.
        bits: width of the factors.
        base: keep the matrices, at the widths that `bits` of the compression allows, and let factors make up for their rounding; their
            codes count in that average. Without it the average follows from the ranks.
        whitened: factors change the experts' outputs on calibration tokens least; else, or with rounding="nearest", their matrices, as in
            the paper.
        exponent: of an expert's importance, by which ranks differ in a layer; 0 for one rank.
        step: ranks are multiples of it.

    Raises:
        ValueError: an option is outside its range.
    """

    mean: float | str = 64
    bits: int = 8
    base: bool = False
    whitened: bool = True
    exponent: float = 0.15
    step: int = 32

    def __post_init__(self) -> None:
        positive = is_number(self.mean) and self.mean > 0  # type: ignore[operator]
        check(positive or self.auto, "rank", self.mean, "a number > 0, or 'auto'")
        check(is_width(self.bits), "bits", self.bits, f"one of {WIDTHS}")
        for name in ("base", "whitened"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        check(is_number(self.exponent) and self.exponent >= 0, "exponent", self.exponent, "a number >= 0")
        step = isinstance(self.step, int) and self.step > 0 and self.step % 32 == 0
        check(step, "step", self.step, "a positive multiple of 32, as groups of columns are")
        plain = not self.base and self.exponent == 0.15
        check(
            plain or not self.auto, "rank", "auto", "left without base and exponent, which the program has no use for"
        )
        check(self.auto or self.mean >= self.step, "rank", self.mean, f"at least step={self.step}")  # type: ignore[operator]

    @property
    def auto(self) -> bool:
        """Whether a program chooses ranks."""
        return self.mean == "auto"

    @property
    def given(self) -> float:
        """`mean` as a number, 0 where a program chooses."""
        return 0.0 if isinstance(self.mean, str) else self.mean

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def read(cls, value: Any) -> RankConfig | None:
        """What a user or config.json gives: None and False are none, a number or "auto" the mean, True the defaults, a dict the JSON form.

        Raises:
            ValueError: something else, or an unknown option.
        """
        return cls(mean=value) if is_number(value) or value == "auto" else read_options(cls, "rank", value)
