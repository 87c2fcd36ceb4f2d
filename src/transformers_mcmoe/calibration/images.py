# SPDX-License-Identifier: Apache-2.0
"""Calibration sequences of samples with images, made by a model's processor; of text for all other models.

Knows processors and the ids that stand for images; it does not know what a model does with them.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.data import calibration_tokens, shares_of, spread_order
from transformers_mcmoe.calibration.rows import EXPECTED, Row, rows_with_images
from transformers_mcmoe.calibration.sequences import Kept, Sequences
from transformers_mcmoe.config.values import is_mixture

logger = logging.getLogger(__name__)

# samples that are looked at for each one that is wanted, before it is said that too few are short enough
TRIED = 16
# inputs that say of every token whether it stands for a part of an image, in the order they are gone by; ERNIE's experts
# of images get the marks around them, too
KINDS = ("moe_mm_token_type_ids", "mm_token_type_ids", "images_seq_mask")


def calibration_sequences(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    processor: Any = None,
    num_samples: int,
    seq_len: int,
    seed: int,
    model_name: str = "",
) -> Sequences:
    """Sequences for calibration, with images if the data have some.

    Text is cut into sequences of `seq_len` (`calibration_tokens`). A sample with images is a sequence of its own length;
    longer ones than `seq_len` are passed over. Local samples are spread evenly over all that there are, those of the Hub
    come in seeded random order.

    Args:
        model: the model, which need have no weights.
        dataset: see `MCMoEConfig`; sequences are taken as they are.
        tokenizer: tokenizer object, its id, or None for `model_name`'s.
        processor: processor object, its id, or None for `model_name`'s.
        num_samples: how many.
        seq_len: tokens of a sequence, at most where there are images.
        seed: seed of the order of a Hub data set.
        model_name: id or path of the model.

    Raises:
        ValueError: the data cannot be used, or an image not be read, or there is no processor; also those of `calibration_tokens`.
        OSError: a Hub data set cannot be reached.
    """
    if isinstance(dataset, Sequences):
        return dataset[:num_samples]
    sees = sees_images(model.config)
    options: dict[str, Any] = {"seq_len": seq_len, "seed": seed, "model_name": model_name}
    parts = []
    for name, count in (shares_of(dataset, num_samples) if is_mixture(dataset) else {None: num_samples}).items():
        source = dataset if name is None else name
        rows = rows_with_images(source, seed, sees)
        if rows is None:
            parts.append(Sequences(calibration_tokens(source, tokenizer, num_samples=count, **options)))
        elif not sees:
            raise ValueError(f"The dataset has images, but {type(model).__name__} takes none; give text.")
        else:
            parts.append(_samples(model, rows, _processor(processor, model_name), count, seq_len))
    if sees and all(part.are_text for part in parts):
        logger.warning(
            "%s sees images, but the calibration data are text: what only images reach is not calibrated for them. Give %s.",
            type(model).__name__,
            EXPECTED,
        )
    return Sequences.joined(parts, spread_order(list(map(len, parts))))


def sees_images(config: Any) -> bool:
    """Whether a model of this config takes images."""
    return getattr(config, "vision_config", None) is not None


def image_token_ids(config: Any, processor: Any = None) -> set[int]:
    """Ids of the tokens that stand for parts of images."""
    names = ("image_token_id", "image_token_index", "image_patch_id")
    found = (getattr(owner, name, None) for owner in (config, processor) for name in names)
    return {value for value in found if isinstance(value, int)}


def _samples(model: Any, rows: Iterable[Row], processor: Any, num_samples: int, seq_len: int) -> Sequences:
    """The samples that are used: made once for their ids, and again when they are needed and no longer kept."""
    if isinstance(rows, list) and len(rows) >= num_samples:
        picked = [n * len(rows) // num_samples for n in range(num_samples)]
        rows = [rows[n] for n in picked + sorted(set(range(len(rows))) - set(picked))]
    known, takes = image_token_ids(model.config, processor), accepted(model)
    used, ids, images, marks, lengths = list[Row](), list[Tensor](), list[Tensor](), list[str](), list[int]()

    def make(n: int) -> Mapping[str, Any]:
        made = _inputs(processor, used[n], takes)
        if _mark(made) != marks[n]:
            raise ValueError(f"The image of {used[n].name} changed while it was calibrated on; start again.")
        return {name: value for name, value in made.items() if name != "input_ids"}

    kept = Kept(make)
    for row in islice(rows, TRIED * num_samples):
        made = _inputs(processor, row, takes)
        own = made["input_ids"]
        lengths.append(len(own))
        if len(own) <= seq_len:
            kept.put(len(used), {name: value for name, value in made.items() if name != "input_ids"})
            used.append(row)
            ids.append(own)
            marks.append(_mark(made))
            images.append(_image_tokens(own, made, known))
        if len(used) == num_samples:
            break
    if len(used) < num_samples:
        raise ValueError(
            f"The calibration dataset gives {len(used)} samples of up to seq_len={seq_len} tokens (of {len(lengths)}; the longest "
            f"has {max(lengths, default=0)}), but num_samples={num_samples} are asked for; give more, lower num_samples, or raise "
            "seq_len."
        )
    if not any(bool(own.any()) for own in images):
        raise ValueError(
            f"No token of the calibration samples stands for an image (ids {sorted(known)}); the processor does not fit the model."
        )
    return Sequences(ids, kept, images, hashlib.sha256("".join(marks).encode()).hexdigest())


def _inputs(processor: Any, row: Row, takes: set[str] | None) -> dict[str, Any]:
    """What a model is given for a row, and "input_ids" [T]."""
    made = processed(processor, row.messages())
    return {name: x for name, x in made.items() if takes is None or name in takes or name == "input_ids"}


def accepted(model: Any) -> set[str] | None:
    """Names of the arguments that a model's forward pass takes; None if it takes any."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def processed(processor: Any, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a model is given for messages: token ids [T] under "input_ids", the rest as the processor returns it.

    By its chat template; without one, messages are lines, and images stand where they are in them.
    """
    if getattr(processor, "chat_template", None):
        out = processor.apply_chat_template(list(messages), tokenize=True, return_dict=True, return_tensors="pt")
    else:
        found = [p["image"] for turn in messages for p in turn["content"] if p["type"] == "image"]
        mark = getattr(processor, "image_token", "<image>")
        lines = ("".join(mark if p["type"] == "image" else p["text"] for p in turn["content"]) for turn in messages)
        out = processor(images=found or None, text="\n".join(lines), return_tensors="pt")
    made = dict(out)
    ids = made.pop("input_ids")
    made.pop("attention_mask", None)  # nothing is padded
    return {"input_ids": ids[0].to(torch.int64), **made}


def _mark(made: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(made):
        if isinstance(made[name], Tensor):
            digest.update(made[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _image_tokens(ids: Tensor, made: Mapping[str, Any], known: set[int]) -> Tensor:
    for name in KINDS:
        if isinstance(made.get(name), Tensor):
            return made[name][0] != 0  # type: ignore[no-any-return]
    return torch.isin(ids, torch.tensor(sorted(known), dtype=torch.int64))


def _processor(processor: Any, model_name: str) -> Any:
    if processor is not None and not isinstance(processor, str | Path):
        return processor
    from transformers import AutoProcessor

    name, reason = str(processor or model_name), "it has none for images"
    try:
        found = AutoProcessor.from_pretrained(name)
        if getattr(found, "image_processor", None) is not None:
            return found
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    raise ValueError(
        f"There is no processor for '{name}' to read calibration images with ({reason}); give processor=, or text as dataset."
    )
