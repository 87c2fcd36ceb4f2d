# SPDX-License-Identifier: Apache-2.0
"""Packed models in the formats of others: `dense` of plain transformers, `compressed` of compressed-tensors, `gguf` of llama.cpp.

`stored` reads a packed checkpoint matrix by matrix, which the latter two rewrite without loading the model.
"""

from transformers_mcmoe.integrations.exports.dense import unpack

__all__ = ["unpack"]
