# SPDX-License-Identifier: Apache-2.0
"""How many experts every layer keeps, and whether a model's experts can be dropped at all. Reads no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers_mcmoe.config import MCMoEConfig, PruneConfig, RankConfig
from transformers_mcmoe.models.experts import Experts, routes_outside
from transformers_mcmoe.models.routers import Router
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.routing.prunable import slots_of
from transformers_mcmoe.structure import break_even, drop_counts, ranks_for

# tokens on which the model's loss without an expert is measured; one sequence at least
LOSS_TOKENS = 1024


def loss_sequences(length: int) -> int:
    """Sequences on which the model's loss without an expert is measured."""
    return max(1, LOSS_TOKENS // length)


def looks(config: MCMoEConfig) -> bool:
    """Whether blocks are run without some of their experts."""
    ranks = config.factors is not None and config.factors.exponent > 0
    return ranks or config.prune is not None


def check_plan(structure: Structure, plan: Plan) -> None:
    """Raise if the experts that a plan drops cannot be dropped, before anything is run.

    Raises:
        NotImplementedError: a router cannot be sliced.
        ValueError: groups would differ in size, or a layer would keep fewer experts than a token is sent to.
    """
    for path, widths in plan.experts.items():
        if path not in structure.experts or len(widths.kept) == len(widths.gate_up):
            continue
        router = Router(structure.model, structure.experts[path])
        router.check(widths.kept)
        least = least_kept(structure, router, len(widths.gate_up))
        if len(widths.kept) < least:
            raise ValueError(
                f"The plan keeps {len(widths.kept)} experts of '{path}', but its router sends tokens to {least}; keep as many."
            )


def routers_for(structure: Structure, config: PruneConfig | None) -> dict[str, Router]:
    """Routers by experts path, if the experts that a config asks for can be dropped, or looked at one by one.

    Raises:
        NotImplementedError: a router cannot be sliced, or its weights are not handed to the experts.
        ValueError: the ratio leaves fewer experts than a token is sent to.
    """
    routers = {path: Router(structure.model, experts) for path, experts in structure.experts.items()}
    for path, experts in structure.experts.items():
        if routes_outside(experts):
            raise NotImplementedError(
                f"The experts at '{path}' are not handed their routing weights, so that it is not known what they add; "
                "prune and rank are not available for this model."
            )
    if config is not None and not config.auto:
        drops(structure, config, routers, {})
    return routers


def most_rank(experts: Experts, base: bool) -> int:
    """The largest rank of an expert's factors: the full one, or, in the place of a matrix, one below that of as many weights."""
    full = min(min(p.out_features, p.in_features) for p in experts.projections)
    return full if base else min(math.ceil(break_even(p.out_features, p.in_features)) - 1 for p in experts.projections)


def check_rank(structure: Structure, config: RankConfig) -> None:
    """Raise ValueError if a mean rank is more than matrices have, or saves nothing."""
    for path, experts in structure.experts.items():
        full = most_rank(experts, True)
        if config.given > full:
            raise ValueError(
                f"rank={config.mean} is not valid: the matrices of '{path}' have {full} at most; lower it."
            )
        most = most_rank(experts, config.base)
        if config.given > most:
            raise ValueError(
                f"rank={config.mean} saves nothing: from a rank of {most + 1} on, two factors have as many weights as the matrices of "
                f"'{path}'; lower it, or leave rank out."
            )


def planned_ranks(structure: Structure, config: MCMoEConfig, kept: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Ranks of every expert; before importance is known, as if all kept ones were alike."""
    if config.factors is None or structure.ranks:
        return structure.ranks
    return {
        path: (
            *ranks_for(
                [1.0] * kept[path],
                config.factors.given,
                most_rank(e, config.factors.base),
                step=config.factors.step,
            ),
            *[0] * (e.num_experts - kept[path]),
        )
        for path, e in structure.experts.items()
    }


def drops(
    structure: Structure,
    config: PruneConfig,
    routers: Mapping[str, Router],
    importance: Mapping[str, list[float]],
    least: int = 1,
) -> dict[str, int]:
    """How many experts each module drops; the same share everywhere if importance is not known. Errors as of `drop_counts`.

    Every module keeps `least` of them at least, and as many as a token is sent to.
    """
    sizes = {path: experts.num_experts for path, experts in structure.experts.items()}
    found = drop_counts(
        [sum(importance[path]) if path in importance else 1.0 for path in sizes],
        list(sizes.values()),
        config.share,
        [max(least, least_kept(structure, routers[path], count)) for path, count in sizes.items()],
        [routers[path].groups for path in sizes],
    )
    return dict(zip(sizes, found, strict=True))


def least_paying(config: MCMoEConfig, kept: Mapping[str, int], budgets: Mapping[str, int]) -> int:
    """Experts that a layer must keep for its share of the bits to pay for `at_least`; 0 without.

    Args:
        config: of the compression.
        kept: experts by path if all layers drop the same share.
        budgets: sums of their widths then.
    """
    asked, low = sum(config.at_least.values()), config.expert_bits[0]
    if not asked or not any(budgets.values()):
        return asked
    each = sum(budgets.values()) / sum(kept.values())  # bits per kept expert, wherever it lies
    # a layer's share is a whole number, so that it may lack one bit
    more = 1 + sum((width - low) * count for width, count in config.at_least.items())
    return max(asked, math.ceil(more / (each - low))) if each > low else max(kept.values())


def kept_counts(structure: Structure, config: MCMoEConfig) -> dict[str, int]:
    """How many experts each module keeps; before they are chosen, as if all dropped the same share."""
    if config.drops is None or structure.kept:
        return {path: len(structure.kept_of(path)) for path in structure.experts}
    dropped = drops(structure, config.drops, routers_for(structure, config.drops), {})
    return {path: experts.num_experts - dropped[path] for path, experts in structure.experts.items()}


def least_kept(structure: Structure, router: Router, experts: int) -> int:
    """Experts that a layer keeps at least: those of a token, which lie in the groups that are chosen first."""
    known = getattr(router.module, "top_k", None) or getattr(_parent(structure, router), "top_k", None)
    slots = slots_of(structure.model) or (known if isinstance(known, int) else 1)
    if router.groups == 1:
        return slots
    chosen = max(1, int(getattr(router.module, "topk_group", 1) or 1))
    each = max(2, -(-slots // chosen))  # a group's score may be that of its two best
    return min(experts, each * router.groups)


def _parent(structure: Structure, router: Router) -> Any:
    return structure.model.get_submodule(router.path.rpartition(".")[0])
