# SPDX-License-Identifier: Apache-2.0
"""What is known of the tokens of a model's forward call, and of the tokens before them that share its KV cache.

Knows shapes, padding and values that rank tokens; not where the values come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.calibration.images import KINDS

# attribute of a KV cache: statistics of the tokens in it, so that they are copied with it and live as long
SEEN = "mcmoe_seen"
# comparisons held at a time
BLOCK = 1 << 22


class Call:
    """The current forward call of a stack of decoder layers.

    Args:
        ranks: whether tokens are compared with each other.
        repeatable: whether a layer that is run again later would decide the same.
        layer: a layer whose cache length counts all tokens: one with softmax attention, if there is any.

    Attributes:
        shape: (B, T) of the call, None before the first.
        valid: [B, T] bool, False for padding; None where there is none.
        attention: what `attention_received` gives for the last attention layer that was run; None before the first.
        past: tokens in the cache before the call.
        images: [B, T] bool, tokens that stand for parts of images; None where none is known.
    """

    def __init__(self, ranks: bool = False, repeatable: bool = True, layer: int = 0) -> None:
        self.shape: tuple[int, int] | None = None
        self.valid: Tensor | None = None
        self.attention: tuple[Tensor, Tensor] | None = None
        self.past = 0
        self.images: Tensor | None = None
        self._ranks, self._repeatable, self._layer = ranks, repeatable, layer
        self._seen: dict[Any, Tensor] = {}  # statistics of the tokens so far, [B, n]
        self._number: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the module that holds the decoder layers."""
        if not self._repeatable and module.training and torch.is_grad_enabled() and _checkpoints(module):
            raise ValueError(
                "Gradient checkpointing runs layers again when other tokens are known; train with expert pruning that "
                "ranks no tokens, ODPConfig(protect=0), or with pruning off."
            )
        self.attention = None
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("input_ids")
        self.shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if isinstance(mask, dict):  # one mask per kind of layer
            mask = next((one for one in mask.values() if isinstance(one, Tensor) and one.dim() == 4), None)
        prepared = isinstance(mask, Tensor) and mask.dim() == 4 and not torch.compiler.is_compiling()
        if self._ranks or prepared:
            self.past = int(cache.get_seq_length(self._layer)) if cache is not None else 0
        self.valid = _valid(mask, self.shape, self.past) if isinstance(mask, Tensor) and self.shape else None
        if self._ranks and self.shape is not None:
            self._remember(cache, tokens.device)  # type: ignore[union-attr]

    def _remember(self, cache: Any, device: torch.device) -> None:
        """Find the statistics of the tokens in the cache; one may have been cropped, or filled without pruning."""
        assert self.shape is not None
        seen = getattr(cache, SEEN, {}) if self.past else {}
        self._seen = {name: values[:, : self.past] for name, values in seen.items() if len(values) == self.shape[0]}
        every = torch.isfinite(self.learn(None, torch.ones(self.shape, device=device)))
        self._number = every.cumsum(-1)[:, -self.shape[1] :] if self.shape[1] > 1 else every.sum(-1, keepdim=True)

    def see(self, ids: set[int]) -> Any:
        """A pre-hook of the whole model, whose token ids say which tokens stand for images."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get("input_ids", args[0] if args else None)
            self.images = None
            if not isinstance(given, Tensor) or given.is_floating_point():
                return
            kinds = next((kwargs[name] for name in KINDS if isinstance(kwargs.get(name), Tensor)), None)
            if kinds is not None and kinds.shape == given.shape:
                self.images = kinds != 0
            else:
                self.images = torch.isin(given, torch.tensor(sorted(ids), device=given.device))

        return hook

    def unsee(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A post-hook of the whole model: what calls of a part of it see is not known."""
        self.images = None

    def of_images(self, value: Tensor) -> Tensor:
        """[B, T] bool on the device of a value [B, T], tokens that stand for parts of images."""
        if self.images is None or self.images.shape != value.shape:
            return torch.zeros_like(value, dtype=torch.bool)
        return self.images.to(value.device)

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook: what was learned in this call stays with its cache."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, SEEN, self._seen)
        self._seen = {}

    def first_key(self, queries: int, keys: int) -> int:
        """Which key is that of the call's first token: behind the past, or the last ones of a window are the call's."""
        return _first(self.past, queries, keys)

    def number(self, value: Tensor) -> Tensor:
        """[B, T], how many tokens of its sequence there are up to each token, padding left out."""
        assert self._number is not None  # tokens are ranked in calls that have some
        return self._number.to(value.device)

    def learn(self, name: Any, value: Tensor) -> Tensor:
        """Keep the values [B, T] of this call for later ones; returns those of all tokens so far, [B, n]."""
        if self.valid is not None:
            value = value.masked_fill(~self.valid_at(value), -torch.inf)
        earlier = self._seen.get(name)
        self._seen[name] = every = value if earlier is None else torch.cat([earlier, value], dim=1)
        return every

    def select(
        self,
        name: Any,
        value: Tensor,
        lasting: Tensor,
        share: float,
        causal: bool,
        keep: bool = True,
        among: Tensor | None = None,
    ) -> Tensor:
        """[B * T] bool, the tokens with the largest values.

        Of the whole call if it begins its sequences, of the tokens so far if it does not, is a single token, or with
        `causal`.

        Args:
            name: what the values are.
            value: [B, T].
            lasting: [B, T], what of them does not change with later tokens; compared across calls.
            share: in (0, 1).
            causal: compare with earlier tokens only.
            keep: see `top`.
            among: [B, T] bool, tokens that take part; None for all.
        """
        if among is not None:
            value, lasting = value.masked_fill(~among, -torch.inf), lasting.masked_fill(~among, -torch.inf)
        if causal or self.past or value.shape[1] == 1:
            chosen = self.top_so_far(name, lasting, share, keep)
            return (chosen if among is None else chosen & among).flatten()
        self.learn(name, lasting)
        return self.top(value, share, keep, among).flatten()

    def top(self, value: Tensor, share: float, keep: bool = True, among: Tensor | None = None) -> Tensor:
        """Which tokens [B, T] bool have the largest values [B, T] of this call: a share of a sequence's n, rounded.

        With `keep` the number is rounded up, and a sequence's first token is one of them: all others attend to it, and it is
        among the largest so far when it is looked at. Else it is rounded down.
        """
        valid = self.valid_at(value) if among is None else self.valid_at(value) & among
        count = _rounded(valid.sum(-1, keepdim=True) * share, keep)
        ranks = value.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = ranks < count
        if keep:
            chosen |= valid.cumsum(-1) == 1
        return chosen & valid

    def top_so_far(self, name: Any, value: Tensor, share: float, keep: bool = True) -> Tensor:
        """Which tokens have the largest values among themselves and all earlier tokens of their sequences.

        Those for which fewer than `share * n`, rounded, of these n tokens have a larger value. Tokens of earlier calls with
        the same cache count.

        Args:
            name: what the values are.
            value: [B, T].
            share: in (0, 1).
            keep: round up, else down.

        Returns:
            [B, T] bool.
        """
        every = self.learn(name, value)
        if value.shape[1] == 1:
            seen, larger = torch.isfinite(every).sum(-1, keepdim=True), (every > value).sum(-1, keepdim=True)
        else:
            seen, larger = self._larger(every, value)
        chosen = larger < _rounded(seen * share, keep)
        return chosen if self.valid is None else chosen & self.valid_at(value)

    def _larger(self, every: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens there are up to each of the last ones, and how many of these have a larger value, both [B, T]."""
        start, step = every.shape[1] - value.shape[1], max(1, BLOCK // every.numel())
        seen = torch.isfinite(every).cumsum(-1)[:, start:]
        larger = torch.zeros_like(seen)
        columns = torch.arange(every.shape[1], device=value.device)
        for t in range(0, value.shape[1], step):
            rows = slice(t, t + step)
            earlier = columns <= columns[start:][rows, None]
            larger[:, rows] = ((every[:, None] > value[:, rows, None]) & earlier).sum(-1)
        return seen, larger

    def valid_at(self, value: Tensor) -> Tensor:
        """[B, T] bool on the device of a value [B, T], False for padding."""
        return torch.ones_like(value, dtype=torch.bool) if self.valid is None else self.valid.to(value.device)


def _checkpoints(module: nn.Module) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def _valid(mask: Tensor, shape: tuple[int, int], past: int) -> Tensor | None:
    """[B, T] bool from a mask [B, past + T], or [B, 1, T, K] where padding is what may not see itself."""
    if mask.dim() == 2:
        return mask[:, -shape[1] :].bool()
    if mask.dim() != 4:
        return None
    diagonal = mask[:, 0].diagonal(_first(past, mask.shape[2], mask.shape[3]), dim1=-2, dim2=-1)
    seen = diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2
    return seen.expand(shape)


def _first(past: int, queries: int, keys: int) -> int:
    return past if past + queries <= keys else keys - queries


def _rounded(count: Tensor, up: bool) -> Tensor:
    # 0.02 * 50 may lie beside 1
    return (count - 1e-4).ceil() if up else (count + 1e-4).floor()
