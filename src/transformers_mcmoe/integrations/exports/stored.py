# SPDX-License-Identifier: Apache-2.0
"""A packed checkpoint, read matrix by matrix for another format. Knows files, names and the plan; no format but our own."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.models.experts import layer_of
from transformers_mcmoe.models.names import CheckpointNames
from transformers_mcmoe.models.stream import Checkpoint, checkpoint_files
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.nn import PackedLinear
from transformers_mcmoe.nn.checks import check_tensors
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.quantization import Quantized
from transformers_mcmoe.quantization.packing import unpack
from transformers_mcmoe.replacement import packed_model
from transformers_mcmoe.routing import ROUTER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matrix:
    """One packed matrix of a checkpoint.

    Attributes:
        key: its name there.
        path: of its module in the packed model.
        layer: number of its decoder layer.
        expert: its expert, None outside of experts.
        bits: code width.
        out_features, in_features: of the dense matrix.
    """

    key: str
    path: str
    layer: int
    expert: int | None
    bits: int
    out_features: int
    in_features: int


class Stored:
    """A packed checkpoint.

    Args:
        name: folder or Hub id.

    Attributes:
        config: of the model.
        quantization: of the compression.
        matrices: the packed matrices by name, in the order of the plan.
        files: the safetensors files.

    Raises:
        ValueError: it is not packed, is damaged, or has what other engines have no place for: dropped experts, low-rank
            factors, experts of one layer with different widths, or experts that are fused in the dense checkpoint.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = AutoConfig.from_pretrained(name)
        given = getattr(self.config, "quantization_config", None)
        if not isinstance(given, dict) or given.get("quant_method") != "mcmoe":
            raise ValueError(f"'{name}' is not packed; compress it first.")
        self.quantization: MCMoEConfig = MCMoEConfig.from_dict(given)
        self.files = checkpoint_files(name)
        self.checkpoint = Checkpoint(self.files)
        routers = [key for key in self.checkpoint.slices if f".{ROUTER}." in key]
        for key in routers:
            del self.checkpoint.slices[key]
        if routers or self.quantization.odp:
            logger.warning(
                "Expert pruning at run time has no place in other formats: the export of '%s' skips no expert.", name
            )
        text = self.config.get_text_config()
        if text is not self.config:
            raise ValueError(
                f"'{name}' is a model of text and images, whose parts engines name in their own ways; it is not exported."
            )
        model, structure, self.plan = packed_model(self.config, self.quantization)
        _check(self.plan, structure)
        check_tensors(model, structure, self.files)
        self.matrices = dict(self._found(model, structure.names))
        # matrices that were quantized anew, which go before those that are stored
        self.rounded: Checkpoint | None = None

    def _found(self, model: Any, names: CheckpointNames) -> Iterator[tuple[str, Matrix]]:
        state = model.state_dict()
        modules = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
        inside = {f"{path}.": path for path in self.plan.experts}
        for key in self.checkpoint.slices:
            path, _, leaf = names.packed_name(key, state).rpartition(".")
            module = modules.get(path)
            if module is None or leaf != "weight":
                continue
            prefix = next((prefix for prefix in inside if path.startswith(prefix)), None)
            expert = None if prefix is None else int(path.removeprefix(prefix).partition(".")[0])
            sizes = (module.bits, module.out_features, module.in_features)
            yield key, Matrix(key, path, layer_of(path)[1], expert, *sizes)

    def keys_of(self, file: str) -> list[str]:
        """Names of a file's tensors."""
        return [key for key in Checkpoint([file]).slices if key in self.checkpoint.slices]

    def quantized(self, matrix: Matrix) -> Quantized:
        """Codes and grids of a matrix."""
        return unpack(self.tensor(matrix.key), matrix.bits, matrix.in_features)

    def tensor(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        source = self.checkpoint if self.rounded is None or key not in self.matrices else self.rounded
        return source.slices[key][:]  # type: ignore[no-any-return]


def _check(plan: Plan, structure: Structure) -> None:
    """Raise ValueError for what other formats have no place for."""
    for path, widths in plan.experts.items():
        if any(widths.ranks) or len(widths.kept) < len(widths.gate_up):
            what = "low-rank factors" if any(widths.ranks) else "dropped experts"
            raise ValueError(
                f"'{path}' has {what}, which other formats have no place for; export transformers_mcmoe.unpack(model)."
            )
        if len({*widths.gate_up}) > 1 or len({*widths.down}) > 1:
            raise ValueError(
                f"The experts of '{path}' have the widths {sorted({*widths.gate_up, *widths.down})}, but other formats have one for "
                "each layer; compress with granularity='layer'."
            )
        if structure.names.is_fused_on_disk(structure.experts[path]):  # type: ignore[arg-type]
            raise ValueError(
                f"The dense checkpoint has the experts of '{path}' fused; exporting such families is not supported."
            )


def check_symmetric(matrix: Matrix, quantized: Quantized) -> None:
    """Raise ValueError if a matrix has other zeros than the middle code, which its format has no place for."""
    if not bool(((quantized.zero == 2 ** (matrix.bits - 1)) | (quantized.scale == 0)).all()):
        raise ValueError(
            f"'{matrix.key}' has zeros, although the model was compressed with symmetric=True: an adapter was merged into it; "
            "export the model as it was before."
        )


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder that takes its name when all has been written to it.

    Raises:
        ValueError: there is a folder of that name that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"'{output}' exists and is not empty; give a new folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield folder
        folder.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
