# SPDX-License-Identifier: Apache-2.0
"""Matrix products of llama.cpp, called through the C interface of ggml as llama-cpp-python installs it."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

# ggml's numbers of its types
TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "BF16": 30}
# layouts that llama.cpp repacks a type into where the processor has the instructions for them
REPACKED = {"Q2_K": ("CPU_REPACK",), "Q4_K": ("CPU_REPACK", "AMX")}
_F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def find() -> Path | None:
    """Folder of the shared libraries of llama-cpp-python, None if it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec is not None and spec.origin else None


class Ggml:
    """The CPU backend of ggml.

    Args:
        folder: where libggml-base and libggml-cpu lie.
        threads: of each product.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        call = self._call
        self._backend = call("ggml_backend_cpu_init", c_void_p)
        call("ggml_backend_cpu_set_n_threads", None, c_void_p(self._backend), c_int(threads))
        registry = call("ggml_backend_cpu_reg", c_void_p)
        device = call("ggml_backend_reg_dev_get", c_void_p, c_void_p(registry), c_size_t(0))
        found = call(
            "ggml_backend_reg_get_proc_address", c_void_p, c_void_p(registry), b"ggml_backend_dev_get_extra_bufts"
        )
        self.buffers: dict[str, int] = {}
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(found)(device)
        while listed and listed[len(self.buffers)]:
            buffer = listed[len(self.buffers)]
            self.buffers[call("ggml_backend_buft_name", c_char_p, c_void_p(buffer)).decode()] = buffer

    def _call(self, name: str, result: object, *args: object) -> object:
        library = self._cpu if hasattr(self._cpu, name) else self._base
        function = getattr(library, name)
        function.restype = result
        return function(*args)

    def _context(self) -> c_void_p:
        self._base.ggml_init.argtypes = [_InitParams]
        return c_void_p(self._call("ggml_init", c_void_p, _InitParams(1 << 20, None, True)))

    def bytes_of(self, kind: str, columns: int, rows: int) -> int:
        """Bytes of a matrix."""
        return rows * self._call("ggml_row_size", c_size_t, c_int(TYPES[kind]), c_int64(columns))

    def layouts(self, kind: str) -> list[str]:
        """Where a matrix of a type can lie: "" is as it is in files."""
        return ["", *(name for name in REPACKED.get(kind, ()) if name in self.buffers)]

    def matrix(self, kind: str, columns: int, rows: int, layout: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """A product with a random matrix [rows, columns], 16 rows repeated: x [M, columns] -> [M, rows] float32."""
        size = self.bytes_of(kind, columns, 16)
        block, values = ctypes.create_string_buffer(size), torch.randn(16, columns)
        self._call(
            "ggml_quantize_chunk", c_size_t, c_int(TYPES[kind]), c_void_p(values.data_ptr()), block, c_int64(0),
            c_int64(16), c_int64(columns), None,
        )  # fmt: skip
        context = self._context()
        weight = self._tensor(context, TYPES[kind], columns, rows)
        if layout:
            self._call("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, context, c_void_p(self.buffers[layout]))
        else:
            self._call("ggml_backend_alloc_ctx_tensors", c_void_p, context, c_void_p(self._backend))
        data = block.raw * (rows // 16)
        self._call("ggml_backend_tensor_set", None, weight, data, c_size_t(0), c_size_t(len(data)))
        graphs: dict[int, tuple[c_void_p, c_void_p, c_void_p]] = {}

        def run(x: torch.Tensor) -> torch.Tensor:
            if len(x) not in graphs:
                graphs[len(x)] = self._graph(weight, columns, x)
            graph, _, _ = graphs[len(x)]
            self._call("ggml_backend_graph_compute", c_int, c_void_p(self._backend), graph)
            return x

        return run

    def _tensor(self, context: c_void_p, kind: int, columns: int, rows: int) -> c_void_p:
        args = (context, c_int(kind), c_int64(columns), c_int64(rows))
        return c_void_p(self._call("ggml_new_tensor_2d", c_void_p, *args))

    def _graph(self, weight: c_void_p, columns: int, x: torch.Tensor) -> tuple[c_void_p, c_void_p, c_void_p]:
        context = self._context()
        given = self._tensor(context, _F32, columns, len(x))
        product = c_void_p(self._call("ggml_mul_mat", c_void_p, context, weight, given))
        graph = c_void_p(self._call("ggml_new_graph", c_void_p, context))
        self._call("ggml_build_forward_expand", None, graph, product)
        self._call("ggml_backend_alloc_ctx_tensors", c_void_p, context, c_void_p(self._backend))
        values = x.to(torch.float32).contiguous()
        self._call(
            "ggml_backend_tensor_set", None, given, c_void_p(values.data_ptr()), c_size_t(0), c_size_t(values.nbytes)
        )
        return graph, given, product
