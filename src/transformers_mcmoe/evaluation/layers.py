# SPDX-License-Identifier: Apache-2.0
"""How the error of a compressed model builds up from decoder layer to decoder layer.

Runs both models on the same tokens and compares the hidden states between their layers. It finds the layers through
the experts and knows nothing else of an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers_mcmoe.evaluation.protocol import (
    Protocol,
    as_json,
    check_batch,
    check_fits,
    dtype_of,
    evaluating,
    read_text,
    seed_of,
)
from transformers_mcmoe.models.experts import find_experts, stacks_of
from transformers_mcmoe.nn import PackedExperts
from transformers_mcmoe.pruning import without_expert_pruning


@dataclass(frozen=True)
class Distance:
    """How far hidden states h are from the dense model's d.

    Attributes:
        relative_error: |h - d| / |d|, Frobenius norms over all tokens; a few tokens of large norm may dominate it.
        cosine: of h and d, the mean over tokens: it weighs all tokens alike.
    """

    relative_error: float
    cosine: float


@dataclass(frozen=True)
class LayerError:
    """One decoder layer.

    Attributes:
        path: module path of the layer.
        entering: whole prefix: what enters the layer in the compressed model, against what enters it in the dense one.
        alone: single layer: the compressed layer's output on the dense model's hidden states, against the dense
            layer's.
    """

    path: str
    entering: Distance
    alone: Distance


@dataclass(frozen=True)
class ErrorBuildup:
    """The error of every decoder layer.

    Attributes:
        layers: in the order of execution.
        leaving: whole prefix: what leaves the last layer, before the final norm.
        protocol: what other figures must share to be comparable; its tokens are positions.
        seed: the one the model was compressed with, None for a dense model.
    """

    layers: tuple[LayerError, ...]
    leaving: Distance
    protocol: Protocol
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: the figures, `protocol`, `seed` and `versions`; numbers that are not finite are None."""
        figures = {"layers": [asdict(layer) for layer in self.layers], "leaving": asdict(self.leaving)}
        return as_json(self.protocol, self.seed, figures)


class _LastLayer(Exception):
    """Ends a forward pass before the output head."""


class _Sums:
    """Adds up a distance over batches, in float64."""

    def __init__(self) -> None:
        self.error = self.norm = self.cosine = 0.0
        self.tokens = 0

    def add(self, own: Tensor, dense: Tensor) -> None:
        """Add hidden states [.., H] of any device and dtype."""
        own, dense = (x.to("cpu", torch.float64).flatten(0, -2) for x in (own, dense))
        error = (own - dense).square().sum(-1)
        cosine = functional.cosine_similarity(own, dense, dim=-1, eps=1e-30)
        # a row of zeros, such as a padding token's embedding, has no angle
        zero = (own == 0).all(-1) | (dense == 0).all(-1)
        cosine = torch.where(zero, (error == 0).to(torch.float64), cosine)
        self.error += float(error.sum())
        self.norm += float(dense.square().sum())
        self.cosine += float(cosine.sum())
        self.tokens += len(dense)

    def distance(self) -> Distance:
        """Of everything added."""
        error = 0.0 if self.error == 0 else (self.error / self.norm) ** 0.5 if self.norm else float("inf")
        return Distance(error, self.cosine / self.tokens)


@torch.no_grad()
def error_buildup(
    model: Any,
    reference: Any,
    tokens: Tensor,
    *,
    context: int | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> ErrorBuildup:
    """Compare the hidden states of a compressed and the dense model layer by layer.

    Runs both models and, on the dense hidden states, each compressed layer once more. Holds the hidden states between
    all layers of one batch, (L + 1) * batch * T * H in the reference's dtype; no logits are computed. Expert pruning is off
    meanwhile: what it costs depends on the whole sequence, not on a layer alone.

    Args:
        model: the compressed model.
        reference: the dense model, another object with the same decoder layers.
        tokens: [n] int ids of a text, cut into windows of `context` without overlap; or such windows [N, T].
        context: tokens of a window; a text needs it, windows [N, T] state it themselves.
        limit: windows to run, spread evenly over the text; default all.
        batch: windows per forward pass.

    Returns:
        The distances of every layer, over all positions of all windows.

    Raises:
        ValueError: as `evaluate`, or the models are one object or have other decoder layers.
        NotImplementedError: the model's experts lie in several stacks of layers, or not all layers are run.
    """
    check_batch(batch)
    text = read_text(tokens, context, None, limit)
    check_fits(text, model, reference)
    paths = _layer_paths(reference)
    with without_expert_pruning(model), evaluating(model, reference):
        run = _Run(model, reference, paths)
        for group in text.batches(batch):
            run.batch(torch.stack([window.ids for window in group]))
    entering = [sums.distance() for sums in run.entering]
    alone = [sums.distance() for sums in run.alone]
    dtypes = {"model": dtype_of(model), "reference": dtype_of(reference), "sums": "float64"}
    return ErrorBuildup(
        layers=tuple(LayerError(*layer) for layer in zip(paths, entering[:-1], alone, strict=True)),
        leaving=entering[-1],
        protocol=text.protocol(run.entering[-1].tokens, **dtypes),
        seed=seed_of(model),
    )


def _layer_paths(reference: Any) -> list[str]:
    """Paths of the decoder layers, in the order of execution."""
    packed = [path for path, module in reference.named_modules() if isinstance(module, PackedExperts)]
    stacks = stacks_of(packed or find_experts(reference))
    if len(stacks) > 1:
        raise NotImplementedError(
            f"The experts of {type(reference).__name__} lie in {len(stacks)} stacks of layers ({', '.join(stacks)}), "
            "but the error build-up is measured along one."
        )
    return [f"{stacks[0]}.{i}" for i in range(len(reference.get_submodule(stacks[0])))]


class _Run:
    """Both models' decoder layers, and the distances between them so far.

    Attributes:
        entering: by layer, whole prefix; the last one leaves the last layer.
        alone: by layer, single layer.
    """

    def __init__(self, model: Any, reference: Any, paths: Sequence[str]) -> None:
        if model is reference:
            raise ValueError("The model and the reference are one object; give the dense model as the reference.")
        self._model, self._reference = model, reference
        self._dense = [reference.get_submodule(path) for path in paths]
        self._layers = self._same_layers(paths)
        self.entering = [_Sums() for _ in range(len(paths) + 1)]
        self.alone = [_Sums() for _ in paths]

    def _same_layers(self, paths: Sequence[str]) -> list[nn.Module]:
        modules = dict(self._model.named_modules())
        stack = paths[0].rpartition(".")[0]
        count = len(list(modules[stack].children())) if stack in modules else 0
        if count != len(paths):
            raise ValueError(
                f"The reference has {len(paths)} decoder layers at '{stack}', but the model has {count}; give the "
                "dense model that it was compressed from."
            )
        return [modules[path] for path in paths]

    def batch(self, ids: Tensor) -> None:
        """Add windows [N, T]."""
        states = self._dense_states(ids)

        def enter(i: int, hidden: Tensor) -> None:
            self.entering[i].add(hidden, states[i])

        def leave(i: int, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            if i + 1 == len(self._layers):
                self.entering[-1].add(output, states[-1])

        self._forward(self._model, self._layers, ids, enter, leave)

    def _dense_states(self, ids: Tensor) -> list[Tensor]:
        """Runs the reference, and every compressed layer on its hidden states.

        Returns:
            What enters every layer and what leaves the last, copies on CPU: a layer may write to its arguments.
        """
        states: list[Tensor] = []

        def enter(i: int, hidden: Tensor) -> None:
            states.append(hidden.to("cpu", copy=True))

        def leave(i: int, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            self.alone[i].add(self._run_alone(i, states[i], args, kwargs), output)
            if i + 1 == len(self._dense):
                states.append(output.to("cpu", copy=True))

        self._forward(self._reference, self._dense, ids, enter, leave)
        return states

    def _run_alone(self, i: int, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Output of compressed layer i for the dense layer's arguments."""
        layer = self._layers[i]
        device = next((p.device for p in layer.parameters() if not p.is_meta), self._model.device)
        dtypes = {hidden.dtype: self._model.dtype}
        args = _moved(args[1:], device, dtypes)
        kwargs = {name: _moved(value, device, dtypes) for name, value in kwargs.items() if name != "hidden_states"}
        return _first(layer(hidden.to(device, self._model.dtype, copy=True), *args, **kwargs))

    def _forward(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        ids: Tensor,
        enter: Callable[[int, Tensor], None],
        leave: Callable[[int, tuple, dict[str, Any], Tensor], None],
    ) -> None:
        """Run a model up to its last layer with `enter` before and `leave` after each layer."""
        order: list[int] = []

        def before(i: int) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                order.append(i)
                enter(i, args[0] if args else kwargs["hidden_states"])

            return hook

        def after(i: int) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
                leave(i, args, kwargs, _first(output))
                if i + 1 == len(layers):
                    raise _LastLayer

            return hook

        with ExitStack() as stack:
            for i, layer in enumerate(layers):
                stack.enter_context(layer.register_forward_pre_hook(before(i), with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(after(i), with_kwargs=True))
            with suppress(_LastLayer):
                model(input_ids=ids.to(model.device), use_cache=False)
        if order != list(range(len(layers))):
            raise NotImplementedError(
                f"{type(model).__name__} runs its {len(layers)} decoder layers in the order {order}; the error "
                "build-up needs each of them once, in turn."
            )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _moved(value: Any, device: torch.device, dtypes: dict[torch.dtype, torch.dtype]) -> Any:
    """A copy of a further argument of a layer, on the device of another model and in its dtype.

    Containers are copied too: layers that share keys and values write them into a dict.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtypes.get(value.dtype, value.dtype), copy=True)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device, dtypes) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtypes) for key, item in value.items()}
    return value
