# SPDX-License-Identifier: Apache-2.0
"""Trains the routers of learned expert pruning on a loaded model (`routing.otp` decides with them).

Two stages. `costs` runs calibration tokens through the unpruned model and measures what dropping each slot costs; `fitting`
fits each layer's router to the logarithm of the expected cost. Then `joint` runs the model under sampled prefixes, and all
routers are trained on the KL divergence from the unpruned model. At the end one shift for all layers is set so that the
wanted share of slots is skipped: layers and tokens compete for what is kept.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.sequences import Batch
from transformers_mcmoe.calibration.sequences import Sequences as Calibration
from transformers_mcmoe.config import OTPConfig
from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.models.stream import model_inputs
from transformers_mcmoe.models.training import divergence, frozen
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.routing import PrefixRouter, check_top_k, set_router
from transformers_mcmoe.routing.otp.costs import CostMeter, Trace
from transformers_mcmoe.routing.otp.fitting import Matrices, fit_router
from transformers_mcmoe.routing.otp.joint import Routed, shift_curve, shift_for

logger = logging.getLogger(__name__)

# share of the calibration sequences that no router is fitted to: they say when to stop
HELD_OUT = 0.2
# how often they are looked at while all routers are trained, and how fast the price of a slot follows
EVALUATIONS, PRICE_RATE = 8, 8.0
# runs under pruning by which the shift follows what pruning does to later layers, and their tokens
SETTLING, SETTLING_TOKENS = 3, 8192


class RouterTraining:
    """Training of all routers of one model.

    Args:
        model: the loaded model, without pruning.
        found: adapters of its experts modules, by path.
        otp: the options.
        meter: shows how far it is.
    """

    def __init__(self, model: Any, found: Mapping[str, FusedExperts], otp: OTPConfig, meter: Meter) -> None:
        self._model, self._found, self._otp, self._meter = model, found, otp, meter
        self._random = torch.Generator().manual_seed(otp.seed)

    def run(self, tokens: Calibration) -> OTPConfig:
        """Train on calibration sequences, give every experts module its router, and return the options completed.

        Raises:
            ValueError: there is one sequence only; tokens have one expert each; or more is asked for than can be skipped.
        """
        if self._otp.objective == "logits" and self._model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(self._model).__name__} has no output head, which objective='logits' needs; load the model with it, or "
                "use OTPConfig(objective='layers')."
            )
        tokens = tokens[: max(2, self._otp.tokens // tokens.length)]
        if len(tokens) < 2:
            raise ValueError("otp needs two calibration sequences or more, one of them to stop its training by.")
        held_out = max(1, round(HELD_OUT * len(tokens)))
        fitted, kept = self._batches(tokens[:-held_out]), self._batches(tokens[-held_out:])
        meter = CostMeter(self._model, self._found, self._otp, self._random, self._meter)
        with frozen(self._model):
            train, test = meter.measure(fitted, "measure"), meter.measure(kept, "measure held-out")
            for path, trace in train.items():
                check_top_k(trace.weights[0].shape[1], path)
            otp = self._described(train)
            matrices = {path: fit_router(train[path], test[path], otp, self._random) for path in self._found}
            routed = Routed(self._model, self._found, renormalized(otp))
            otp = self._shifted(otp, routed, matrices, fitted)
            if otp.steps:
                matrices = self._train(otp, routed, matrices, fitted, kept)
                otp = self._shifted(otp, routed, matrices, fitted)
        self._meter.close()
        for path, (hidden, scores) in matrices.items():
            router = PrefixRouter(hidden.shape[1] - scores.shape[0] - 3, scores.shape[0] + 1, len(hidden))
            router.store(hidden, scores)
            set_router(self._model.get_submodule(path), router)
        return otp

    def _batches(self, tokens: Calibration) -> list[Batch]:
        device = self._model.get_input_embeddings().weight.device
        return [batch.to(device) for batch in tokens.batches(self._otp.batch_tokens)]

    def _described(self, traces: Mapping[str, Trace]) -> OTPConfig:
        """The options with what the routing itself tells."""
        routed = [(~torch.cat(trace.costs).isnan()).sum() for trace in traces.values()]
        slots = [trace.joined()[1].numel() for trace in traces.values()]
        return replace(
            self._otp,
            slots=max(trace.weights[0].shape[1] for trace in traces.values()),
            droppable=float(sum(routed) / (sum(slots))),
            normalized={path: trace.normalized for path, trace in traces.items()},
        )

    def _shifted(
        self, otp: OTPConfig, routed: Routed, matrices: Mapping[str, Matrices], batches: Sequence[Batch]
    ) -> OTPConfig:
        """The options with shifts by which the wanted share is skipped while layers before are pruned, too."""
        sizes = itertools.accumulate(batch.numel() for batch in batches)
        few = batches[: max(1, sum(size <= SETTLING_TOKENS for size in sizes))]
        shift = -math.inf  # keeps everything
        for _ in range(SETTLING):
            points = self._points(routed, matrices, few, shift)
            otp = replace(otp, shifts=tuple(shift_curve(points)))
            shift = otp.shift
        return otp

    def _points(
        self, routed: Routed, matrices: Mapping[str, Matrices], batches: Sequence[Batch], shift: float
    ) -> list[Tensor]:
        """Where the slots of some batches are dropped, a tensor per layer and batch, under pruning by a shift."""
        found: list[Tensor] = []
        with torch.no_grad():
            for batch in batches:
                routed.logits(batch, matrices, max(shift, -1e6))
                found += routed.points
        return found

    def _train(
        self,
        otp: OTPConfig,
        routed: Routed,
        start: Mapping[str, Matrices],
        fitted: Sequence[Batch],
        kept: Sequence[Batch],
    ) -> dict[str, Matrices]:
        """Routers trained together on the model's output, from those given; the best on held-out sequences."""
        assert otp.steps is not None
        matrices = {path: tuple(m.clone().requires_grad_() for m in pair) for path, pair in start.items()}
        optimizer = torch.optim.Adam([m for pair in matrices.values() for m in pair], lr=otp.learning_rate)
        best, chosen, waited = self._held_out(routed, start, kept, otp), dict(start), 0
        logger.info("KL of the fitted routers on held-out tokens: %.4f.", best)
        self._meter.start("train", otp.steps, "step")
        (first, last), price = otp.temperatures, 0.0
        for step in range(otp.steps):
            batch = fitted[int(torch.randint(len(fitted), (1,), generator=self._random))]
            temperature = first * (last / first) ** (step / max(1, otp.steps - 1))
            with torch.no_grad():
                teacher = self._model(**model_inputs(self._model, batch)).logits.to(torch.float32)
            optimizer.zero_grad()
            with torch.enable_grad():
                student = routed.logits(batch, matrices, otp.shift, temperature, self._random)  # type: ignore[arg-type]
                kl = divergence(batch.predictions(teacher), batch.predictions(student))
                share = torch.cat(routed.kept).mean()
                price = price or float(kl.detach())
                (kl + price * share).backward()
            optimizer.step()
            # keeping gets dearer while too little is skipped
            price *= math.exp(PRICE_RATE * (otp.share - routed.skipped))
            self._meter.layer_done()
            if (step + 1) % max(1, otp.steps // EVALUATIONS) == 0 or step + 1 == otp.steps:
                now = {path: tuple(m.detach().clone() for m in pair) for path, pair in matrices.items()}
                loss = self._held_out(routed, now, kept, otp)  # type: ignore[arg-type]
                logger.info("Step %d: KL %.4f on held-out tokens, price %.4f.", step + 1, loss, price)
                best, chosen, waited = (loss, now, 0) if loss < best else (best, chosen, waited + 1)  # type: ignore[assignment]
            if waited >= otp.patience:
                break
        return chosen

    @torch.no_grad()
    def _held_out(
        self, routed: Routed, matrices: Mapping[str, Matrices], batches: Sequence[Batch], otp: OTPConfig
    ) -> float:
        """Mean KL divergence on batches of which the wanted share of slots is skipped."""
        total, count, shift = 0.0, 0, shift_for(self._points(routed, matrices, batches, otp.shift), otp.share)
        for batch in batches:
            teacher = self._model(**model_inputs(self._model, batch)).logits.to(torch.float32)
            pair = (batch.predictions(teacher), batch.predictions(routed.logits(batch, matrices, shift)))
            total, count = total + float(divergence(*pair)) * len(pair[0]), count + len(pair[0])
        return total / count


def renormalized(otp: OTPConfig) -> dict[str, bool]:
    """By experts path, whether kept weights are scaled to the sum that all had."""
    normalized = otp.normalized or {}
    return {path: own if otp.renormalize is None else otp.renormalize for path, own in normalized.items()}
