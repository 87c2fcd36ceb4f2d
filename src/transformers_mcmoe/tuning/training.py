# SPDX-License-Identifier: Apache-2.0
"""Trains the grids of a packed model's matrices, its norms and its routers on the KL divergence from the dense model's output.

End-to-end training of quantization parameters (Chen et al., EfficientQAT, arXiv 2407.11062) with the dense model as the
teacher instead of labels. The dense model is not there any more: what it returned for the tokens was kept, and the head, which
is not quantized, makes logits of it. Layers are recomputed on the way back, and matrices rebuilt one at a time. Knows a
loaded packed model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from transformers_mcmoe.calibration.sequences import Batch, Sequences
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.models.experts import forward_as
from transformers_mcmoe.models.stream import HiddenStates, model_inputs
from transformers_mcmoe.models.training import divergence, frozen
from transformers_mcmoe.nn import PackedExperts, PackedLinear
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.tuning.linear import TunedLinear

logger = logging.getLogger(__name__)

# steps over which the learning rate rises; it then falls to 0
WARMUP = 8
BETAS = (0.9, 0.95)
# tokens of a step, at least: steps by noisier gradients do more harm than good
STEP_TOKENS = 1024
# the instruction set that multiplies bfloat16 more than twice as fast as float32; others emulate it
BF16 = "avx512-bf16"
# one sequence in so many is not trained on; what is not better on these is not kept
HELD_OUT = 8


@dataclass(frozen=True)
class Teacher:
    """What the dense model returned.

    Attributes:
        tokens: the sequences.
        hidden: hidden states behind its last decoder layer.
        layers: paths of the decoder layers.
    """

    tokens: Sequences
    hidden: HiddenStates
    layers: Sequence[str]


@dataclass(frozen=True)
class Tuned:
    """What a tuning did.

    Attributes:
        steps: that were taken.
        before, after: mean KL divergence from the dense model in nats per token on sequences that were not trained on.
        kept: whether the model was changed.
    """

    steps: int
    before: float
    after: float
    kept: bool


def tune(model: Any, teacher: Teacher, config: MCMoEConfig) -> Tuned:
    """Tune a packed model as its config says.

    Raises:
        ValueError: see `Tuning`.
    """
    meter = Meter(config.progress)
    try:
        tuning = Tuning(model, teacher, not (config.symmetric or config.integer_zeros), meter)
        return tuning.run(config.tuning_steps, config.tuning_rate, config.seed)
    finally:
        meter.close()


class Tuning:
    """Tuning of one loaded model.

    Args:
        model: a packed model, on its device, without expert pruning.
        teacher: what the dense model returned for the tokens to train on, two sequences or more.
        zeros: whether zeros of grids may move.
        meter: shows progress.

    Raises:
        ValueError: the model has no output head.
    """

    def __init__(self, model: Any, teacher: Teacher, zeros: bool, meter: Meter) -> None:
        check_head(model)
        self._model, self._teacher, self._zeros, self._meter = model, teacher, zeros, meter
        self._layers = [model.get_submodule(path) for path in teacher.layers]
        self._tuple = False

    def run(self, steps: int, rate: float, seed: int) -> Tuned:
        """Train for so many steps of one sequence each, or of several short ones.

        Args:
            steps: how many.
            rate: the highest learning rate; a step changes a value by about this share of its scale.
            seed: of the order of sequences.
        """
        count = len(self._teacher.tokens)
        step = min(HELD_OUT, count)
        held_out = list(range(step - 1, count, step))
        trained = [n for n in range(count) if n not in set(held_out)]
        with ExitStack() as stack:
            stack.enter_context(frozen(self._model))
            tuned = stack.enter_context(_prepared(self._model, self._layers, self._zeros))
            for layer in self._layers:
                stack.enter_context(forward_as(layer, self._recomputed(layer.forward)))
            self._meter.start("tune", steps, "step")
            before = self._divergence(held_out)
            parameters = tuned.parameters()
            optimizer = torch.optim.Adam(parameters, lr=rate, betas=BETAS)
            order, shuffled = random.Random(seed), list[int]()
            batch = sequences_per_step(self._teacher.tokens.length)
            for n in range(steps):
                while len(shuffled) < batch:
                    shuffled += order.sample(trained, len(trained))
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (n + 1) / WARMUP) * (1 - n / steps)
                total = 0.0
                for _ in range(batch):
                    with torch.enable_grad(), self._products():
                        loss = self._loss(shuffled.pop()) / batch
                        loss.backward()
                    total += float(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                logger.info("Step %d: KL %.4f.", n + 1, total)
                self._meter.layer_done()
            after = self._divergence(held_out)
            kept = after < before
            if kept:
                tuned.store()
            else:
                logger.warning("Tuning did not lower the KL divergence (%.4f to %.4f); it is left out.", before, after)
        return Tuned(steps, before, after, kept)

    def _products(self) -> torch.autocast:
        """While open, matrices are multiplied in bfloat16 where that is fast; what is kept is judged without it."""
        device = self._model.device.type
        fast = device != "cpu" or BF16 in cpu.instruction_sets()
        return torch.autocast(device, torch.bfloat16, enabled=fast)

    @torch.no_grad()
    def _divergence(self, sequences: Sequence[int]) -> float:
        return sum(float(self._loss(n)) for n in sequences) / len(sequences)

    def _loss(self, sequence: int) -> Tensor:
        """KL divergence on one sequence."""
        one = slice(sequence, sequence + 1)
        batch = self._teacher.tokens.batch(one).to(self._model.device)
        student = self._logits(batch)
        with torch.no_grad(), self._returning(self._teacher.hidden[one]):
            teacher = self._logits(Batch(batch.ids, {}))
        return divergence(batch.predictions(teacher), batch.predictions(student))

    def _recomputed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer's forward that keeps its input only."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                output = checkpoint(forward, *args, use_reentrant=False, **kwargs)
            else:
                output = forward(*args, **kwargs)
            self._tuple = isinstance(output, tuple)
            return output

        return run

    def _logits(self, batch: Batch) -> Tensor:
        return self._model(**model_inputs(self._model, batch)).logits.to(torch.float32)

    @contextmanager
    def _returning(self, hidden: Tensor) -> Iterator[None]:
        """While open, the decoder layers are not run: the last one's output is given."""
        hidden = hidden.to(self._model.device)

        def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuple else hidden

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(forward_as(layer, stub))
            yield


def sequences_per_step(length: int) -> int:
    """Sequences of so many tokens that a step is made of."""
    return -(-STEP_TOKENS // length)


def sequences_for(steps: int, length: int) -> int:
    """Sequences that so many steps can use, those that are not trained on included."""
    used = steps * sequences_per_step(length)
    return max(2, used + -(-used // (HELD_OUT - 1)))


def check_head(model: Any) -> None:
    """Raise ValueError if a model has no output to be tuned on."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no output head, which tuning_steps, 'auto' and importance='loss' need; load the model with "
            "it, or leave those out."
        )


class _Shadow(nn.Module):
    """A float32 copy of a parameter, which takes gradients while the model computes with its own dtype."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        # a step moves norms by a share of themselves, routers by a share of their spread
        self._start, self._size = (
            value.detach().to(torch.float32),
            float(value.detach().float().square().mean().sqrt()),
        )
        self.change = nn.Parameter(torch.zeros_like(self._start))

    def forward(self, original: Tensor) -> Tensor:
        return (self._start + self._size * self.change).to(original.dtype)


class _Prepared:
    """A model whose matrices, norms and routers are being trained."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], zeros: bool) -> None:
        self._model = model
        self.linears = {
            path: TunedLinear(module, zeros)
            for path, module in model.named_modules()
            if isinstance(module, PackedLinear) and module.bits and not module.rank
        }
        self.shadowed = [*_norms(model, layers), *_routers(model)]
        self._shadows: list[_Shadow] = []
        self._order = {id(module): list(module._parameters) for module, _ in self.shadowed}

    def parameters(self) -> list[nn.Parameter]:
        own = [p for linear in self.linears.values() for p in linear.parameters(recurse=False) if p.requires_grad]
        return own + [shadow.change for shadow in self._shadows]

    def enter(self) -> None:
        for path, linear in self.linears.items():
            self._model.set_submodule(path, linear)
        for module, name in self.shadowed:
            shadow = _Shadow(getattr(module, name))
            parametrize.register_parametrization(module, name, shadow)
            module.parametrizations[name].original.requires_grad = False  # type: ignore[union-attr, index]
            self._shadows.append(shadow)

    def leave(self) -> None:
        for module, name in self.shadowed:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            for own in self._order[id(module)]:  # it comes back as the last of the module's parameters
                module._parameters[own] = module._parameters.pop(own)
        for path, linear in self.linears.items():
            self._model.set_submodule(path, linear.base)

    @torch.no_grad()
    def store(self) -> None:
        for linear in self.linears.values():
            linear.store()
        for (module, name), shadow in zip(self.shadowed, self._shadows, strict=True):
            original = module.parametrizations[name].original  # type: ignore[union-attr, index]
            original.copy_(shadow(original))


@contextmanager
def _prepared(model: Any, layers: Sequence[nn.Module], zeros: bool) -> Iterator[_Prepared]:
    """While open, a model computes with grids, norms and routers that take gradients."""
    prepared = _Prepared(model, layers, zeros)
    with ExitStack() as stack:
        stack.callback(prepared.leave)
        prepared.enter()
        yield prepared


def _norms(model: Any, layers: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Norms in decoder layers, and that behind them, whose weights are vectors."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    hidden = model.config.get_text_config().hidden_size
    found = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if "Norm" not in type(module).__name__ or weight is None or weight.dim() != 1:
            continue
        if id(module) in inside or len(weight) == hidden:
            found.append((module, "weight"))
    return found


def _routers(model: Any) -> list[tuple[nn.Module, str]]:
    """Matrices [E, H] beside packed experts: those that score them."""
    found = []
    packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedExperts)]
    for path, experts in packed:
        block = model.get_submodule(path.rpartition(".")[0])
        for name, parameter in block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            inside = block.get_submodule(owner) if owner else block
            scores = parameter.is_floating_point() and parameter.dim() == 2 and len(parameter) == experts.num_experts
            if scores and not isinstance(inside, PackedExperts | PackedLinear):
                found.append((inside, leaf))
    return found
