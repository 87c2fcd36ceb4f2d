# SPDX-License-Identifier: Apache-2.0
"""PackedLinear: a linear layer over packed bytes, with or without two thin factors.

It knows width and shape from construction and holds exactly the tensors of the checkpoint format.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from transformers_mcmoe.kernels import arena, cpu, gpu, ops
from transformers_mcmoe.quantization.packing import dequantize, packed_shape


class PackedLinear(nn.Module):
    """A linear layer over one packed matrix.

    Attributes:
        weight: [out, n, G * bits / 8 + 4] uint8 parameter (not a buffer: accelerate keeps buffers of offloaded
            layers in memory), absent at 0 bits.
        bias: [out] float parameter, or None.

    Args:
        in_features: columns of the dense matrix.
        out_features: its rows.
        bits: 1, 2, 3, 4, 8, or 0 for none: the output is then that of the factors, or zero.
        group_size: the configured group size.
        bias: dtype of the bias, or None for none.
        device: device of the empty tensors.
        rank: of two factors `low_rank_b @ low_rank_a`, which are added to the matrix; 0 for none.
        rank_bits: their width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rank: int = 0,
        rank_bits: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.rank = rank
        self.weight: nn.Parameter | None
        if bits:
            shape = packed_shape(out_features, in_features, bits, group_size)
            self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)
        else:
            self.register_parameter("weight", None)
        if rank:
            self.low_rank_a = PackedLinear(in_features, rank, rank_bits, group_size, device=device)
            self.low_rank_b = PackedLinear(rank, out_features, rank_bits, group_size, device=device)
        if bias is not None and (bits or rank):
            self.bias = nn.Parameter(torch.empty(out_features, dtype=bias, device=device))
        else:
            self.register_parameter("bias", None)
        self._is_hf_initialized = True  # transformers must not initialise packed bytes
        self.merge_error: float | None = None  # of an adapter that was rounded into the matrix (integrations.lora)
        self._blocks: Tensor | None = None
        self._stamp: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] -> [.., out_features], in the dtype of `x`."""
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if self.weight is None:
            if not self.rank:
                return x.new_zeros(*x.shape[:-1], self.out_features)
            y = self.low_rank_b(self.low_rank_a(x))
            return y if bias is None else y + bias
        self._repack()
        y = ops.packed_linear(x, self.weight, bias, self.bits, self.in_features, self._blocks)
        return y + self.low_rank_b(self.low_rank_a(x)) if self.rank else y

    @torch.compiler.assume_constant_result  # runs while torch.compile traces, too
    def _repack(self) -> None:
        """Make `_blocks`, the matrix in the layout of this machine's kernels, at first use and when it has changed."""
        stamp = None if is_offloaded(self) or gpu.backend(self.weight.device) else stamp_of(self)  # type: ignore[union-attr]
        if stamp != self._stamp:
            self._stamp = stamp
            self._blocks = None if stamp is None else arena.pack_matrix(self.weight, self.bits)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense matrix [out, in]; zeros at 0 bits."""
        if not self.rank:
            if self.weight is None:
                return torch.zeros(self.out_features, self.in_features, dtype=dtype)
            return dequantize(self.weight, self.bits, self.in_features, dtype)
        dense = self.low_rank_b.dequantize(torch.float32) @ self.low_rank_a.dequantize(torch.float32)
        if self.weight is not None:
            dense += dequantize(self.weight, self.bits, self.in_features)
        return dense.to(dtype)

    @torch.no_grad()
    def write(self, packed: Tensor) -> None:
        """Exchange the packed bytes [out, n, G * bits / 8 + 4] for others of the same grid and width."""
        self.weight.copy_(packed)  # type: ignore[union-attr]
        self.forget_blocks()

    def forget_blocks(self) -> None:
        """Free the kernels' copy; the next call makes it anew."""
        self._blocks = self._stamp = None
        if self.rank:
            self.low_rank_a.forget_blocks()
            self.low_rank_b.forget_blocks()

    def parts(self) -> list[PackedLinear]:
        """The packed matrices that it consists of: itself, if it has one, and its factors."""
        return [self] * (self.weight is not None) + ([self.low_rank_a, self.low_rank_b] if self.rank else [])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}" + (f", rank={self.rank}" if self.rank else "")
        )


def stamp_of(*linears: PackedLinear) -> tuple[int, ...] | None:
    """What changes when the bytes of matrices do; None where no kernels serve them."""
    stamp: list[int] = []
    for linear in linears:
        weight = linear.weight
        if weight is None or weight.is_meta or isinstance(weight, FakeTensor):
            return None
        device = gpu.backend(weight.device) or (cpu if weight.device.type == "cpu" else None)
        if device is None or not device.packs(weight, linear.bits):
            return None
        # tensors made in inference mode count no writes
        stamp += (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    return tuple(stamp)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights only for its own call."""
    return getattr(getattr(module, "_hf_hook", None), "offload", False)
