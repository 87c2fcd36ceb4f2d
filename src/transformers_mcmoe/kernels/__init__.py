# SPDX-License-Identifier: Apache-2.0
"""The operators of packed matrices, `torch.ops.mcmoe.*`. Knows tensors only, no modules and no models."""

from transformers_mcmoe.kernels import ops

__all__ = ["ops"]
