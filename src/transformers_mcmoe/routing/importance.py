# SPDX-License-Identifier: Apache-2.0
"""How important the tokens of a call are: attention that they receive, and which of them are the top share.

Attention weights are taken where transformers computes attention: under a registered attention function that calls the
model's own and adds up columns of the weights in blocks of rows. Knows tokens and attention, not experts.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# attention weights held at a time
BLOCK = 1 << 22
# what a model computes attention with -> the same with sums of received attention; "sdpa" in a name means more to
# transformers than a name
IMPLEMENTATIONS = {"eager": "mcmoe_received_eager", "sdpa": "mcmoe_received_fused"}
# attribute of an attention module: the `Call` that wants to know its weights
RECORDER = "mcmoe_call"


def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    first: int,
    valid: Tensor | None,
    *,
    scaling: float,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Column sums of the attention weights, mean over heads, without the whole matrix.

    Args:
        query: [B, N, Q, D] after position embeddings.
        key: [B, N or fewer (GQA), K, D].
        mask: [B or 1, N or 1, Q, K], True where a query may look or what is added to its logits; None with `causal`:
            each query looks at keys up to its own.
        first: which key belongs to the first query; those of the others follow.
        valid: [B, Q] bool, False for padding; None for none.
        scaling: factor of the logits.
        causal: what a missing mask means.
        softcap: bound of the logits' tanh, if there is one.
        sinks: [N] logits of a key without a value, if there are any.
        bias: [.., Q, K], added to the logits.

    Returns:
        [B, Q] float32 sums of what each token receives from all valid queries of the call, and [B, Q] float32 weights
        that each query gives to its own token.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    query = (query * scaling).view(batch, key.shape[1], -1, queries, width)
    received = torch.zeros(batch, keys, dtype=torch.float32, device=query.device)
    given = torch.zeros(batch, queries, dtype=torch.float32, device=query.device)
    # how much a query counts in the mean over heads
    counted = torch.ones(batch, queries, device=query.device) if valid is None else valid.to(torch.float32)
    step = max(1, BLOCK // (batch * heads * keys))
    columns = torch.arange(keys, device=query.device)
    own = columns[first : first + queries]
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        last = first + min(start + step, queries) if mask is None and causal else keys
        logits = (query[:, :, :, rows] @ key[:, :, None, :last].transpose(-1, -2)).to(torch.float32)
        logits = logits.view(batch, heads, -1, last)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if bias is not None:
            logits = logits + bias[..., rows, :last].to(torch.float32)
        if mask is None:
            if causal:  # keys before the block are seen by all of its queries
                late = slice(first + start, last)
                logits[..., late].masked_fill_(columns[late] > own[rows, None], -torch.inf)
        elif mask.dtype == torch.bool:
            logits.masked_fill_(~mask[:, :, rows, :last], -torch.inf)
        else:
            logits += mask[:, :, rows, :last].to(torch.float32)
        if sinks is not None:
            sink = sinks.to(torch.float32).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(-1)
        if mask is not None:  # a padded query may see nothing at all
            weights.nan_to_num_(0.0)
        share = (counted[:, None, rows] / heads).expand(batch, heads, -1).reshape(batch, 1, -1)
        received[:, :last] += (share @ weights.flatten(1, 2)).squeeze(1)[:, :last]
        index = own[rows].view(1, 1, -1, 1).expand(batch, heads, -1, 1)
        given[:, rows] = weights.gather(-1, index).mean(1).squeeze(-1) * counted[:, rows]
    return received[:, own], given


class Call:
    """What is known of the tokens of a model's current forward call, and of earlier ones that share its cache.

    Attributes:
        shape: (B, T) of the call, None before the first.
        valid: [B, T] bool, False for padding; None where there is none.
        attention: what `attention_received` gives for the last attention layer that was run; None before the first.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.valid: Tensor | None = None
        self.attention: tuple[Tensor, Tensor] | None = None
        self._past = 0
        self._known: dict[Any, Tensor] = {}  # statistics of earlier tokens, [B, n] by layer
        # they live as long as the keys and values of the same tokens
        self._caches: weakref.WeakKeyDictionary[Any, dict[Any, Tensor]] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": None, "valid": None, "attention": None, "_past": 0, "_known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._caches = weakref.WeakKeyDictionary()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the module that holds the decoder layers."""
        self.attention = None
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("input_ids")
        self.shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        mask = kwargs.get("attention_mask")
        flat = isinstance(mask, Tensor) and mask.dim() == 2 and self.shape is not None
        self.valid = mask[:, -self.shape[1] :].bool() if flat else None  # type: ignore[index]

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook beside `begin` where tokens are compared with earlier ones: finds those of the same cache."""
        cache = kwargs.get("past_key_values")
        self._past = int(cache.get_seq_length()) if cache is not None else 0
        known = self._caches.get(cache, {}) if self._past else {}
        batch = self.shape[0] if self.shape else 0
        # a cache may have been cropped
        self._known = {name: values[:, : self._past] for name, values in known.items() if values.shape[0] == batch}

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook: what was learned in this call stays with its cache."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._caches[cache] = self._known
        self._known = {}

    def first_key(self, queries: int, keys: int) -> int:
        """Which key is that of the call's first token: behind the past, or the last ones of a window are the call's."""
        return self._past if self._past + queries <= keys else keys - queries

    def look(self, mask: Tensor | None, first: int) -> None:
        """Learn from an attention mask [B, 1, Q, K] which tokens are padding: those that may not see themselves."""
        if self.valid is None and mask is not None and self.shape is not None:
            diagonal = mask[:, 0].diagonal(first, dim1=-2, dim2=-1)
            seen = diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2
            self.valid = seen.expand(self.shape)

    @torch.no_grad()
    def record(
        self, module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, options: Any
    ) -> None:
        """Take the attention weights of a layer; arguments as attention functions get them."""
        first = self.first_key(query.shape[2], key.shape[2])
        self.look(mask, first)
        causal = options.get("is_causal")
        sinks = options.get("s_aux")
        self.attention = attention_received(
            query.detach(),
            key.detach(),
            mask,
            first,
            self.valid,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            softcap=options.get("softcap"),
            sinks=getattr(module, "sinks", None) if sinks is None else sinks,
            bias=options.get("position_bias"),
        )

    def top(self, value: Tensor, share: float, keep: bool = True) -> Tensor:
        """Which tokens [B, T] bool have the largest values [B, T] of this call: a share of a sequence's n, rounded.

        With `keep` the number is rounded up, and a sequence's first token is one of them: all others attend to it, and it is
        among the largest so far when it is looked at. Else it is rounded down.
        """
        valid = self._valid(value)
        count = _rounded(valid.sum(-1, keepdim=True) * share, keep)
        ranks = value.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = ranks < count
        if keep and not self._past:
            chosen |= valid.cumsum(-1) == 1
        return chosen & valid

    def learn(self, name: Any, value: Tensor) -> Tensor:
        """Keep the values [B, T] of this call for later ones; returns those of all tokens so far, [B, n]."""
        value = value.masked_fill(~self._valid(value), -torch.inf)
        earlier = self._known.get(name)
        self._known[name] = every = value if earlier is None else torch.cat([earlier, value], dim=1)
        return every

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
        start, step = every.shape[1] - value.shape[1], max(1, BLOCK // every.numel())
        seen = torch.isfinite(every).cumsum(-1)[:, start:]
        larger = torch.zeros_like(seen)
        columns = torch.arange(every.shape[1], device=value.device)
        for t in range(0, value.shape[1], step):
            rows = slice(t, t + step)
            earlier = columns <= columns[start:][rows, None]
            larger[:, rows] = ((every[:, None] > value[:, rows, None]) & earlier).sum(-1)
        return (larger < _rounded(seen * share, keep)) & self._valid(value)

    def select(
        self, name: Any, value: Tensor, lasting: Tensor, share: float, causal: bool, keep: bool = True
    ) -> Tensor:
        """[B * T] bool, the tokens with the largest values: of this call, or with `causal` and for single ones so far.

        Args:
            name: what the values are.
            value: [B, T].
            lasting: [B, T], what of them does not change with later tokens; compared across calls.
            share: in (0, 1).
            causal: compare with earlier tokens only.
            keep: see `top`.
        """
        if causal or value.shape[1] == 1:
            return self.top_so_far(name, lasting, share, keep).flatten()
        self.learn(name, lasting)
        return self.top(value, share, keep).flatten()

    def _valid(self, value: Tensor) -> Tensor:
        return torch.ones_like(value, dtype=torch.bool) if self.valid is None else self.valid


def _rounded(count: Tensor, up: bool) -> Tensor:
    # 0.02 * 50 may lie beside 1
    return (count - 1e-4).ceil() if up else (count + 1e-4).floor()


class TokenImportance:
    """Importance of the tokens in one decoder layer: ||t||_1 times the attention they receive.

    t is the hidden state that enters the layer. A layer without attention weights (linear attention, state space models)
    takes those of the last layer before it that has some; where there is none, it goes by ||t||_1 alone.

    Args:
        call: the model's current call.
        name: distinguishes layers.
        causal: compare with earlier tokens only, within a prompt, too.
    """

    def __init__(self, call: Call, name: str, causal: bool) -> None:
        self._call, self._name, self._causal = call, name, causal
        self._norm: Tensor | None = None

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the decoder layer; its first argument is [B, T, H]."""
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        self._norm = x.detach().to(torch.float32).abs().sum(-1)

    @torch.no_grad()
    def values(self) -> tuple[Tensor, Tensor]:
        """Importance [B, T], and [B, T] the part of it that later tokens do not change.

        The first is ||t_j||_1 * sum over later queries of A_ij / their number, the token itself included; the second
        ||t_j||_1 * A_jj (arXiv 2410.06270, section 3.3).
        """
        assert self._norm is not None  # hooks of the layer run before its experts
        if self._call.attention is None:
            return self._norm, self._norm
        received, given = self._call.attention
        valid = self._call.valid if self._call.valid is not None else torch.ones_like(self._norm, dtype=torch.bool)
        later = valid.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
        return self._norm * received / later, self._norm * given

    def select(self, share: float, least: bool = False) -> Tensor:
        """[B * T] bool, the most (or least) important share of the tokens."""
        value, own = (-x if least else x for x in self.values())
        return self._call.select((self._name, least), value, own, share, self._causal, keep=not least)


def _attend_eager(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    own = sys.modules[type(module).__module__].eager_attention_forward
    return _record(own, module, query, *args, **kwargs)


def _attend_fused(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _record(ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, *args, **kwargs)


def _record(
    attend: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    call: Call | None = getattr(module, RECORDER, None)
    if call is not None:
        call.record(module, query, key, attention_mask, scaling, kwargs)
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATIONS["eager"], _attend_eager)
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], eager_mask)
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], _attend_fused)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], sdpa_mask)
