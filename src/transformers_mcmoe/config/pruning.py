# SPDX-License-Identifier: Apache-2.0
"""ODPConfig: which routed experts a token skips at run time, and how thresholds for that are chosen.

Knows options and their ranges, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from transformers_mcmoe.config.values import check

Options = TypeVar("Options")

METHODS = ("odp", "random", "mean", "variance", "kurtosis")
# options that thresholds depend on
DECISIVE = ("threshold", "quantile", "rate", "protect", "drop_all", "protect_images", "method")
# share of a sequence's tokens that "odp" keeps whole; other methods protect none unless asked to
PROTECT = 0.02


@dataclass(frozen=True)
class ODPConfig:
    """Dynamic expert pruning: routed experts that a token skips (arXiv 2410.06270, section 3.3).

    A token skips the expert in its j-th largest routing slot when `w_j < mu_j * w_1`. The most important tokens of a
    sequence keep all of theirs. At most one of `threshold`, `quantile` and `rate` may be given; none means
    `quantile=0.5`, the paper's median.

    Args:
        threshold: mu itself, the same for all slots and layers; 0 skips nothing.
        quantile: mu_j is this quantile of w_j / w_1 over the calibration tokens, per layer and slot.
        rate: mu, per layer, such that this share of the expert bytes that are routed to is skipped on calibration data.
        protect: share of a sequence's tokens that keep all their experts; default 0.02 for "odp", 0 else. With 0,
            "odp" is the threshold alone (NAEE, arXiv 2402.14800).
        protect_images: in vision-language models, share of a sequence's image tokens that keep all their experts, chosen among
            themselves, as `protect` then chooses among the tokens of text; None looks at all tokens together.
        causal: choose protected tokens from earlier tokens only, also within a prompt; then results do not depend on how
            a prompt is cut into calls. False, as the paper: a prompt is looked at as a whole.
        layers: "all", the numbers of decoder layers, or "auto": those that change the output least, as many as `max_kl`
            allows on calibration data.
        max_kl: with layers="auto", largest mean KL divergence (nats per token) from the model without pruning.
        renormalize: scale kept weights to the sum that all had; default: where the model's router normalises.
        method: "odp", or a comparator: "random" skips slots at random, "mean", "variance" and "kurtosis" reduce the
            tokens whose hidden vector has the lowest such statistic to their first expert. All but "odp" need `rate`.
        drop_all: share of a sequence's least important tokens that skip all routed experts.
        seed: seed of "random".
        thresholds: by experts module, what calibration found for its slots 2..K: mu, or for "random" the probability to
            skip, or for token statistics the share of tokens that are reduced.
        normalized: by experts module, whether routing weights always had the same sum.
        found_for: options that `thresholds` were found for; others have them found again.

    Raises:
        ValueError: an option is outside its range, or options contradict each other.
    """

    threshold: float | None = None
    quantile: float | None = None
    rate: float | None = None
    protect: float | None = None
    protect_images: float | None = None
    causal: bool = False
    layers: str | Sequence[int] = "all"
    max_kl: float | None = None
    renormalize: bool | None = None
    method: str = "odp"
    drop_all: float = 0.0
    seed: int = 0
    thresholds: Mapping[str, Sequence[float]] | None = None
    normalized: Mapping[str, bool] | None = None
    found_for: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check(self.method in METHODS, "method", self.method, f"one of {METHODS}")
        self._check_level()
        if self.protect is None:
            object.__setattr__(self, "protect", PROTECT if self.method == "odp" else 0.0)
        for name in ("protect", "drop_all"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < 1, name, value, "a share in [0, 1)")
        images = self.protect_images
        known = images is None or (is_number(images) and 0 <= images < 1)
        check(known, "protect_images", images, "a share in [0, 1), or left out")
        together = (images or 0.0) + self.drop_all
        check(together <= 1, "drop_all", self.drop_all, f"at most 1 - protect_images = {1 - (images or 0.0):g}")
        together = self.protect + self.drop_all  # type: ignore[operator]
        check(together <= 1, "drop_all", self.drop_all, f"at most 1 - protect = {1 - self.protect:g}")  # type: ignore[operator]
        for name in ("causal", "renormalize"):
            value = getattr(self, name)
            given = isinstance(value, bool) or (value is None and name == "renormalize")
            check(given, name, value, "True or False")
        check(isinstance(self.seed, int) and self.seed >= 0, "seed", self.seed, "an integer >= 0")
        if not isinstance(self.layers, str):
            numbers = isinstance(self.layers, Sequence) and all(isinstance(i, int) and i >= 0 for i in self.layers)
            check(numbers and len(self.layers) > 0, "layers", self.layers, "'all', 'auto' or a list of layer numbers")
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        else:
            check(self.layers in ("all", "auto"), "layers", self.layers, "'all', 'auto' or a list of layer numbers")
        if self.layers == "auto":
            positive = is_number(self.max_kl) and self.max_kl > 0  # type: ignore[operator]
            check(positive, "max_kl", self.max_kl, "a number > 0 with layers='auto', nats per token")
        else:
            check(self.max_kl is None, "max_kl", self.max_kl, "left out unless layers='auto'")

    def _check_level(self) -> None:
        given = {name: getattr(self, name) for name in ("threshold", "quantile", "rate")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"threshold, quantile and rate contradict each other; {given} are given: keep one.")
        for name, value in given.items():
            check(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        if self.method != "odp" and "rate" not in given:
            wanted = f"given with method={self.method!r}, and neither threshold nor quantile"
            check(False, "rate", self.rate, wanted)

    @property
    def needs_attention(self) -> bool:
        """Whether tokens are ranked by their importance."""
        return bool(self.protect or self.protect_images or self.drop_all)

    def protected(self, images: float) -> float:
        """Share of all tokens that is protected, where a share of them is of images."""
        if self.protect_images is None:
            return self.protect or 0.0
        return (1 - images) * (self.protect or 0.0) + images * self.protect_images

    @property
    def decisive(self) -> dict[str, Any]:
        """The options that thresholds depend on."""
        return {name: getattr(self, name) for name in DECISIVE}

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are known: found for these options, or given by hand."""
        known = self.thresholds is not None and self.normalized is not None and self.layers != "auto"
        # options that are newer than the thresholds had their defaults
        older = {name: getattr(type(self), name) for name in DECISIVE}
        return known and (self.found_for is None or {**older, **self.found_for} == self.decisive)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        data = asdict(self)
        data["layers"] = list(self.layers) if not isinstance(self.layers, str) else self.layers
        if self.thresholds is not None:
            data["thresholds"] = {path: list(values) for path, values in self.thresholds.items()}
        return data

    @classmethod
    def read(cls, value: Any) -> ODPConfig | None:
        """What a user or config.json gives: None and False are no pruning, True the defaults, a dict the JSON form.

        Raises:
            ValueError: something else, or an unknown option.
        """
        return read_options(cls, "odp", value)


def read_options(cls: type[Options], name: str, value: Any) -> Options | None:
    """The options of a part of the config from what its `read` is given; the option's name is for messages."""
    if value is None or value is False:
        return None
    if value is True:
        return cls()
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {field.name for field in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no option {unknown[0]!r}; see its docstring for the options there are."
            )
        return cls(**value)
    check(isinstance(value, cls), name, value, f"True, False or {_article(cls.__name__)}")
    return value  # type: ignore[no-any-return]


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIO" else f"a {name}"


def is_number(value: Any) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
