# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models of several MoE families, a processor for all of them, and samples with images.

Most real image processors need torchvision, which tests do without; what they hand to their models is made here, from
images, in the shapes that each family expects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import _SHARED, TINY, _base
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

IMAGE, VIDEO = 310, 311  # ids of placeholders
START, END = 312, 313
_TEXT: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_PATCHES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
_QWEN = _PATCHES | {"temporal_patch_size": 1, "out_hidden_size": 64, "num_position_embeddings": 64}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


VLMS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "text_config": _base(**_TEXT, rope_parameters=_ROPE, decoder_sparse_step=1, mlp_only_layers=[]),
        "vision_config": _QWEN | {"deepstack_visual_indexes": [0]},
        **_TOKENS,
    },
    "qwen3_5_moe": {
        "text_config": _base(
            **_SHARED,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            head_dim=16,
            rope_parameters=_ROPE | {"partial_rotary_factor": 1.0},
        ),
        "vision_config": _QWEN,
        **_TOKENS,
    },
    "glm4v_moe": {
        "text_config": _base(
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            head_dim=16,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        ),
        "vision_config": _PATCHES | {"image_size": 32, "temporal_patch_size": 1, "out_hidden_size": 64},
        "image_start_token_id": START,
        "image_end_token_id": END,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "ernie4_5_vl_moe": {
        "text_config": _base(
            moe_intermediate_size=[32, 32],
            moe_num_experts=8,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        ),
        "vision_config": _PATCHES | {"temporal_merge_size": 2},
        "image_token_id": IMAGE,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_token_id": VIDEO,
    },
    "aria": {
        "text_config": TINY["aria_text"],
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        "projector_patch_to_query_dict": {"64": 16},
        "image_token_index": IMAGE,
    },
    "llama4": {
        "text_config": TINY["llama4_text"],
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
            "image_size": 32,
            "patch_size": 4,
            "pixel_shuffle_ratio": 0.5,
        },
        "image_token_index": IMAGE,
    },
    "gemma4": {
        "text_config": TINY["gemma4_text"],
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "image_token_id": IMAGE,
        "audio_config": None,
    },
}


def vlm(family: str, **changes: Any) -> Any:
    """A random model of a family, in eval mode."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(VLMS[family] | changes))
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def save_vlm(family: str, folder: Path, **changes: Any) -> Path:
    """Its checkpoint."""
    vlm(family, **changes).save_pretrained(folder)
    return folder


class Processor:
    """Makes what a family's model is given from messages: words are ids, an image becomes 16 tokens.

    A stand-in for processors that need torchvision; it is called as they are.
    """

    image_token = "<image>"

    def __init__(self, family: str) -> None:
        self._family = family

    def __call__(self, images: Any, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        ids: list[int] = []
        for n, part in enumerate(text.split(self.image_token)):
            ids += [START, *[IMAGE] * 16, END] * (n > 0)
            ids += [int(word) for word in part.split()]
        found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        kinds = (found["input_ids"] == IMAGE).to(torch.int64)
        if images:
            found |= self._pixels(torch.stack([_pixels(image) for image in images]))
        if self._family in ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "ernie4_5_vl_moe", "gemma4"):
            found["mm_token_type_ids"] = kinds
        if self._family == "ernie4_5_vl_moe":  # marks around an image go to the experts of images, too
            found["moe_mm_token_type_ids"] = kinds | torch.isin(found["input_ids"], torch.tensor([START, END]))
        return found

    def _pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        n = len(pixels)
        if self._family in ("aria", "llama4"):
            return {"pixel_values": pixels}
        # patches of 4 x 4, row by row; those of a 2 x 2 block follow each other
        blocks = pixels.view(n, 3, 4, 2, 4, 4, 2, 4).permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * 64, -1)
        if self._family == "gemma4":
            rows = pixels.view(n, 3, 8, 4, 8, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, 64, -1)
            y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
            return {
                "pixel_values": rows,
                "image_position_ids": torch.stack([x.flatten(), y.flatten()], -1).expand(n, 64, 2).contiguous(),
            }
        return {"pixel_values": blocks, "image_grid_thw": torch.tensor([[1, 8, 8]] * n)}


def _pixels(image: Image.Image) -> torch.Tensor:
    """[3, 32, 32] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1).to(torch.float32) / 127.5 - 1


def picture(seed: int) -> Image.Image:
    """A random image of 32 x 32."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def samples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with an image and a text of 10 to 18 words each."""
    random = np.random.default_rng(seed)
    return [
        {
            "image": picture(seed + n),
            "text": " ".join(str(random.integers(3, 300)) for _ in range(10 + n % 9)),
        }
        for n in range(count)
    ]
