# SPDX-License-Identifier: Apache-2.0
"""A runner that holds the embeddings and one decoder layer, and finds out whether a model can be run that way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers_mcmoe.calibration.sequences import Batch, Sequences
from transformers_mcmoe.distributed import World
from transformers_mcmoe.memory import return_free_memory
from transformers_mcmoe.models.experts.base import forward_as
from transformers_mcmoe.models.stream.arguments import close, same, share
from transformers_mcmoe.models.stream.checkpoint import Weights, unload
from transformers_mcmoe.models.stream.runner import (
    HiddenStates,
    LastLayer,
    LayerRunner,
    Norms,
    first_batches,
    model_inputs,
    squared_norms,
)
from transformers_mcmoe.models.stream.spill import Spill, on_device

# tokens whose logits are held at once
HEAD = 128
# name of the pass whose last hidden states are kept
TEACH = "teach"
# how files of hidden states end
STATES = ".hidden"


class NotStreamable(Exception):
    """A model's layers cannot be run one by one; the message says why."""


class LayerStream(LayerRunner):
    """Holds the embeddings and one decoder layer.

    Raises:
        NotStreamable: the layers are not a chain, or need more than their recorded arguments.
    """

    def __init__(
        self,
        weights: Weights,
        layers: list[str],
        tokens: Sequences,
        work_dir: Path,
        batch_tokens: int,
        judged: int = 0,
        world: World = World(),  # noqa: B008  it has no state
        durable: bool = False,
    ) -> None:
        self.weights, self.layers, self.sequences, self.world = weights, layers, len(tokens), world
        self._durable = durable and world.leads
        self._modules = [weights.model.get_submodule(path) for path in layers]
        self._keys = self._group_keys()
        self._batch_tokens, self.judged = batch_tokens, judged
        self.tokens, self._folder = tokens, work_dir
        self._batches = self._split(len(tokens))
        self._name, self._layer = "pass", 0
        self._record()

    def _split(self, sequences: int) -> list[slice]:
        """Batches of the first sequences; judged ones are in batches of their own."""
        parts = [(0, min(self.judged, sequences)), (self.judged, sequences)]
        return [
            slice(first + own.start, first + own.stop)
            for first, stop in parts
            for own in self.tokens[first:stop].splits(self._batch_tokens)
        ]

    @property
    def _skipped(self) -> int:
        """Batches of judged sequences."""
        return len(self.tokens[: min(self.judged, self.sequences)].splits(self._batch_tokens))

    def _group_keys(self) -> dict[int, list[str]]:
        """Checkpoint keys by layer, -1 for those outside the layers; the output head is not needed and left out."""
        head = self.weights.model.get_output_embeddings()
        heads = {name for name, module in self.weights.model.named_modules() if head is not None and module is head}
        groups: dict[int, list[str]] = {}
        self._head_keys = [key for key, target in self.weights.targets.items() if target.rpartition(".")[0] in heads]
        for key, target in self.weights.targets.items():
            layer = next((i for i, path in enumerate(self.layers) if target.startswith(path + ".")), -1)
            if self.weights.names.holds(target) and target.rpartition(".")[0] not in heads:
                groups.setdefault(layer, []).append(key)
        return groups

    def _record(self) -> None:
        """One pass with stubs for layers: what the model hands to each of them, and the embedded tokens."""
        model = self.weights.model
        rest = nn.ModuleList([m for p, m in model.named_modules() if p and not p.startswith(tuple(self.layers))])
        self.weights.load(self._keys.get(-1, []), _Without(rest, self._modules))
        self.weights.tie()
        self.weights.check_embeddings()
        self._embedded: HiddenStates | None = None  # those that enter the first layer, where making them took images
        self._hidden: Any = None  # `HiddenStates` that enter the layer, made where they are first needed
        self._returns_tuple, self._like = self._probe()
        if not self.tokens.are_text:
            self._embed()
            self._unload_towers()

    def _embed(self) -> None:
        """The embedded tokens of all batches, and what else the layers are given, which may have the batch's size.

        Images are looked at once: what becomes of them is kept on disk.
        """
        start = self._layer == 0
        self._hidden = self._states(self._layer)
        if self._embedded is not None:
            for part in self._batches if start else ():
                self._hidden[part] = self._embedded[part]
            return
        spill = None if self.tokens.are_text else Spill(self._folder / "arguments.bin")
        self._arguments: list[list[tuple[tuple, dict]]] = []
        self._added: list[dict[int, tuple[Tensor, Tensor]]] = []
        for part in self._batches:
            hidden, arguments, added = self._stub_pass(self.tokens.batch(part), 0.0)
            if spill is not None:
                if self._embedded is None:
                    self._embedded = HiddenStates(self._folder / "embedded.bin", self._lengths, hidden)
                self._embedded[part] = hidden
                arguments = spill.kept(arguments)
                added = {i: spill.kept(own) for i, own in added.items()}
            elif self._arguments:
                arguments = [share(a, b) for a, b in zip(arguments, self._arguments[0], strict=True)]
            if start:
                self._hidden[part] = hidden
            self._arguments.append(arguments)
            self._added.append(added)

    @property
    def _lengths(self) -> list[int]:
        return [len(ids) for ids in self.tokens.ids]

    def _file(self, layer: int) -> Path:
        return self._folder / f"{self._name}-{layer:05d}{STATES}"

    def _states(self, layer: int, suffix: str = "") -> HiddenStates:
        path = self._file(layer)
        return HiddenStates(path.with_name(path.name + suffix), self._lengths[: self.sequences], self._like)

    def _unload_towers(self) -> None:
        """Free what only images went through: all that is neither beside the decoder layers nor embeddings or head."""
        model = self.weights.model
        text = self.layers[0].rpartition(".")[0].rpartition(".")[0]
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        for path, module in list(model.named_modules()):
            around = f"{text}.".startswith(f"{path}.") or path.startswith(f"{text}.") or not (path and text)
            if not around and not any(module is end for end in ends) and module._parameters:
                unload(module, inside=False)

    def _probe(self) -> tuple[bool, Tensor]:
        """Whether layers return tuples, and a batch of hidden states; raises if what a layer gets depends on what an earlier one computed."""
        first = next((n for n, part in enumerate(self._batches) if self.tokens.batch(part).inputs), 0)
        batch = self.tokens.batch(self._batches[first])
        reasons: list[NotStreamable] = []
        for self._returns_tuple in (False, True):
            try:
                first_states, plain, added = self._stub_pass(batch, 0.0)
                _, shifted, changed = self._stub_pass(batch, 1.0)
            except NotStreamable as error:
                reasons.append(error)
                continue
            if not same(plain, shifted):
                raise NotStreamable("a decoder layer gets arguments that earlier layers computed")
            if added.keys() != changed.keys() or not all(close(added[i], changed[i]) for i in added):
                raise NotStreamable("the model changes hidden states between its decoder layers")
            return self._returns_tuple, first_states
        # a crash says only that layers do not return what the stubs returned
        raise next((reason for reason in reasons if reason.__cause__ is None), reasons[0])

    def _stub_pass(
        self, batch: Batch, value: float
    ) -> tuple[Tensor, list[tuple[tuple, dict]], dict[int, tuple[Tensor, Tensor]]]:
        """Input of layer 0, the other arguments of every layer, and what is added before it to what the layer before returned.

        Stubs return `value` everywhere. What is added (features of images, in some models) is by layer, as rows of the
        batch's tokens [n] and their values [n, H].
        """
        given: list[tuple[tuple, dict]] = []
        first: list[Tensor] = []
        added: dict[int, tuple[Tensor, Tensor]] = {}

        def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if given:
                change = (hidden_states - value).flatten(0, 1)
                rows = change.flatten(1).any(-1).nonzero().flatten()
                if len(rows):
                    added[len(given)] = rows, change[rows]
            else:
                first.append(hidden_states)
            given.append((args, kwargs))
            if len(given) == len(self.layers):
                raise LastLayer
            returned = torch.full_like(hidden_states, value)
            return (returned,) if self._returns_tuple else returned

        for module in self._modules:
            module.forward = stub  # type: ignore[method-assign]
        try:
            self.weights.model(**model_inputs(self.weights.model, batch.to(self.weights.device)))
        except LastLayer:
            return first[0], given, added
        except NotStreamable:
            raise
        except Exception as error:
            raise NotStreamable(f"a pass with stubs for decoder layers failed ({error})") from error
        finally:
            for module in self._modules:
                del module.forward
        raise NotStreamable("the model does not call all of its decoder layers")

    @property
    def calls(self) -> int:
        return max(1, len(self._batches) - self._skipped)

    def restart(self, sequences: int | None = None, name: str = "pass", layer: int = 0) -> None:
        self.sequences = min(sequences or len(self.tokens), len(self.tokens))
        self._batches = self._split(self.sequences)
        self._name, self._layer = name, layer
        for file in self._folder.glob(f"*{STATES}"):
            pass_name, _, number = file.stem.rpartition("-")
            if pass_name not in {name, *self.spared} or (pass_name == name and int(number) != layer):
                file.unlink()
        self._embed()
        if layer:
            self._hand_on(self._hidden)

    def reached(self, name: str, most: int) -> int:
        files = (self._folder / f"{name}-{layer:05d}{STATES}" for layer in range(most, 0, -1))
        return self.world.first(lambda: next((most - n for n, file in enumerate(files) if file.is_file()), 0))

    def _hand_on(self, states: HiddenStates) -> None:
        """Give all ranks what the first has kept."""
        if self.world.size > 1:
            for part in self._batches:
                states[part] = self.world.share(states[part].clone(), 0)

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        module = self._modules[i]
        self.weights.load(self._keys.get(i, []), module)
        missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"The checkpoint lacks '{self.layers[i]}.{missing[0]}'; download or write it again.")
        for parameter in module.parameters():
            # a tensor may be a view of the mapped file: what is written to it would stay in memory until the file is closed
            parameter.data = parameter.data.clone()
        return_free_memory()
        try:
            yield module
        finally:
            unload(module)

    def _begin(self) -> None:
        """Make what enters the first layer, unless a pass has begun."""
        if self._hidden is None:
            self._embed()

    def _run(self, i: int, index: int) -> Tensor:
        return self._call(i, index, self._hidden[self._batches[index]].to(self.weights.device))

    def _call(self, i: int, index: int, hidden: Tensor) -> Tensor:
        batch = self._batches[index]
        self.images = None if self.tokens.are_text else self.tokens.images(batch.start)
        args, kwargs = self._arguments[index][i]
        if not self.tokens.are_text:
            args, kwargs = on_device((args, kwargs), self.weights.device)
        if i in self._added[index]:
            rows, values = (x.to(hidden.device) for x in self._added[index][i])
            hidden = hidden.clone()
            hidden.flatten(0, 1)[rows] += values
        output = self._modules[i](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def states(self, judged: bool = False) -> list[Tensor]:
        self._begin()
        batches = self._batches[: self._skipped] if judged else self._batches
        return [self._hidden[batch].to(self.weights.device, copy=True) for batch in batches]

    def through(self, i: int, states: Sequence[Tensor]) -> list[Tensor]:
        # a layer may write to what it is given
        self._begin()
        device = self.weights.device
        return [self._call(i, index, state.to(device, copy=True)) for index, state in enumerate(states)]

    def losses(self, states: Iterable[Sequence[Tensor]]) -> list[float]:
        with self._with_head():
            return [self._loss(own) for own in states]

    @torch.no_grad()
    def divergence(self, states: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
        total, count = 0.0, 0
        with self._with_head():
            for batch, mine, theirs in zip(self._batches, states, dense, strict=False):
                for n, own, other in zip(range(*batch.indices(len(self.tokens))), mine, theirs, strict=True):
                    scored = self.tokens.scored(n)
                    row, own, other = (x[scored.to(x.device)] for x in (self.tokens.ids[n], own, other))
                    count += len(row)
                    for part in zip(row.split(HEAD), own.split(HEAD), other.split(HEAD), strict=True):
                        tokens, *states_of = (x[None] for x in part)
                        q, p = (self._logits(tokens, x).to(torch.float32).log_softmax(-1) for x in states_of)
                        total += float((p.exp() * (p - q)).sum(-1).sum(dtype=torch.float64))
        return total / count

    def _loss(self, states: Sequence[Tensor]) -> float:
        total, count = 0.0, 0
        for batch, hidden in zip(self._batches, states, strict=False):
            for n, own in zip(range(*batch.indices(len(self.tokens))), hidden, strict=True):
                row, scored = self.tokens.ids[n], self.tokens.scored(n)[:-1]
                count += int(scored.sum())
                parts = (row[:-1][scored], row[1:][scored], own[:-1][scored.to(own.device)])
                for tokens, wanted, part in zip(*(x.split(HEAD) for x in parts), strict=True):
                    logits = self._logits(tokens[None], part[None])[0].to(torch.float32)
                    total += float(functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
        return total / count

    def _logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits [N, T, V] of tokens [N, T] whose hidden states behind the last layer are given."""
        hidden = hidden.to(self.weights.device)

        def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(forward_as(module, stub))
            batch = Batch(tokens.to(self.weights.device), {})  # images were looked at before the layers
            return self.weights.model(**model_inputs(self.weights.model, batch)).logits

    @contextmanager
    def _with_head(self) -> Iterator[None]:
        """The output head with its weights."""
        head = self.weights.model.get_output_embeddings()
        owned = any(parameter.is_meta for parameter in head.parameters())
        if owned:
            self.weights.load(self._head_keys, head)
        try:
            yield
        finally:
            if owned:
                unload(head)

    def outputs(self, sequences: int, path: Path, done: Callable[[], None]) -> HiddenStates:
        if self.world.first(path.is_file):  # an earlier run got as far
            kept = HiddenStates(path, self._lengths[:sequences], self._like)
            self.sequences, self._batches = sequences, self._split(sequences)
            self._hand_on(kept)
            return kept
        first = self.reached(TEACH, len(self.layers))
        self.restart(sequences, TEACH, first)
        for i in range(len(self.layers)):
            if i >= first:
                with self.loaded(i):
                    self.advance(i)
            done()
        self._hidden.move(path)
        return self._hidden

    def replay(self, i: int, tokens: int | None = None) -> None:
        self._begin()
        start = self._skipped
        for index in range(start, start + len(first_batches(self._batches[start:], self.tokens, tokens))):
            self._run(i, index)

    def advance(self, i: int) -> Norms:
        self._begin()
        self.weights.checkpoint.read_ahead(self._keys.get(i + 1, []))  # it comes next
        if self._layer:
            # inputs of the layer before stay until its results are written down
            self._file(self._layer - 1).unlink(missing_ok=True)
        squares, following = [], self._states(self._layer + 1, ".tmp")
        size, rank = self.world.size, self.world.rank
        for index, batch in enumerate(self._batches):
            turn = index - index % size  # every rank runs one of `size` batches, then each hands its own on
            if index == turn and turn + rank < len(self._batches):
                own = self._run(i, turn + rank).to(self._like.dtype).contiguous()
            output = own if index == turn + rank else torch.empty_like(following[batch], device=self.weights.device)
            self.world.share(output, index - turn)
            squares.append(squared_norms(output))
            following[batch] = output
        self._layer += 1
        following.move(self._file(self._layer), self._durable and self._name != "pass")
        self._hidden = following
        return Norms.of(squares)


class _Without(nn.Module):
    """Modules outside the decoder layers, as one root for buffers."""

    def __init__(self, modules: nn.ModuleList, layers: list[nn.Module]) -> None:
        super().__init__()
        inside = {id(part) for layer in layers for part in layer.modules()}
        self._outside = [module for module in modules if id(module) not in inside]

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        yield from self._outside
