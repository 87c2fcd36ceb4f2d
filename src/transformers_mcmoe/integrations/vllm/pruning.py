# SPDX-License-Identifier: Apache-2.0
"""Expert pruning at run time in vLLM: the rule of each layer that the checkpoint says.

vLLM does not show what attention tokens receive, so that none are protected and none skip everything: thresholds alone decide.
Routers of learned pruning are read from the checkpoint's files, as vLLM passes their tensors over.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.config import MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.models.experts import layer_of
from transformers_mcmoe.models.stream import Checkpoint, checkpoint_files
from transformers_mcmoe.routing import ROUTER, LayerPruning, LearnedPruning, PrefixRouter, ThresholdPruning, reweighted
from transformers_mcmoe.routing.call import Call

logger = logging.getLogger(__name__)


class Pruning:
    """Run-time pruning of one model.

    Args:
        config: of the checkpoint.

    Attributes:
        source: folder or Hub id of the checkpoint, and its revision.

    Raises:
        ValueError: the checkpoint is pruned by a rule that ranks tokens.
    """

    def __init__(self, config: MCMoEConfig) -> None:
        self.source: tuple[str, str | None] = ("", None)
        self._config = config
        self._odp = config.odp if isinstance(config.odp, ODPConfig) else None
        otp = config.otp if isinstance(config.otp, OTPConfig) else None
        self._otp = otp if otp is not None and otp.trained and otp.on else None
        if self._odp is not None and self._otp is None:
            if self._odp.method not in ("odp", "random"):
                raise ValueError(
                    f"The vLLM plugin does not prune by odp.method={self._odp.method!r}; save the model with 'odp' or none."
                )
            if self._odp.needs_attention:
                logger.warning(
                    "vLLM does not give the attention that tokens receive: expert pruning goes by its thresholds alone; in "
                    "transformers %g of them keep all experts, and %g none.", self._odp.protect, self._odp.drop_all,
                )  # fmt: skip
        self._checkpoint: Checkpoint | None = None

    def of(self, path: str) -> LayerRule | None:
        """The rule of an experts module, None where nothing is skipped."""
        sizes = [1.0] * len(self._config.plan.experts[path].gate_up)  # type: ignore[union-attr]
        if self._otp is not None:
            return LayerRule(self._learned(path, self._otp, sizes))
        odp = self._odp
        levels = None if odp is None else (odp.thresholds or {}).get(path)
        if odp is None or levels is None or not any(levels):
            return None
        if not isinstance(odp.layers, str) and layer_of(path)[1] not in odp.layers:
            return None
        renormalize = odp.renormalize if odp.renormalize is not None else (odp.normalized or {})[path]
        return LayerRule(
            ThresholdPruning(_without_ranks(odp), path, levels, renormalize, Call(), None, sizes, len(sizes))
        )

    def _learned(self, path: str, otp: OTPConfig, sizes: list[float]) -> LearnedPruning:
        """The rule of a module with a trained router."""
        router = self._router(path)
        renormalize = otp.renormalize if otp.renormalize is not None else (otp.normalized or {})[path]
        return LearnedPruning(router, otp.shift, path, renormalize, Call(), sizes, len(sizes))

    def _router(self, path: str) -> PrefixRouter:
        if self._checkpoint is None:
            name, revision = self.source
            self._checkpoint = Checkpoint(checkpoint_files(name, revision))
        number, found = layer_of(path)[1], {}
        for name, tensor in self._checkpoint.slices.items():
            owner, _, leaf = name.rpartition(".")
            if owner.endswith(f".{ROUTER}") and layer_of(owner)[1] == number:
                found[leaf] = torch.as_tensor(tensor[:])
        if set(found) != {"hidden", "scores"}:
            raise ValueError(f"The checkpoint lacks the pruning router of '{path}'; it is damaged or was renamed.")
        rank, slots = len(found["hidden"]), len(found["scores"]) + 1
        router = _FixedRouter(found["hidden"].shape[1] // 2 - slots - 2, slots, rank)
        for leaf, tensor in found.items():
            getattr(router, leaf).data = tensor.to(torch.get_default_device())  # where vLLM builds the model
        router.fixed = PrefixRouter.matrices(router)
        return router


class _FixedRouter(PrefixRouter):
    """A router whose matrices stay: they need not be looked at anew, which torch.compile cannot trace."""

    fixed: tuple[Tensor, Tensor]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The two matrices in float32."""
        return self.fixed


class LayerRule:
    """A rule as vLLM's layers call it: tokens [T, H], ids and weights [T, K] -> ids and weights; skipped slots get the id -1 or E.

    Args:
        pruning: of the layer.
    """

    def __init__(self, pruning: LayerPruning) -> None:
        self._pruning = pruning

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights after pruning."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._pruning(x, ids, weights)
        # traced, or captured on a GPU: without counting, which would change a tensor outside of the graph
        skipped = self._pruning.skipped(x, ids, weights)
        kept = weights.masked_fill(skipped, 0)
        if self._pruning.renormalize:
            kept = reweighted(weights, kept)
        return ids.masked_fill(skipped, -1), kept


def _without_ranks(odp: ODPConfig) -> Any:
    """The options without those that need attention."""
    return replace(odp, protect=0.0, protect_images=None, drop_all=0.0)
