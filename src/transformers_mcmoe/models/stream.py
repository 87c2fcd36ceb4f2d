# SPDX-License-Identifier: Apache-2.0
"""Runs a model one decoder layer at a time, straight from its safetensors files.

`open_runner` gives a `LayerStream`, which holds one layer's weights at a time, or, for models whose layers need each
other's outputs, a `LoadedRunner`, which holds them all. Both run the same calibration tokens through one layer after
the other. This file knows nothing of experts or quantization; what happens to a layer is its caller's business.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from transformers_mcmoe.memory import large_blocks_apart, return_free_memory
from transformers_mcmoe.models.experts import layer_of
from transformers_mcmoe.models.names import CheckpointNames

logger = logging.getLogger(__name__)


class NotStreamable(Exception):
    """A model's layers cannot be run one by one; the message says why."""


class _LastLayer(Exception):
    """Ends a forward pass early."""


@contextmanager
def computing() -> Iterator[None]:
    """Steps out of the contexts that `from_pretrained` builds models in: meta device and the model's default dtype.

    A device context is a torch function mode, which costs every operation a detour through Python, more than a step of
    GPTQ takes; so modes are disabled rather than overruled by `torch.device("cpu")`. Large blocks of memory are kept apart
    meanwhile, so that layers leave no holes in the heap.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad(), large_blocks_apart():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if bars:
            transformers_logging.enable_progress_bar()


class Checkpoint:
    """Lazy access to the tensors of one or several safetensors files; a later file wins.

    Raises:
        ValueError: a file is not safetensors, or cannot be read (truncated, corrupted).
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._handles: list[Any] = []
        self.slices: dict[str, Any] = {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"'{file}' is not a safetensors file; convert the checkpoint to safetensors first.")
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
            except Exception as error:
                raise ValueError(f"'{file}' cannot be read ({error}); download or write it again.") from error
            self._handles.append(handle)
            self.slices.update({key: handle.get_slice(key) for key in handle.keys()})  # noqa: SIM118


class Weights:
    """Loads parts of a checkpoint into a model on meta, with transformers' own loader.

    Args:
        model: a private copy of the model, on meta.
        checkpoint: the dense checkpoint.
        names: its conversion mapping.
        dtype: floating dtype of the weights in memory.
        device: where they go.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, names: CheckpointNames, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model, self.names, self.dtype, self.device = model, names, dtype, device
        self.slices = checkpoint.slices
        self.targets = {key: names.target(key)[0] for key in checkpoint.slices}

    def load(self, keys: Sequence[str], root: nn.Module) -> None:
        """Load checkpoint tensors and make the buffers of `root` that no checkpoint holds.

        Raises:
            ValueError: a tensor of `root` is in no file, or does not have the shape that the model wants.
        """
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": self.device},
            weight_mapping=copy.deepcopy(self.names.mapping),
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, {key: self.slices[key] for key in keys}, config)
        if info.mismatched_keys or info.conversion_errors:
            raise ValueError(
                "The checkpoint does not fit the model: "
                + "; ".join(str(item) for item in [*info.mismatched_keys, *info.conversion_errors.items()][:5])
            )
        self._make_buffers(root)

    def check_embeddings(self) -> None:
        """Raise ValueError if the checkpoint has no input embeddings."""
        for path, module in self.model.named_modules():
            if module is self.model.get_input_embeddings() and module.weight.is_meta:
                raise ValueError(f"The checkpoint lacks '{path}.weight'; download or write it again.")

    def _make_buffers(self, root: nn.Module) -> None:
        """Buffers such as rotary frequencies are in no checkpoint; the model's own initialisation computes them."""
        inside = {id(module) for module in root.modules()}
        for path, module in self.model.named_modules():
            missing = [
                name
                for name in module._non_persistent_buffers_set
                if module._buffers.get(name) is not None and module._buffers[name].is_meta
            ]
            if not missing or id(module) not in inside:
                continue
            for name in missing:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            with init.guard_torch_init_functions():
                self._owner(path)._init_weights(module)

    def _owner(self, path: str) -> Any:
        """The innermost transformers model that holds a module."""
        while path:
            module = self.model.get_submodule(path)
            if isinstance(module, PreTrainedModel):
                return module
            path = path.rpartition(".")[0]
        return self.model

    def tie(self) -> None:
        """Ties weights by hand: `tie_weights` does nothing while `from_pretrained` builds a model."""
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            owner, _, name = target.rpartition(".")
            with_source = self.model.get_submodule(source.rpartition(".")[0])
            parameter = with_source._parameters.get(source.rpartition(".")[2])
            if parameter is not None and not parameter.is_meta:
                self.model.get_submodule(owner)._parameters[name] = parameter


def unload(module: nn.Module) -> None:
    """Put every parameter and buffer of a module back on meta and give the memory back."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="meta")
    gc.collect()
    return_free_memory()


class HiddenStates:
    """The hidden states between two layers, [N, T, H], in a memory-mapped file: they cost disk, not memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = 1
        for length in shape:
            size *= length
        self._data = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def __getitem__(self, batch: slice) -> Tensor:
        return self._data[batch]

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        self._data[batch] = value


class LayerRunner:
    """Runs calibration tokens through a model layer by layer.

    Use as `for i in range(len(runner.layers)): with runner.loaded(i): runner.replay(i); ...; runner.advance(i)`.

    Attributes:
        weights: the model and its checkpoint.
        layers: paths of the decoder layers, in the order of execution.
        reason: why the whole model is held in memory, or None.
        recomputes: every run starts from the tokens, so that `advance` is not needed between layers.
    """

    weights: Weights
    layers: list[str]
    reason: str | None = None
    recomputes = False

    def restart(self) -> None:
        """Begin again with the first layer's inputs, after a pass through the layers."""
        raise NotImplementedError

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        """Layer i with its weights."""
        raise NotImplementedError
        yield

    def replay(self, i: int, batches: int | None = None) -> None:
        """Run layer i on all tokens, or on the first batches of them, for the sake of hooks; nothing is kept."""
        raise NotImplementedError

    def advance(self, i: int) -> float:
        """As `replay`, but the outputs become the next layer's inputs; returns their Frobenius norm."""
        raise NotImplementedError


class LayerStream(LayerRunner):
    """Holds the embeddings and one decoder layer.

    Raises:
        NotStreamable: the layers are not a chain, or need more than their recorded arguments.
    """

    def __init__(self, weights: Weights, layers: list[str], tokens: Tensor, work_dir: Path, batch: int) -> None:
        self.weights, self.layers = weights, layers
        self._modules = [weights.model.get_submodule(path) for path in layers]
        self._keys = self._group_keys()
        self._batches = [slice(start, start + batch) for start in range(0, len(tokens), batch)]
        self._tokens, self._path = tokens, work_dir / "hidden_states.bin"
        self._record()

    def _group_keys(self) -> dict[int, list[str]]:
        """Checkpoint keys by layer, -1 for those outside the layers; the output head is not needed and left out."""
        head = self.weights.model.get_output_embeddings()
        heads = {name for name, module in self.weights.model.named_modules() if head is not None and module is head}
        groups: dict[int, list[str]] = {}
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
        self._returns_tuple = self._probe()
        self._arguments: list[list[tuple[tuple, dict]]] = []
        for batch in self._batches:
            hidden, arguments = self._stub_pass(self._tokens[batch], 0.0)
            if not self._arguments:
                shape = (len(self._tokens), *hidden.shape[1:])
                self._hidden = HiddenStates(self._path, shape, hidden.dtype)
            else:
                arguments = [_share(a, b) for a, b in zip(arguments, self._arguments[0], strict=True)]
            self._hidden[batch] = hidden
            self._arguments.append(arguments)

    def _probe(self) -> bool:
        """Whether layers return tuples; raises if what a layer gets depends on what an earlier layer computed."""
        tokens = self._tokens[self._batches[0]]
        reasons: list[NotStreamable] = []
        for self._returns_tuple in (False, True):
            try:
                _, plain = self._stub_pass(tokens, 0.0)
                _, shifted = self._stub_pass(tokens, 1.0)
            except NotStreamable as error:
                reasons.append(error)
                continue
            if not _same(plain, shifted):
                raise NotStreamable("a decoder layer gets arguments that earlier layers computed")
            return self._returns_tuple
        # a crash says only that layers do not return what the stubs returned
        raise next((reason for reason in reasons if reason.__cause__ is None), reasons[0])

    def _stub_pass(self, tokens: Tensor, shift: float) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """Input of layer 0 and the other arguments of every layer; stubs return their input plus `shift`."""
        given: list[tuple[tuple, dict]] = []
        first: list[Tensor] = []
        last: list[Tensor] = []

        def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if last and hidden_states is not last[-1]:
                raise NotStreamable("the model changes hidden states between its decoder layers")
            first.append(hidden_states)
            given.append((args, kwargs))
            if len(given) == len(self.layers):
                raise _LastLayer
            last.append(hidden_states + shift)
            return (last[-1],) if self._returns_tuple else last[-1]

        for module in self._modules:
            module.forward = stub  # type: ignore[method-assign]
        try:
            self.weights.model(**_inputs(self.weights.model, tokens.to(self.weights.device)))
        except _LastLayer:
            return first[0], given
        except NotStreamable:
            raise
        except Exception as error:
            raise NotStreamable(f"a pass with stubs for decoder layers failed ({error})") from error
        finally:
            for module in self._modules:
                del module.forward
        raise NotStreamable("the model does not call all of its decoder layers")

    def restart(self) -> None:
        for batch in self._batches:
            self._hidden[batch] = self._stub_pass(self._tokens[batch], 0.0)[0]

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

    def _run(self, i: int, index: int) -> Tensor:
        args, kwargs = self._arguments[index][i]
        hidden = self._hidden[self._batches[index]].to(self.weights.device)
        output = self._modules[i](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def replay(self, i: int, batches: int | None = None) -> None:
        for index in range(len(self._batches[:batches])):
            self._run(i, index)

    def advance(self, i: int) -> float:
        squared = 0.0
        for index, batch in enumerate(self._batches):
            output = self._run(i, index)
            squared += _squared(output)
            self._hidden[batch] = output
        return squared**0.5


class _Without(nn.Module):
    """Modules outside the decoder layers, as one root for buffers."""

    def __init__(self, modules: nn.ModuleList, layers: list[nn.Module]) -> None:
        super().__init__()
        inside = {id(part) for layer in layers for part in layer.modules()}
        self._outside = [module for module in modules if id(module) not in inside]

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        yield from self._outside


class LoadedRunner(LayerRunner):
    """Holds the whole dense model; running a layer costs a forward pass that stops behind it."""

    recomputes = True

    def __init__(self, weights: Weights, layers: list[str], tokens: Tensor, batch: int, reason: str) -> None:
        self.weights, self.layers, self.reason = weights, layers, reason
        self._tokens = [tokens[start : start + batch] for start in range(0, len(tokens), batch)]
        weights.load(list(weights.slices), weights.model)
        weights.tie()
        weights.check_embeddings()

    def restart(self) -> None:
        """Nothing: every run starts from the tokens."""

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        yield self.weights.model.get_submodule(self.layers[i])

    def replay(self, i: int, batches: int | None = None) -> None:
        self._replay(i, self._tokens[:batches])

    def advance(self, i: int) -> float:
        return self._replay(i, self._tokens)

    def _replay(self, i: int, batches: Sequence[Tensor]) -> float:
        squared = 0.0

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal squared
            squared += _squared(output[0] if isinstance(output, tuple) else output)
            raise _LastLayer

        handle = self.weights.model.get_submodule(self.layers[i]).register_forward_hook(stop)
        try:
            for tokens in batches:
                try:
                    self.weights.model(**_inputs(self.weights.model, tokens.to(self.weights.device)))
                except _LastLayer:
                    continue
        finally:
            handle.remove()
        return squared**0.5


def _squared(x: Tensor) -> float:
    return float(x.to(torch.float32).square().sum(dtype=torch.float64))


def open_runner(
    model: Any,
    checkpoint: Checkpoint,
    names: CheckpointNames,
    expert_paths: Sequence[str],
    tokens: Tensor,
    work_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    limit: int | None = None,
) -> LayerRunner:
    """A runner for a model's decoder layers: streamed where possible, else with the whole model loaded.

    Args:
        model: a private copy of the model on meta; it is changed.
        checkpoint: its dense checkpoint.
        names: its conversion mapping.
        expert_paths: paths of the experts modules, which tell where the decoder layers are.
        tokens: [N, T] int64 calibration tokens.
        work_dir: folder for the hidden states.
        dtype: floating dtype of weights and hidden states.
        device: where layers run.
        batch: sequences per forward pass.
        limit: bytes that a model which cannot be streamed may take.

    Raises:
        ValueError: the model cannot be streamed and is larger than `limit`, or the checkpoint does not fit it.
    """
    model.eval()  # from_pretrained does this only after loading; router jitter and dropout would be live
    weights = Weights(model, checkpoint, names, dtype, device)
    stacks = list(dict.fromkeys(layer_of(path)[0] for path in expert_paths))
    layers = [f"{stack}.{i}" for stack in stacks for i in range(len(model.get_submodule(stack)))]
    try:
        if len(stacks) > 1:
            raise NotStreamable(f"its experts lie in {len(stacks)} stacks of layers ({', '.join(stacks)})")
        return LayerStream(weights, layers, tokens, work_dir, batch)
    except NotStreamable as error:
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        if limit is not None and size > limit:
            raise ValueError(
                f"{type(model).__name__} cannot be streamed ({error}), and the whole dense model takes "
                f"{size / 1e9:.2f} GB; raise max_memory."
            ) from error
        logger.warning(
            "%s cannot be streamed: %s. The whole dense model is loaded for calibration.", type(model).__name__, error
        )
        return LoadedRunner(weights, layers, tokens, batch, str(error))


def _inputs(model: Any, tokens: Tensor) -> dict[str, Any]:
    inputs = {"input_ids": tokens, "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def _map(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Applies `function` to the leaves of two equal structures of tuples; dicts and lists are leaves, layers may
    write to them."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_map(function, x, y) for x, y in zip(a, b, strict=True))
    return function(a, b)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def _share(given: tuple[tuple, dict], first: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The same arguments, with tensors that equal the first batch's replaced by those: masks and rotary tables."""

    def pick(a: Any, b: Any) -> Any:
        return b if isinstance(a, Tensor) and isinstance(b, Tensor) and _same(a, b) else a

    args = _map(pick, given[0], first[0])
    return args, {key: _map(pick, value, first[1].get(key)) for key, value in given[1].items()}
