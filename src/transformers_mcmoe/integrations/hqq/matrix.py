# SPDX-License-Identifier: Apache-2.0
"""One matrix as HQQ stores it, in a module or a file, and as a packed record; sources that hold such matrices.

Knows HQQ's layout and needs nothing of its package.

HQQ (axis 1) cuts the matrix, read row by row, into groups of `group_size` weights. A record of ours lies inside one
row; where it lies inside one HQQ group as well, codes and grid carry over as they are.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.plan import Matrix
from transformers_mcmoe.quantization import WIDTHS, Quantized, group_size_for, num_groups, pack, packed_shape

# HQQ's name -> (bits of a code, codes in one word); the first block of rows is in the highest bits
_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
# fields of one module that are dicts themselves
_NESTED = ("meta", "meta_scale", "meta_zero")
# of a scale: fp16 rounds by half of that, and by more below its normal range
_LOSS = 2.0**-10


class HQQMatrix:
    """One matrix as HQQ holds it.

    Args:
        name: its module path.
        fields: what `HQQLinear.state_dict` gives, encoded for safetensors or not; values may be functions that read.

    Attributes:
        label: the name for messages.
        bits: width of the packed codes.
        group: weights that share a scale.

    Raises:
        ValueError: a field is missing or unknown, or the groups run along out_features.
    """

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name, self.label = name, f"'{name}'" if name else "The HQQ matrix"
        self._fields = {**read(fields.get("meta") or {}), **fields}  # qmodel.pt of HQQ before 0.2 nests them
        shape = self._get("shape")
        if shape is None or len(shape) != 2 or self._fields.get("W_q") is None:
            raise ValueError(
                f"{self.label} is not a quantized HQQ matrix: its W_q or its shape is missing; save it again."
            )
        self.bits, self._per_word = self._packing()
        self.out_features, self.in_features = (int(size) for size in shape)
        if int(self._get("axis", 0)) != 1:
            raise ValueError(
                f"{self.label} is grouped along out_features (axis=0), which packed records cannot hold; quantize it with "
                "axis=1."
            )
        count = self._grid("scale").numel()
        if self.out_features * self.in_features % count:
            raise ValueError(
                f"{self.label} has {count} scales, which do not divide its weights; the checkpoint is damaged."
            )
        self.group = self.out_features * self.in_features // count

    @property
    def matrix(self) -> Matrix:
        """Its entry in size accounting."""
        return Matrix(self.name, self.out_features, self.in_features, self.bits)

    def _get(self, key: str, default: Any = None) -> Any:
        value = read(self._fields.get(key))
        return default if value is None else value

    def _packing(self) -> tuple[int, int]:
        """Bits of a code and codes per word, 0 where the codes are not packed; nbits may be 5, 6 or 1.58."""
        packing = self._get("packing")
        if packing is None:
            return next(bits for bits in WIDTHS if float(self._get("nbits", 8)) <= bits), 0
        if isinstance(packing, Tensor):  # encoded: one element per character
            packing = "".join(map(chr, packing.tolist()))
        if packing not in _PACKINGS:
            raise ValueError(f"{self.label} has the HQQ packing {packing!r}; known are {', '.join(_PACKINGS)}.")
        return _PACKINGS[packing]

    def _grid(self, kind: str) -> Tensor:
        """Scales or zeros [groups] float32."""
        both, nested = self._get("zero_scale"), self._get(f"{kind}_q")
        if both is not None:  # offload_meta: zero and scale stacked
            part = both[1 if kind == "scale" else 0]
            nested, value = (part, None) if part.dtype == torch.uint8 else (None, part)
        else:
            value = self._get(kind)
        if nested is not None:
            value = _dequantize(nested, self._get(f"meta_{kind}"))
        if value is None:
            raise ValueError(f"{self.label} has no {kind}; the checkpoint is damaged.")
        return value.detach().to(torch.float32).flatten()

    def _stored(self, kind: str) -> Tensor:
        """Scales or zeros rounded to fp16."""
        exact = self._grid(kind)
        stored = exact.to(torch.float16).to(torch.float32)
        lost = ~torch.isfinite(stored)
        if kind == "scale":
            lost |= (stored - exact).abs() > _LOSS * exact.abs()
        if bool(lost.any()):
            value = float(exact[lost][0])
            raise ValueError(f"{self.label} has the {kind} {value:g}, which fp16 cannot hold; quantize it again.")
        return stored

    def codes(self) -> Tensor:
        """[out, in] uint8."""
        words = self._get("W_q").detach()
        codes = _words(words, self._per_word, self.bits) if self._per_word else words.to(torch.uint8)
        count = self.out_features * self.in_features
        if codes.numel() < count:
            raise ValueError(
                f"{self.label} holds {codes.numel()} codes for {count} weights; the checkpoint is damaged."
            )
        return codes.flatten()[:count].view(self.out_features, self.in_features)

    def tensors(self, group_size: int) -> dict[str, Tensor]:
        """Its tensors in a checkpoint of ours: the packed `weight` and the `bias`, if any, under its name."""
        return self._named(pack(self.quantized(group_size)))

    def dense_tensors(self) -> dict[str, Tensor]:
        """The same with a dense fp16 `weight`."""
        codes = self.codes().view(-1, self.group)
        weight = (codes - self._grid("zero").unsqueeze(-1)) * self._grid("scale").unsqueeze(-1)
        return self._named(weight.view(self.out_features, self.in_features).to(torch.float16))

    def _named(self, weight: Tensor) -> dict[str, Tensor]:
        prefix, bias = f"{self.name}." if self.name else "", self._get("bias")
        return {f"{prefix}weight": weight} | ({f"{prefix}bias": bias.detach()} if bias is not None else {})

    def groups(self, group_size: int) -> Tensor | None:
        """HQQ group of every record, [out or 1, n] int64; None where a record lies in more than one."""
        size = group_size_for(self.in_features, group_size)
        first = torch.arange(num_groups(self.in_features, size)) * size
        last = (first + size).clamp(max=self.in_features) - 1
        # the rows are alike where groups do not cross them
        crossing = self.in_features % self.group != 0 and self.group % self.in_features != 0
        rows = torch.arange(self.out_features if crossing else 1).unsqueeze(-1) * self.in_features
        if not torch.equal((rows + first) // self.group, (rows + last) // self.group):
            return None
        return (torch.arange(self.out_features).unsqueeze(-1) * self.in_features + first) // self.group

    def quantized(self, group_size: int) -> Quantized:
        """The same matrix in records of our group size.

        Raises:
            ValueError: `groups` is None for it, or fp16 cannot hold a scale or zero.
        """
        size, codes, groups = group_size_for(self.in_features, group_size), self.codes(), self.groups(group_size)
        if groups is None:
            raise ValueError(f"Records of {size} columns would cut the HQQ groups of {self.group} of {self.label}.")
        codes = functional.pad(codes, (0, -self.in_features % size)).unflatten(-1, (-1, size))
        scale, zero = (self._stored(kind)[groups.to(codes.device)] for kind in ("scale", "zero"))
        return Quantized(codes, scale, zero, self.bits, self.in_features)


def common_group_size(matrices: Iterable[HQQMatrix], group_size: int | None) -> int:
    """The configured group size with which all matrices carry over exactly: the given one, or that of fewest bytes.

    Raises:
        ValueError: there is none, or no matrix.
    """
    matrices = list(matrices)
    if not matrices:
        raise ValueError("The source holds no HQQ matrix; quantize it with HQQ first.")
    # matrices of one kind stand for each other
    kinds = {(m.out_features, m.in_features, m.group, m.bits): m for m in matrices}
    if group_size is not None:
        if group_size <= 0 or group_size % 32:
            raise ValueError(f"group_size={group_size!r} is not valid: it must be a positive multiple of 32.")
        sizes = [group_size]
    else:
        sizes = list(range(32, max(m.in_features for m in matrices) + 32, 32))
    fitting = [size for size in sizes if all(m.groups(size) is not None for m in kinds.values())]
    if not fitting:
        m = next((m for m in kinds.values() if all(m.groups(size) is None for size in sizes)), matrices[0])
        within = f"group_size={group_size}" if group_size is not None else "any group_size that all matrices share"
        raise ValueError(
            f"{m.label} [{m.out_features}, {m.in_features}] has HQQ groups of {m.group} weights, which cannot be kept with "
            f"{within}; quantize it with groups that are a multiple of 32 and divide its rows."
        )

    def size_in_bytes(size: int) -> int:
        return sum(math.prod(packed_shape(m.out_features, m.in_features, m.bits, size)) for m in matrices)

    return min(fitting, key=size_in_bytes)


def _words(words: Tensor, per_word: int, bits: int) -> Tensor:
    """The codes [rows, ..] uint8 in HQQ's words; there are some more rows where the last words were not full."""
    words = words.view(torch.int32 if per_word == 10 else torch.uint8)  # `view_as_float` keeps them as floats
    shifts = range(bits * (per_word - 1), -1, -bits)
    return torch.cat([((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])


def _dequantize(words: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """A tensor that HQQ quantized in its simple way: scales or zeros."""
    bits, per_word = _PACKINGS[meta["packing"]]
    codes, shape = _words(words, per_word, bits).to(torch.float32), meta["shape"]
    return ((codes - meta["zero"].to(torch.float32)) * meta["scale"].to(torch.float32)).reshape(shape)


def read(value: Any) -> Any:
    """A value of a source, which may be a function that reads it."""
    return value() if callable(value) and not isinstance(value, Tensor) else value


def open_source(source: Mapping[str, Any] | str | Path) -> tuple[list[HQQMatrix], dict[str, Any]]:
    """HQQ matrices and the other tensors of a state dict or of files, which are read when needed."""
    state = source if isinstance(source, Mapping) else _open_files(Path(source))
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping) and name.rpartition(".")[2] not in _NESTED:  # qmodel.pt: one dict per module
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    layers: dict[str, dict[str, Any]] = {
        name.removesuffix("W_q"): {} for name in flat if name == "W_q" or name.endswith(".W_q")
    }
    rest: dict[str, Any] = {}
    for name, value in flat.items():
        prefix = name[: name.rfind(".") + 1]
        if prefix in layers:
            layers[prefix][name.removeprefix(prefix)] = value
        elif isinstance(value, Tensor) or callable(value):
            rest[name] = value
    return [HQQMatrix(prefix.removesuffix("."), fields) for prefix, fields in layers.items()], rest


def _open_files(path: Path) -> dict[str, Any]:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("qmodel.pt"))
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"'{path}' is neither an HQQ checkpoint's file nor a folder with one; check the path.")
    state: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            handle = safe_open(str(file), framework="pt", device="cpu")
            state |= {key: partial(handle.get_tensor, key) for key in handle.keys()}  # noqa: SIM118
        else:
            try:
                state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"'{file}' is damaged or holds Python objects, which are never unpickled here; save it as safetensors."
                ) from error
    return state
