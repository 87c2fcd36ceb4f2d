# SPDX-License-Identifier: Apache-2.0
"""OTPConfig: how the small routers of learned expert pruning are trained, and what training found.

Knows options and their ranges, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers_mcmoe.config.pruning import is_number, read_options
from transformers_mcmoe.config.values import check

OBJECTIVES = ("logits", "layers")
TARGET = 0.2


@dataclass(frozen=True)
class OTPConfig:
    """Learned expert pruning: a small router per MoE layer chooses how many of its experts a token runs.

    The "top-any" pruning of MC# (arXiv 2510.10962): the routed experts of a token are sorted by routing weight and a prefix
    of them is kept, one at least; routers are trained with Gumbel-softmax samples of the prefixes to keep the outputs of
    the unpruned model. The paper states neither the routers' size nor how they are trained; both are this project's choice
    (docs/pruning.md).

    Args:
        target: share of the routed slots that is skipped on calibration text, over all layers; layers differ. Default 0.2,
            and for trained routers the share they were trained for.
        objective: "logits" weighs what a skipped expert changes by its effect on the model's output, and trains on that
            output; "layers" weighs it by the size of the hidden state, one forward pass and no gradients: for models whose
            gradients do not fit in memory.
        rank: hidden units of a router.
        steps: training steps on the model's output; 0 leaves the routers as the fit per layer made them. Default 60, and 0
            for "layers".
        tokens: calibration tokens that are used, those that say when to stop included. While costs are measured, they take
            tokens * hidden size * layers numbers of the model's dtype.
        batch_tokens: tokens of a step, and of a pass while measuring.
        learning_rate: of the steps.
        temperatures: of the Gumbel-softmax, in the first and in the last step.
        patience: stop when the loss on held-out tokens has not fallen for so many evaluations.
        renormalize: scale kept weights to the sum that all had; default: where the model's router normalises.
        seed: of the routers' initial values and of the samples.
        on: False leaves a packed model's routers where they are, without pruning by them.
        slots: found: K, the router's experts per token.
        shifts: found: what is subtracted from scores for a share of 0, 1/100, .., 1 of the slots after a token's first.
        droppable: found: share of the routed slots that come after a token's first.
        normalized: found: by experts module, whether routing weights always had the same sum.
        model: found: mark of the packed model that the routers belong to.

    Raises:
        ValueError: an option is outside its range.
    """

    target: float | None = None
    objective: str = "logits"
    rank: int = 4
    steps: int | None = None
    tokens: int = 16384
    batch_tokens: int = 1024
    learning_rate: float = 3e-3
    temperatures: Sequence[float] = (2.0, 0.3)
    patience: int = 4
    renormalize: bool | None = None
    seed: int = 0
    on: bool = True
    slots: int | None = None
    shifts: Sequence[float] | None = None
    droppable: float | None = None
    normalized: Mapping[str, bool] | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        share = self.target is None or (is_number(self.target) and 0 < self.target < 1)
        check(share, "target", self.target, "a share in (0, 1)")
        check(self.objective in OBJECTIVES, "objective", self.objective, f"one of {OBJECTIVES}")
        if self.steps is None:
            object.__setattr__(self, "steps", 60 if self.objective == "logits" else 0)
        for name, least in (
            ("rank", 1),
            ("steps", 0),
            ("tokens", 2),
            ("batch_tokens", 1),
            ("patience", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            integer = isinstance(value, int) and not isinstance(value, bool)
            check(integer and value >= least, name, value, f"an integer >= {least}")
        fits = self.objective == "logits" or self.steps == 0
        check(fits, "steps", self.steps, "0 with objective='layers', which computes no gradients of the model")
        positive = is_number(self.learning_rate) and self.learning_rate > 0
        check(positive, "learning_rate", self.learning_rate, "a number > 0")
        pair = isinstance(self.temperatures, Sequence) and len(self.temperatures) == 2
        falls = (
            pair and all(is_number(t) for t in self.temperatures) and 0 < self.temperatures[1] <= self.temperatures[0]
        )
        check(falls, "temperatures", self.temperatures, "two numbers > 0, the second not above the first")
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if self.shifts is not None:
            object.__setattr__(self, "shifts", tuple(self.shifts))

    @property
    def trained(self) -> bool:
        """Whether training has found what decisions need."""
        return None not in (self.slots, self.shifts, self.droppable, self.normalized)

    @property
    def share(self) -> float:
        """`target` as a share of the slots after each token's first.

        Raises:
            ValueError: the routers are not trained, or more is asked for than these slots.
        """
        if self.target is None or self.droppable is None:
            raise ValueError("The pruning routers are not trained; call train_expert_pruning(model, dataset).")
        if self.target > self.droppable:
            raise ValueError(
                f"target={self.target} cannot be met: a token keeps one expert at least, so at most "
                f"{self.droppable:.3f} of the routed slots can be skipped; lower it."
            )
        return self.target / self.droppable

    @property
    def shift(self) -> float:
        """What is subtracted from the scores so that `target` is met on calibration text; errors as of `share`."""
        share, shifts = self.share, self.shifts or (0.0, 0.0)
        place = share * (len(shifts) - 1)
        low = min(int(place), len(shifts) - 2)
        return shifts[low] + (place - low) * (shifts[low + 1] - shifts[low])

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        data = asdict(self)
        data["temperatures"] = list(self.temperatures)
        data["shifts"] = None if self.shifts is None else list(self.shifts)
        return data

    @classmethod
    def read(cls, value: Any) -> OTPConfig | None:
        """What a user or config.json gives: None and False are no pruning, True the defaults, a dict the JSON form.

        Raises:
            ValueError: something else, or an unknown option.
        """
        return read_options(cls, "otp", value)
