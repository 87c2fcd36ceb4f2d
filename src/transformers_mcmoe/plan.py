# SPDX-License-Identifier: Apache-2.0
"""The plan: which width every quantized matrix has, and what that costs in bits and bytes.

Knows names, widths and shapes; it does not know how widths were chosen, nor modules or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers_mcmoe.quantization.packing import WIDTHS, packed_shape

PLAN_VERSION = 2
# what an expert's matrices are: those that read the hidden state, and the one that writes to it
ROLES = ("gate_up", "down")
# names of a matrix's two factors: what reads its input, [r, in], and what writes its output, [out, r]
FACTORS = ("low_rank_a", "low_rank_b")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class ExpertWidths:
    """Widths of one layer's experts: `gate_up[e]` for the input projections, `down[e]` for the output one; 0 = no matrix.

    An expert may have two thin factors of rank `ranks[e]` for each projection, of `rank_bits` each, in the place of its
    matrices or beside them; () if none has. One with neither is dropped.
    """

    gate_up: tuple[int, ...]
    down: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    rank_bits: int = 0

    @classmethod
    def of(cls, widths: Iterable[int]) -> ExpertWidths:
        """The same width for all projections of an expert."""
        widths = tuple(int(width) for width in widths)
        return cls(widths, widths)

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts that were not dropped."""
        return tuple(expert for expert, bits in enumerate(self.gate_up) if bits or self.rank_of(expert))

    def rank_of(self, expert: int) -> int:
        """Rank of an expert's factors, 0 if it has none."""
        return self.ranks[expert] if self.ranks else 0

    def of_role(self, role: str) -> tuple[int, ...]:
        """Widths of the projections of a role, "gate_up" or "down"."""
        return self.down if role == "down" else self.gate_up


@dataclass(frozen=True)
class Matrix:
    """One matrix under the plan: its module path, shape, width (0 = none), and rank and width of its factors, 0 if it has none."""

    name: str
    out_features: int
    in_features: int
    bits: int
    rank: int = 0
    rank_bits: int = 0

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def packed_bytes(self, group_size: int) -> int:
        """Bytes on disk, scales and zeros included."""
        parts = [(self.out_features, self.in_features, self.bits)]
        parts += [(self.rank, self.in_features, self.rank_bits), (self.out_features, self.rank, self.rank_bits)]
        shapes = (packed_shape(*part, group_size) for part in parts if all(part))
        return sum(rows * groups * record for rows, groups, record in shapes)

    @property
    def code_bits(self) -> int:
        """Bits of all codes."""
        return self.weights * self.bits + self.rank * (self.out_features + self.in_features) * self.rank_bits


@dataclass(frozen=True)
class Plan:
    """Widths of every quantized matrix of a model.

    Attributes:
        experts: path of an experts module -> widths of its experts.
        linears: path of a linear layer outside the experts -> its width.
    """

    experts: Mapping[str, ExpertWidths]
    linears: Mapping[str, int] = field(default_factory=dict)

    def under(self, modules: Iterable[str], prefix: str) -> Plan:
        """The same plan for a model with or without its head, whose module paths differ by a prefix.

        Args:
            modules: paths of experts modules in the model.
            prefix: the base model's name in the model with a head, e.g. "model".
        """
        return Plan(
            under_prefix(self.experts, self.experts, modules, prefix),
            under_prefix(self.linears, self.experts, modules, prefix),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form: digit strings per layer; linear layers that differ only in the layer number share a string."""
        experts: dict[str, dict[str, Any]] = {
            name: {"gate_up": "".join(map(str, widths.gate_up)), "down": "".join(map(str, widths.down))}
            for name, widths in self.experts.items()
        }
        for name, widths in self.experts.items():
            if any(widths.ranks):
                experts[name] |= {"rank": list(widths.ranks), "rank_bits": widths.rank_bits}
        patterns: dict[str, dict[int, int]] = {}
        for name, bits in self.linears.items():
            match = _LAYER.search(name)
            key = _LAYER.sub(".*.", name, count=1) if match else name
            patterns.setdefault(key, {})[int(match.group(1)) if match else 0] = bits
        linears = {
            key: "".join(str(widths.get(layer, "-")) for layer in range(max(widths) + 1))
            for key, widths in patterns.items()
        }
        # releases before 2 know no ranks, and let tokens be routed to dropped experts
        changed = any(any(w.ranks) or not all(w.gate_up) for w in self.experts.values())
        version = 2 if changed else 1
        return {"version": version, "experts": experts, "linears": linears}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            ValueError: the dict is not a plan, is of a newer version, or names a width that cannot be packed.
        """
        if not isinstance(data, Mapping) or "experts" not in data:
            raise ValueError("A plan is a dict with the keys 'experts' and 'linears'; this one has no 'experts'.")
        if data.get("version", PLAN_VERSION) > PLAN_VERSION:
            raise ValueError(
                f"The plan has version {data['version']}, this release reads up to {PLAN_VERSION}; update the package."
            )
        experts = {}
        for name, widths in data["experts"].items():
            if not isinstance(widths, Mapping) or not {"gate_up", "down"} <= set(widths):
                raise ValueError(f"The plan's '{name}' must have 'gate_up' and 'down', but it is {widths!r}.")
            gate_up, down = _digits(name, widths["gate_up"], dropped=True), _digits(name, widths["down"], dropped=True)
            if len(gate_up) != len(down) or any((a == 0) != (b == 0) for a, b in zip(gate_up, down, strict=True)):
                raise ValueError(
                    f"The plan's '{name}' must drop (0) the same experts in 'gate_up' and 'down', "
                    f"but they are '{widths['gate_up']}' and '{widths['down']}'."
                )
            experts[name] = ExpertWidths(gate_up, down, *_ranks(name, widths, len(gate_up)))
        linears = {}
        for key, digits in data.get("linears", {}).items():
            for layer, digit in enumerate(digits):
                if digit != "-":
                    linears[key.replace(".*.", f".{layer}.", 1)] = _digits(key, digit)[0]
        return cls(experts, linears)


def _digits(name: str, digits: str, dropped: bool = False) -> tuple[int, ...]:
    allowed = (0, *WIDTHS) if dropped else WIDTHS
    if not isinstance(digits, str) or any(not digit.isdigit() or int(digit) not in allowed for digit in digits):
        raise ValueError(f"The plan's '{name}' holds the widths '{digits}'; each must be one of {allowed}.")
    return tuple(int(digit) for digit in digits)


def _ranks(name: str, widths: Mapping[str, Any], count: int) -> tuple[tuple[int, ...], int]:
    ranks, bits = widths.get("rank"), widths.get("rank_bits", 0)
    if ranks is None:
        return (), 0
    known = isinstance(ranks, list) and all(isinstance(rank, int) and rank >= 0 for rank in ranks)
    if not known or len(ranks) != count or bits not in WIDTHS:
        raise ValueError(
            f"The plan's '{name}' must have one 'rank' >= 0 for each of {count} experts and 'rank_bits' out of {WIDTHS}, but they "
            f"are {ranks!r} and {bits!r}."
        )
    return tuple(ranks), bits


def average_bits(matrices: Iterable[Matrix]) -> float:
    """Mean code width over all matrices, weighted by their weights; a dropped expert counts as 0 bits."""
    total = bits = 0
    for matrix in matrices:
        total += matrix.weights
        bits += matrix.code_bits
    return bits / total if total else 0.0


def bits_per_weight(matrices: Iterable[Matrix], group_size: int) -> float:
    """Bytes on disk x 8 / weights over all matrices, scales and zeros included."""
    total = packed = 0
    for matrix in matrices:
        total += matrix.weights
        packed += matrix.packed_bytes(group_size)
    return 8 * packed / total if total else 0.0


def under_prefix(
    by_path: Mapping[str, Any], known: Iterable[str], modules: Iterable[str], prefix: str
) -> dict[str, Any]:
    """The same mapping for a model with or without its head, see `Plan.under`.

    Args:
        by_path: values by module path, as they were saved.
        known: paths of experts modules when it was saved.
        modules: paths of experts modules in the model.
        prefix: the base model's name in the model with a head, e.g. "model".
    """
    if not prefix or set(known) & set(modules):
        return dict(by_path)
    inside = any(path.startswith(f"{prefix}.") for path in modules)
    bare = {path.removeprefix(f"{prefix}."): value for path, value in by_path.items()}
    return {f"{prefix}.{path}": value for path, value in bare.items()} if inside else bare
