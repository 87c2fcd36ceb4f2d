# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints as GGUF, which llama.cpp and what is built on it read.

4-bit matrices become Q4_1, or Q4_0 where zeros are the middle code, and 8-bit ones Q8_0: their codes and scales stay what they
are, to the bit. Q4_1 has an offset for a zero, scale times zero in fp16, which moves a weight by less than a hundredth of a
step. Blocks have 32 weights there, so that scales are repeated. Experts of 2 and 3 bits are quantized anew as Q2_K and Q3_K, from
the dense model (`requantized`).
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers_mcmoe.integrations.exports.requantized import requantized
from transformers_mcmoe.integrations.exports.stored import Matrix, Stored, check_symmetric
from transformers_mcmoe.integrations.hub import copy_tokenizer
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.quantization import Quantized
from transformers_mcmoe.quantization.k_quants import BLOCK as SUPER
from transformers_mcmoe.quantization.k_quants import BYTES

logger = logging.getLogger(__name__)

BLOCK = 32
# llama.cpp's names of architectures
ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
# how it splits text before byte pairs are joined, by model type
SPLITS = {"qwen2_moe": "qwen2", "qwen3_moe": "qwen2"}
_EXPERTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def export(
    name: str,
    output: Path,
    split: str | None = None,
    *,
    dense: str | None = None,
    dataset: Any = None,
    progress: Callable[[Any], None] | None = None,
) -> None:
    """Write a packed checkpoint as one GGUF file.

    Args:
        name: folder or Hub id of the packed checkpoint.
        output: the file; it takes its name when all is written.
        split: llama.cpp's name of how the tokenizer splits text ("pre"), where it is of byte pairs; default by the model's
            type, else "default".
        dense: the model that it was made from, where experts have 2 or 3 bits.
        dataset: calibration data for these, as `MCMoEConfig` takes them.
        progress: of that, as `MCMoEConfig` takes it.

    Raises:
        ValueError: the checkpoint is not packed, or has what llama.cpp's formats or this export do not.
        ImportError: gguf is not installed.
    """
    import gguf

    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        raise ValueError(f"'{output}' exists; give a new file.")
    stored = Stored(name)
    architecture = _check(stored, dense, dataset)
    partial = output.with_name(f".{output.name}.partial")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as work:
        writer = gguf.GGUFWriter(partial, architecture)
        _describe(stored, gguf, writer)
        _tokenizer(stored, gguf, writer, split or SPLITS.get(stored.config.model_type, "default"), Path(work))
        entries = list(_entries(stored, gguf, architecture))
        if any(matrix.bits in BYTES for matrix in stored.matrices.values()):
            assert dense is not None
            stored.rounded = requantized(stored, dense, dataset, Path(work), progress)
        _write(writer, entries, Meter(progress))
    partial.replace(output)


def _write(writer: Any, entries: list[_Entry], meter: Meter) -> None:
    """Write the file; what was written is removed if that fails."""
    meter.start("export", len(entries), "tensor")
    try:
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, entry.dtype, entry.size, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
            meter.layer_done()
        writer.close()
    except BaseException:
        Path(writer.path).unlink(missing_ok=True)
        raise
    finally:
        meter.close()


def _check(stored: Stored, dense: str | None, dataset: Any) -> str:
    """The architecture; raises ValueError for what cannot be exported, before anything is written."""
    kind = stored.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"Models of type '{kind}' are not exported to GGUF; {sorted(ARCHITECTURES)} are.")
    normalized = getattr(stored.config, "norm_topk_prob", True)
    if normalized != (kind != "qwen2_moe"):
        raise ValueError(
            f"llama.cpp has no {kind} with norm_topk_prob={normalized}; this model cannot be exported to GGUF."
        )
    _theta(stored.config)
    if getattr(stored.config, "mlp_only_layers", None) or getattr(stored.config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"Some layers of '{stored.name}' have no experts, but llama.cpp's {ARCHITECTURES[kind]} has them in all."
        )
    for matrix in stored.matrices.values():
        if matrix.bits in BYTES and matrix.expert is not None:
            if matrix.in_features % SUPER:
                raise ValueError(
                    f"'{matrix.key}' has {matrix.bits} bits and {matrix.in_features} columns, but Q2_K and Q3_K have blocks of {SUPER}; "
                    "compress with expert_bits=(4,)."
                )
            if dense is None or dataset is None:
                raise ValueError(
                    f"'{matrix.key}' has {matrix.bits} bits, whose codes have no place in Q2_K and Q3_K: they are quantized anew on those "
                    "grids, which takes the dense model and calibration data; give --dense and --dataset."
                )
        elif matrix.bits not in (4, 8):
            raise ValueError(
                f"'{matrix.key}' has {matrix.bits} bits, but in GGUF experts have 2, 3, 4 or 8 bits, and other matrices 4 or 8; compress "
                "with expert_bits=(2, 3, 4) and 4 for attention_bits and shared_expert_bits."
            )
        if stored.quantization.symmetric and matrix.bits in (4, 8):
            check_symmetric(matrix, stored.quantized(matrix))
        if matrix.bits == 8 and not stored.quantization.symmetric:
            raise ValueError(
                f"'{matrix.key}' has 8 bits and zeros, but Q8_0 has none; compress with symmetric=True, or with 4 bits."
            )
        if matrix.in_features % BLOCK:
            raise ValueError(f"'{matrix.key}' has {matrix.in_features} columns, but GGUF's blocks have {BLOCK}.")
    return ARCHITECTURES[kind]


class _Entry:
    """One tensor of the file, made when it is written."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: Any, kind: Any, data: Callable[[], np.ndarray]
    ) -> None:
        self.name, self.shape, self.dtype, self.kind, self.data = name, shape, np.dtype(dtype), kind, data
        self.size = int(np.prod(shape)) * self.dtype.itemsize


def _entries(stored: Stored, gguf: Any, architecture: str) -> Iterator[_Entry]:
    """The tensors in the order of the checkpoint; experts of a layer are one for each projection."""
    kinds = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), stored.config.num_hidden_layers)
    experts: dict[str, list[Matrix]] = {}
    for key in stored.checkpoint.slices:
        matrix = stored.matrices.get(key)
        if matrix is not None and matrix.expert is not None:
            leaf = key.removesuffix(".weight").rpartition(".")[2]
            experts.setdefault(f"blk.{matrix.layer}.ffn_{_EXPERTS[leaf]}_exps.weight", []).append(matrix)
            continue
        stem, _, suffix = key.rpartition(".")
        name = names.get_name(stem)
        if name is None:
            raise ValueError(f"llama.cpp has no name for the tensor '{key}'; this model cannot be exported to GGUF.")
        name = f"{name}.{suffix}"
        order = _rotated(stored, key)
        if matrix is None:
            yield _dense(stored, key, name, order, kinds)
        else:
            yield _packed(stored, [matrix], name, order, kinds)
    if (
        "output" not in {names.get_name(key.rpartition(".")[0]) for key in stored.checkpoint.slices}
        and architecture == "qwen2moe"
    ):
        embedding = next(key for key in stored.checkpoint.slices if key.endswith("embed_tokens.weight"))
        yield _dense(stored, embedding, "output.weight", None, kinds)  # tied, which llama.cpp's does not know
    for name, own in experts.items():
        yield _packed(stored, sorted(own, key=lambda m: m.expert or 0), name, None, kinds)


def _dense(stored: Stored, key: str, name: str, order: Tensor | None, kinds: Any) -> _Entry:
    """A tensor that is not packed: vectors and routers in float32, matrices as they are."""
    shape = tuple(stored.checkpoint.slices[key].get_shape())
    whole = len(shape) < 2 or "ffn_gate_inp" in name

    def data() -> np.ndarray:
        tensor = stored.tensor(key)
        tensor = tensor if order is None else tensor[order]
        if not whole and tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.uint8).numpy()
        return tensor.to(torch.float32 if whole or tensor.dtype != torch.float16 else torch.float16).numpy()

    kind = stored.checkpoint.slices[key].get_dtype()
    if not whole and kind == "BF16":
        return _Entry(name, (*shape[:-1], 2 * shape[-1]), np.uint8, kinds.BF16, data)
    half = not whole and kind == "F16"
    return _Entry(name, shape, np.float16 if half else np.float32, kinds.F16 if half else kinds.F32, data)


def _packed(stored: Stored, matrices: list[Matrix], name: str, order: Tensor | None, kinds: Any) -> _Entry:
    """One packed matrix, or those of all experts."""
    first = matrices[0]
    symmetric = stored.quantization.symmetric
    if first.bits in BYTES:
        kind = {2: kinds.Q2_K, 3: kinds.Q3_K}[first.bits]
        size = first.in_features // SUPER * BYTES[first.bits]
        return _Entry(
            name,
            (len(matrices), first.out_features, size),
            np.uint8,
            kind,
            lambda: torch.stack([stored.tensor(m.key) for m in matrices]).numpy(),
        )
    kind = kinds.Q8_0 if first.bits == 8 else kinds.Q4_0 if symmetric else kinds.Q4_1
    make = q8_0 if first.bits == 8 else q4_0 if symmetric else q4_1
    row = first.in_features // BLOCK * {kinds.Q8_0: 34, kinds.Q4_0: 18, kinds.Q4_1: 20}[kind]

    def data() -> np.ndarray:
        made = [make(stored.quantized(matrix)) for matrix in matrices]
        rows = torch.stack(made) if first.expert is not None else made[0]
        return (rows if order is None else rows[order]).contiguous().numpy()

    shape = (first.out_features, row)
    return _Entry(name, (len(matrices), *shape) if first.expert is not None else shape, np.uint8, kind, data)


def _rotated(stored: Stored, key: str) -> Tensor | None:
    """Order of the rows of q and k where llama.cpp pairs neighbours in rotary embeddings; None where it does not."""
    config = stored.config
    if ARCHITECTURES[config.model_type] != "llama" or not re.search(r"\.(q|k)_proj\.(weight|bias)$", key):
        return None
    heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
    rows = torch.arange(stored.checkpoint.slices[key].get_shape()[0])
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _blocks(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, blocks, 32] uint8, scale and zero [out, blocks] float32; the last group may be padded."""
    columns = quantized.in_features
    group = quantized.codes.shape[-1]
    codes = quantized.codes.flatten(1)[:, :columns].unflatten(1, (-1, BLOCK))
    repeat = group // BLOCK
    scale, zero = (
        part.repeat_interleave(repeat, dim=1)[:, : codes.shape[1]] for part in (quantized.scale, quantized.zero)
    )
    return codes, scale, zero


def _half(values: Tensor) -> Tensor:
    """[.., n] as the bytes of fp16, [.., n, 2]."""
    return values.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """[.., 32] codes of 4 bits -> [.., 16] bytes: the first half in the low bits."""
    return codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)


def q4_1(quantized: Quantized) -> Tensor:
    """Rows of Q4_1, [out, blocks * 20] uint8: fp16 d, fp16 m and codes q, which stand for d * q + m."""
    codes, scale, zero = _blocks(quantized)
    return torch.cat([_half(scale), _half(-scale * zero), _nibbles(codes)], dim=-1).flatten(1)


def q4_0(quantized: Quantized) -> Tensor:
    """Rows of Q4_0, [out, blocks * 18] uint8: fp16 d and codes q, which stand for d * (q - 8)."""
    codes, scale, _ = _blocks(quantized)
    return torch.cat([_half(scale), _nibbles(codes)], dim=-1).flatten(1)


def q8_0(quantized: Quantized) -> Tensor:
    """Rows of Q8_0, [out, blocks * 34] uint8: fp16 d and signed codes q, which stand for d * q."""
    codes, scale, _ = _blocks(quantized)
    return torch.cat([_half(scale), codes ^ 128], dim=-1).flatten(1)  # q - 128 in two's complement


def _describe(stored: Stored, gguf: Any, writer: Any) -> None:
    """What llama.cpp wants to know of the model."""
    config = stored.config
    writer.add_name(Path(stored.name).name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _theta(config: Any) -> float:
    """Base of the rotary embeddings.

    Raises:
        ValueError: positions are scaled.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"Rotary embeddings of type '{kind}' are not exported to GGUF.")
    return float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _tokenizer(stored: Stored, gguf: Any, writer: Any, split: str, work: Path) -> None:
    """The tokenizer beside the weights: sentencepiece, byte pairs, or none that llama.cpp has."""
    folder = Path(stored.name)
    if not folder.is_dir():
        folder = work / "tokenizer"
        folder.mkdir()
        copy_tokenizer(stored.name, folder)
    kinds_of = [gguf.vocab.LlamaHfVocab, gguf.vocab.BpeVocab]
    if (folder / "tokenizer.model").is_file():
        kinds_of = [gguf.vocab.SentencePieceVocab]
    for vocabulary in kinds_of:
        try:
            found = vocabulary(folder)
        except (FileNotFoundError, TypeError):  # of another kind
            continue
        except RuntimeError as error:
            raise ImportError(str(error)) from error
        tokens, scores, kinds = (list(column) for column in zip(*found.all_tokens(), strict=True))
        pairs = isinstance(found, gguf.vocab.BpeVocab)
        if (folder / "tokenizer.json").is_file():
            _correct(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), tokens, scores, kinds, gguf)
        writer.add_tokenizer_model("gpt2" if pairs else "llama")
        writer.add_tokenizer_pre(split)
        lacking = stored.config.vocab_size - len(tokens)
        tokens += [f"[PAD{n}]".encode() for n in range(lacking)]
        kinds += [gguf.TokenType.UNUSED] * lacking
        writer.add_token_list(tokens)
        if not pairs:
            writer.add_token_scores(scores + [-1000.0] * lacking)
        writer.add_token_types(kinds)
        gguf.SpecialVocab(folder, load_merges=pairs, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)
        return
    logger.warning(
        "llama.cpp has no tokenizer like that of '%s'; the file has none, and takes token ids alone.", stored.name
    )
    writer.add_tokenizer_model("no_vocab")


def _correct(tokenizer: dict[str, Any], tokens: list[bytes], scores: list[float], kinds: list[Any], gguf: Any) -> None:
    """What the gguf package leaves out of a tokenizer.json: which tokens are special, and in which order pairs are merged.

    llama.cpp merges the pair whose token has the highest score, and the package gives all the same.
    """
    for added in tokenizer.get("added_tokens", ()):
        if added["id"] < len(kinds):
            kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if len(set(scores)) > 1:  # sentencepiece's own
        return
    place = {token: n for n, token in enumerate(tokens)}
    for rank, merge in enumerate(tokenizer["model"].get("merges", ())):
        joined = "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
        if (n := place.get(joined.encode())) is not None:
            scores[n] = max(scores[n], -float(rank)) if scores[n] != -1000.0 else -float(rank)
