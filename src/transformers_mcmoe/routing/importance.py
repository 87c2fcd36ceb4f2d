# SPDX-License-Identifier: Apache-2.0
"""How important the tokens of a call are: attention that they receive, and which of them are the top share.

Attention weights are taken where transformers computes attention: under a registered attention function that calls the
model's own and adds up columns of the weights in blocks of rows. Knows tokens and attention, not experts.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_mcmoe.routing.call import Call

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

    def weights_of(rows: slice) -> Tensor:
        """[B, N, R, K or as many keys as these queries may see]."""
        stop = min(rows.stop, queries)
        last = first + stop if mask is None and causal else keys
        # heads that share keys are rows of one product: keys are not copied for each of them
        block = query[:, :, :, rows].flatten(2, 3)
        logits = (block @ key[:, :, :last].transpose(-1, -2)).to(torch.float32).view(batch, heads, -1, last)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if bias is not None:
            logits = logits + bias[..., rows, :last].to(torch.float32)
        if mask is not None:
            _mask(logits, mask[:, :, rows, :last])
        elif causal and stop - rows.start > 1:  # keys before the block are seen by all of its queries
            late = slice(first + rows.start, last)
            logits[..., late].masked_fill_(columns[late] > columns[late, None], -torch.inf)
        if sinks is not None:
            sink = sinks.to(torch.float32).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(-1)[..., :last]
        # a padded query may see nothing at all
        return weights if mask is None else weights.nan_to_num_(0.0)

    if queries == 1:  # what its token receives is what it gives itself
        given = weights_of(slice(0, 1))[..., first].mean(1)
        return (given, given) if valid is None else (given * valid, given * valid)
    columns = torch.arange(keys, device=query.device)
    received = torch.zeros(batch, keys, dtype=torch.float32, device=query.device)
    given = torch.zeros(batch, queries, dtype=torch.float32, device=query.device)
    # how much a query counts in the mean over heads
    counted = torch.ones(batch, queries, device=query.device) if valid is None else valid.to(torch.float32)
    own = columns[first : first + queries]
    step = max(1, BLOCK // (batch * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        weights = weights_of(rows)
        share = (counted[:, None, rows] / heads).expand(batch, heads, -1).reshape(batch, 1, -1)
        received[:, : weights.shape[-1]] += (share @ weights.flatten(1, 2)).squeeze(1)
        index = own[rows].view(1, 1, -1, 1).expand(batch, heads, -1, 1)
        given[:, rows] = weights.gather(-1, index).mean(1).squeeze(-1) * counted[:, rows]
    return received[:, own], given


def _mask(logits: Tensor, mask: Tensor) -> None:
    """Apply an attention mask, bool or added, in place."""
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    else:
        logits += mask.to(torch.float32)


class TokenImportance:
    """Importance of the tokens in one decoder layer: ||t||_1 times the attention they receive.

    t is the hidden state that enters the layer. A layer without attention weights (linear attention, state space models)
    takes those of the last layer before it that has some; where there is none, it goes by ||t||_1 alone.

    Args:
        call: the model's current call.
        name: of the layer.
        causal: compare with earlier tokens only, within a prompt, too.
        attends: whether the layer or one before it has attention weights.
    """

    def __init__(self, call: Call, name: str, causal: bool, attends: bool) -> None:
        self._call, self._name, self._causal, self._attends = call, name, causal, attends
        self._norm: Tensor | None = None

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the decoder layer; its first argument is [B, T, H]."""
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        self._norm = x.detach().to(torch.float32).abs().sum(-1)

    @torch.no_grad()
    def values(self) -> tuple[Tensor, Tensor]:
        """Importance [B, T], and [B, T] what of it does not change with later tokens.

        The first is ||t_j||_1 * sum over later queries of A_ij / their number, the token itself included (arXiv
        2410.06270, section 3.3). Of the queries only j itself is known when j is the last token: the second is
        ||t_j||_1 * j * A_jj, the weight that it gives itself beside an even share of all j tokens so far.

        Raises:
            ValueError: attention was computed and not recorded.
        """
        assert self._norm is not None  # hooks of the layer run before its experts
        if self._call.attention is None:
            if self._attends:
                raise ValueError(
                    f"No attention weights were seen before the experts of '{self._name}': the attention implementation was "
                    "changed while tokens are ranked, or the model has one of its own; switch pruning on again, or set "
                    "protect=0."
                )
            return self._norm, self._norm
        received, given = (part.to(self._norm.device) for part in self._call.attention)
        lasting = self._norm * given * self._call.number(given)
        if given.shape[1] == 1:
            return self._norm * received, lasting
        later = self._call.valid_at(self._norm).flip(-1).cumsum(-1).flip(-1).clamp(min=1)
        return self._norm * received / later, lasting

    def select(self, share: float, least: bool = False, images: bool | None = None) -> Tensor:
        """[B * T] bool, the most (or least) important share of the tokens, of those of images or of text only if that is asked."""
        value, own = (-x if least else x for x in self.values())
        among = None if images is None else self._call.of_images(value) == images
        name = (self._name, least) if images is None else (self._name, least, images)
        return self._call.select(name, value, own, share, self._causal, keep=not least, among=among)


@torch.no_grad()
def _received(
    call: Call, module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, options: Any
) -> tuple[Tensor, Tensor]:
    """`attention_received` for the arguments that attention functions get."""
    causal, sinks = options.get("is_causal"), options.get("s_aux")
    return attention_received(
        query.detach(),
        key.detach(),
        mask,
        call.first_key(query.shape[2], key.shape[2]),
        None if call.valid is None else call.valid.to(query.device),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        softcap=options.get("softcap"),
        sinks=getattr(module, "sinks", None) if sinks is None else sinks,
        bias=options.get("position_bias"),
    )


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
        call.attention = _received(call, module, query, key, attention_mask, scaling, kwargs)
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATIONS["eager"], _attend_eager)
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], eager_mask)
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], _attend_fused)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], sdpa_mask)
