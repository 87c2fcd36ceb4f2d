# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint files, and how parts of them become a module's weights and go again."""

from __future__ import annotations

import copy
import gc
import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from transformers_mcmoe.memory import return_free_memory
from transformers_mcmoe.models.names import CheckpointNames


def checkpoint_files(name: str, revision: str | None = None) -> list[str]:
    """The safetensors files of a model, by its folder, or Hub id and revision.

    Raises:
        ValueError: it has none.
        OSError: there is no such model.
    """
    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "revision": revision}
    single = cached_file(name, "model.safetensors", **missing)
    if single is not None:
        return [single]
    index = cached_file(name, "model.safetensors.index.json", **missing)
    if index is None:
        raise ValueError(f"'{name}' has no model.safetensors; give the checkpoint in safetensors.")
    return get_checkpoint_shard_files(name, index, revision=revision)[0]


# bytes that are asked for at a time
AHEAD = 1 << 24


class Checkpoint:
    """Lazy access to the tensors of one or several safetensors files; a later file wins.

    Raises:
        ValueError: a file is not safetensors, or cannot be read (truncated, corrupted).
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._handles: list[Any] = []
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, first byte and end of every tensor
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
            self._places.update(_places(Path(file)))

    def places(self, keys: Sequence[str]) -> list[tuple[Path, int, int]]:
        """Where tensors lie, as (file, first byte, end), with neighbours together."""
        found: list[tuple[Path, int, int]] = []
        for file, start, stop in sorted(self._places[key] for key in keys):
            if found and found[-1][0] == file and found[-1][2] == start:
                found[-1] = file, found[-1][1], stop
            else:
                found.append((file, start, stop))
        return found

    def read_ahead(self, keys: Sequence[str]) -> threading.Thread | None:
        """Have the system read tensors from the disk into its page cache, beside other work; None where it cannot be asked to."""
        if not hasattr(os, "posix_fadvise"):
            return None
        thread = threading.Thread(target=_ask_for, args=(self.places(keys),), daemon=True)
        thread.start()
        return thread


def _places(file: Path) -> dict[str, tuple[Path, int, int]]:
    """Where the tensors of a safetensors file lie in it."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    return {
        key: (file, *(8 + length + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _ask_for(places: Sequence[tuple[Path, int, int]]) -> None:
    with suppress(OSError):  # who needs them will be told
        for file, start, stop in places:
            with file.open("rb") as handle:
                for first in range(start, stop, AHEAD):
                    os.posix_fadvise(handle.fileno(), first, min(AHEAD, stop - first), os.POSIX_FADV_WILLNEED)


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
        self.checkpoint, self.slices = checkpoint, checkpoint.slices
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


def unload(module: nn.Module, inside: bool = True) -> None:
    """Put every parameter and buffer of a module back on meta, those of modules inside it included, and give the memory back."""
    for part in module.modules() if inside else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="meta")
    gc.collect()
    return_free_memory()
