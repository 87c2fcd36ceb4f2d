# SPDX-License-Identifier: Apache-2.0
"""Routers that choose among some of their experts only: those that pruning kept.

A sliced router keeps all rows of its weights, so that checkpoints keep theirs, and computes with the rows of the kept
experts; the ids it returns are those of the whole module. Knows routers and tensors, not why an expert was dropped.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.experts import Experts, routes_outside

# attribute of a sliced router: its `Slice`
SLICE = "mcmoe_slice"
# names that routers have for their number of groups of experts
GROUPS = ("num_group", "n_group", "num_expert_group", "n_groups")
# and for the size of what they read
WIDTHS = ("hidden_dim", "hidden_size")
# a score that is never among the best, and that 16 bits hold
_LOW = -3e4


class Slice:
    """The rows of a router that take part, and the router's own computation on them.

    Where groups of experts would differ in size, no rows are left out, but the scores of dropped experts are
    masked: by a further column of the weights that the input meets with a 1.

    Args:
        router: the router.
        experts: E.
        identity: further rows, of experts that return their input; they always take part.
        groups: of experts.
    """

    def __init__(self, router: nn.Module, experts: int, identity: int = 0, groups: int = 1) -> None:
        self.experts, self.total, self._groups = experts, experts + identity, groups
        self._masks = False
        self._hidden = next(p.shape[1] for p in router.parameters() if p.dim() == 2 and p.shape[0] == self.total)
        self.kept: tuple[int, ...] = tuple(range(experts))
        self._names = [name for name, _ in (*router.named_parameters(), *router.named_buffers())]
        self._twin = self._copy(router)
        self._counts = [
            (part, name, value)
            for part in self._twin.modules()
            for name, value in vars(part).items()
            if type(value) is int and value in (self.experts, self.total) and name not in ("top_k", *WIDTHS)
        ]
        self._widths = [(part, name) for part in self._twin.modules() for name in WIDTHS if name in vars(part)]
        self._rows: dict[torch.device, Tensor] = {}

    @staticmethod
    def _copy(router: nn.Module) -> nn.Module:
        """The router without weights, hooks and a forward of its own."""
        tensors = [*router.parameters(), *router.buffers()]
        memo: dict[int, Any] = {id(tensor): _placeholder(tensor) for tensor in tensors}
        twin = copy.deepcopy(router, memo)
        twin.train(router.training)
        for part in twin.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                hooks.clear()
            part.__dict__.pop("forward", None)
        return twin

    def train(self, mode: bool) -> None:
        """Some routers are random while they train."""
        self._twin.train(mode)

    def keep(self, kept: Sequence[int]) -> None:
        """Let these experts take part, in ascending order."""
        self.kept = tuple(kept)
        self._rows.clear()
        self._masks = len(set(group_sizes(self.kept, self.experts, self._groups))) > 1
        for part, name, value in self._counts:
            setattr(part, name, value if self._masks else len(self.kept) + value - self.experts)
        for part, name in self._widths:
            setattr(part, name, self._hidden + self._masks)

    @torch.compiler.assume_constant_result  # runs while torch.compile traces, too
    def _rows_on(self, device: torch.device) -> Tensor:
        if device not in self._rows:
            rows = [*self.kept, *range(self.experts, self.total)]
            self._rows[device] = torch.tensor(rows, device=device)
        return self._rows[device]

    def call(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the router returns for its arguments, with the ids of all experts."""
        for name in self._names:
            if hasattr(router.get_submodule(name.rpartition(".")[0]), "base_layer"):
                raise ValueError(
                    f"An adapter wraps '{name}' of the {type(self._twin).__name__}, some of whose experts were dropped, and would have no "
                    "effect; leave the router out of target_modules."
                )
        if self._masks:
            state = {name: self._masked(name, _tensor(router, name)) for name in self._names}
            args = tuple(map(self._widened, args))
            kwargs = {name: self._widened(value) for name, value in kwargs.items()}
            return torch.func.functional_call(self._twin, state, args, kwargs)
        state = {name: self._sliced(_tensor(router, name)) for name in self._names}
        args = tuple(self._sliced(value, vector=True) for value in args)
        kwargs = {name: self._sliced(value, vector=True) for name, value in kwargs.items()}
        return self._restored(torch.func.functional_call(self._twin, state, args, kwargs))

    def _sliced(self, value: Any, vector: bool = False) -> Any:
        """The kept rows of a tensor that has one for each expert; a correction bias may be an argument, or [1, E]."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        rows = self._rows_on(value.device)
        if value.dim() == 2 and tuple(value.shape) == (1, self.total) and not vector:
            return value[:, rows]
        if value.shape[0] != self.total or (vector and value.dim() != 1):
            return value
        return value[rows]

    def _masked(self, name: str, value: Tensor) -> Tensor:
        """A tensor under which dropped experts are never chosen."""
        if value.dim() == 0 or value.shape[0] != self.total:
            return value
        low = torch.full((self.total,), _LOW, dtype=value.dtype, device=value.device)
        low[self._rows_on(value.device)] = 0
        if value.dim() == 2:
            return torch.cat([value, low[:, None]], 1)
        return value + low if "bias" in name else value

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != self._hidden:
            return value
        return torch.cat([value, value.new_ones(*value.shape[:-1], 1)], -1)

    def _restored(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._scattered(output)
        found = [n for n, value in enumerate(output) if isinstance(value, Tensor) and not value.is_floating_point()]
        if len(found) != 1:
            raise NotImplementedError(_REFUSED.format(type(self._twin).__name__, "does not return expert ids"))
        (index,) = found
        rows = self._rows_on(output[index].device)
        parts = [
            # behind the scores of all experts come the weights of the chosen ones
            self._scattered(value) if n < index - 1 and isinstance(value, Tensor) else value
            for n, value in enumerate(output)
        ]
        parts[index] = rows[output[index].long()].to(output[index].dtype)
        return tuple(parts)

    def _scattered(self, scores: Tensor) -> Tensor:
        """Scores [.., kept] as those of all experts: dropped ones are never the best."""
        rows = self._rows_on(scores.device)
        if scores.shape[-1] != len(rows):
            return scores
        return scores.new_full((*scores.shape[:-1], self.total), -torch.inf).index_copy(-1, rows, scores)


class SlicedRouter(nn.Module):
    """Mixed into a router's class: it computes with the rows that its `Slice` keeps."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Slice = self.__dict__[SLICE]
        return own.call(self, args, kwargs)

    def train(self, mode: bool = True) -> Any:
        """As any module; its `Slice` follows."""
        self.__dict__[SLICE].train(mode)
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made on the fly and has no name that could be imported
        return _empty, (type(self).__mro__[2],), self.__dict__


def _sliced(kind: type) -> type:
    """A router's class with `SlicedRouter` mixed in."""
    return type(f"Sliced{kind.__name__}", (SlicedRouter, kind), {})


def _empty(kind: type) -> Any:
    sliced: Any = _sliced(kind)
    return sliced.__new__(sliced)


_REFUSED = "The router of class {} cannot be sliced: it {}; its experts cannot be pruned."


class Router:
    """The router of an experts module.

    Args:
        model: the model.
        experts: adapter of the experts module.

    Attributes:
        path: of the router in the model.
        module: the router.
        groups: number of groups that a token's experts are first chosen by, 1 for none.

    Raises:
        NotImplementedError: there is no router that could be sliced.
    """

    def __init__(self, model: nn.Module, experts: Experts) -> None:
        self._experts = experts
        self._identity = int(getattr(experts, "identity_experts", 0))
        self.path = _find(model, experts, experts.num_experts + self._identity)
        self.module: Any = model.get_submodule(self.path)
        if routes_outside(experts) and type(self.module) is not nn.Linear and not self.is_sliced:
            name = type(self.module).__name__
            raise NotImplementedError(
                _REFUSED.format(name, "hands its routing weights to the block around the experts")
            )
        self.groups = max([1, *(int(getattr(self.module, name, 1) or 1) for name in GROUPS)])

    @property
    def is_sliced(self) -> bool:
        """Whether some experts take no part."""
        return isinstance(self.module, SlicedRouter)

    def keep(self, kept: Sequence[int]) -> None:
        """Let only these experts take part from now on.

        Raises:
            ValueError: groups would differ in size.
        """
        kept = sorted(kept)
        self.check(kept)
        self._keep(kept)

    def _keep(self, kept: Sequence[int]) -> None:
        own = self.module.__dict__.get(SLICE)
        if own is None:
            count = self._experts.num_experts
            own = self.module.__dict__[SLICE] = Slice(self.module, count, self._identity, self.groups)
            self.module.__class__ = _sliced(type(self.module))
        own.keep(kept)

    def check(self, kept: Sequence[int]) -> None:
        """Raise ValueError if a router with groups would keep different numbers of experts in them."""
        counts = group_sizes(kept, self._experts.num_experts, self.groups)
        if len(set(counts)) > 1:
            raise ValueError(
                f"The router at '{self.path}' chooses groups of experts first, which must keep equally many, but the groups "
                f"keep {counts}; drop as many experts of each group."
            )

    def release(self) -> None:
        """Let all experts take part again."""
        if self.is_sliced:
            self.module.__class__ = type(self.module).__mro__[2]
            del self.module.__dict__[SLICE]

    @contextmanager
    def keeping(self, kept: Sequence[int]) -> Iterator[None]:
        """While open, only these experts take part; groups may differ in size."""
        own = self.module.__dict__.get(SLICE)
        before = None if own is None else own.kept
        self._keep(sorted(kept))
        try:
            yield
        finally:
            if before is None:
                self.release()
            else:
                self._keep(before)


def _find(model: nn.Module, experts: Experts, total: int) -> str:
    """Path of the router: beside the experts, or beside a module that holds them, with a matrix [total, H]."""
    hidden = experts.projections[0].in_features
    inside, _, _ = experts.path.rpartition(".")
    while inside:
        for name, child in model.get_submodule(inside).named_children():
            called = re.search(r"router|gate|gating", f"{name} {type(child).__name__}", re.IGNORECASE)
            holds = any(tuple(tensor.shape) == (total, hidden) for tensor in child.parameters())
            if called and holds and "shared" not in name and not f"{experts.path}.".startswith(f"{inside}.{name}."):
                return f"{inside}.{name}"
        if inside.rpartition(".")[2].isdigit():  # the decoder layer
            break
        inside = inside.rpartition(".")[0]
    raise NotImplementedError(
        f"No router of the experts at '{experts.path}' was found that could be sliced; they cannot be pruned."
    )


def group_sizes(kept: Sequence[int], experts: int, groups: int) -> list[int]:
    """How many of these experts lie in each group of neighbours."""
    size = experts // groups
    return [sum(expert // size == group for expert in kept) for group in range(groups)]


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def _placeholder(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
