# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as a peer: its K- and I-quants with an importance matrix, see `common`.

ggml's own quantization, called through its C interface, on rows padded with zeros to a multiple of 256, which these types
need. Only the bytes of real columns are counted, and grids of a row's last block serve fewer columns than they could: both favour
llama.cpp, whose tools would take another type for such rows. The importance matrix is llama.cpp's: the mean square of each input
column over the calibration text, per matrix. Runs where transformers_mcmoe is installed, as it finds the experts' inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

LLAMA_CPP = "llama-cpp-python==0.3.35"
BLOCK = 256
# ggml's numbers of its types, and the bits of a weight
TYPES = {
    "IQ1_S": (19, 1.5625), "IQ1_M": (29, 1.75), "IQ2_XXS": (16, 2.0625), "IQ2_XS": (17, 2.3125), "IQ2_S": (22, 2.5625),
    "Q2_K": (10, 2.625), "IQ3_XXS": (18, 3.0625), "IQ3_S": (21, 3.4375), "Q3_K": (11, 3.4375), "IQ4_XS": (23, 4.25),
    "Q4_K": (12, 4.5),
}  # fmt: skip


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Types:
    """ggml's types: a matrix quantized and dequantized again."""

    def __init__(self, folder: Path) -> None:
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self._base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t

    def round(self, weight: Tensor, kind: str, importance: Tensor) -> Tensor:
        """Weights [out, in] float32 as their type rebuilds them; importance [in]."""
        number, bits = TYPES[kind]
        rows, columns = weight.shape
        padding = -columns % BLOCK
        padded = torch.nn.functional.pad(weight, (0, padding)).contiguous()
        importance = torch.nn.functional.pad(importance, (0, padding), value=float(importance.mean())).contiguous()
        size = round(padded.numel() * bits / 8)
        store = ctypes.create_string_buffer(size)
        written = self._base.ggml_quantize_chunk(
            ctypes.c_int(number), ctypes.c_void_p(padded.data_ptr()), store, ctypes.c_int64(0), ctypes.c_int64(rows),
            ctypes.c_int64(padded.shape[1]), ctypes.c_void_p(importance.data_ptr()),
        )  # fmt: skip
        if written != size:
            raise ValueError(f"ggml wrote {written} bytes of {kind}, not {size}: its types have changed.")
        traits = self._base.ggml_get_type_traits(ctypes.c_int(number)).contents
        traits.to_float(store, ctypes.c_void_p(padded.data_ptr()), padded.numel())
        return padded[:, :columns].contiguous()


class Importance:
    """Mean squares of the inputs of attention and expert matrices over a text, by name on disk."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.total[name] = self.total.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)
        self.tokens[name] = self.tokens.get(name, 0) + len(x)

    def of(self, module: str, columns: int) -> Tensor:
        """[in], as llama.cpp has it: ones for a matrix that no token reached."""
        if not self.tokens.get(module):
            return torch.ones(columns)
        return self.total[module] / self.tokens[module]

    @contextmanager
    def observe(self, model: Any) -> Iterator[None]:
        """While open, every forward pass is counted."""
        from transformers_mcmoe.models.experts import find_experts

        with ExitStack() as stack:
            for path, experts in find_experts(model).items():
                stack.enter_context(experts.observe(self._expert(path, experts)))
            for path, module in model.named_modules():
                if path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    stack.enter_context(module.register_forward_pre_hook(self._linear(path)))
            yield

    def _expert(self, path: str, experts: Any) -> Callable[..., None]:
        def record(expert: int, x: Tensor, weights: Tensor | None, position: Tensor | None) -> None:
            read = experts.inputs(expert, x)
            for p in experts.projections:
                self.add(f"{path}.{expert}.{p.name}", read[p.role])

        return record

    def _linear(self, path: str) -> Callable[..., None]:
        return lambda module, args: self.add(path, args[0])


@torch.no_grad()
def work(given: argparse.Namespace) -> None:
    """Measure importance, then write a checkpoint per type."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    # not imported: the library alone is called
    package = find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise SystemExit(f"llama.cpp is not installed here: pip install --no-deps '{LLAMA_CPP}'")
    types = Types(Path(package.origin).parent / "lib")
    names = common.quantizable(given.model, given.layers)
    model, importance = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), Importance()
    with importance.observe(model):
        for row in common.windows(given.model, given.text, given.samples, given.seq_len):
            model(row[None], use_cache=False)
    del model
    dense = dict(common.tensors(given.model, set(names).__contains__))
    output = given.output
    for kind in given.types:
        started = time.monotonic()

        def rounded(name: str, kind: str = kind) -> Tensor:
            weight = dense[name].float()
            own = given.attention_type if common.ATTENTION.search(name) else kind
            return types.round(weight, own, importance.of(common.module_of(name), weight.shape[1]))

        with ThreadPoolExecutor(given.threads) as pool:
            weights = dict(zip(names, pool.map(rounded, names), strict=True))
        size = sum(
            w.numel() * TYPES[given.attention_type if common.ATTENTION.search(name) else kind][1]
            for name, w in weights.items()
        )
        given.output = output / kind
        common.write(
            given,
            weights,
            round(size / 8),
            peer=f"llama.cpp {kind}",
            settings={"experts": kind, "attention": given.attention_type, "imatrix": True, "padded_to": BLOCK},
            seconds=round(time.monotonic() - started, 1),
            versions={"llama_cpp": version("llama-cpp-python"), "cpus": os.cpu_count()},
        )


def main() -> None:
    """Quantize with each type."""
    parser = common.options(__doc__, "ggml")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES), help="of experts")
    parser.add_argument("--attention-type", default="Q4_K", choices=list(TYPES))
    work(parser.parse_args())


if __name__ == "__main__":
    main()
