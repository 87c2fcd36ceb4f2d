# SPDX-License-Identifier: Apache-2.0
"""Calibration sequences of samples with images, made by a model's processor; of text for all other models.

Rows of a list, a folder, a file or a Hub data set become chat messages, messages become token ids and pixel values. Knows
processors and the ids that stand for images; it does not know what a model does with them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.data import calibration_tokens, hub_rows, shares_of, spread_order
from transformers_mcmoe.calibration.sequences import Kept, Sequences
from transformers_mcmoe.config.values import is_mixture

logger = logging.getLogger(__name__)

# instructions with images, of the kind that vision-language models are tuned on
DEFAULT_IMAGES = {"path": "lmms-lab/LLaVA-NeXT-Data"}
# keys of a row that images, or messages that may hold some, are under
IMAGES, MESSAGES = ("image", "images", "file_name", "image_path"), ("messages", "conversations", "texts")
_ROLES = {"human": "user", "gpt": "assistant"}
_MARKS = ("<image>", "<|image|>")
_EXPECTED = (
    "a list of {'image': .., 'text': ..} or chat messages, a folder with images and a .jsonl file, such a .jsonl file, or a "
    "Hub id"
)


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
        dataset: see `MCMoEConfig`.
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
    options: dict[str, Any] = {"num_samples": num_samples, "seq_len": seq_len, "seed": seed, "model_name": model_name}
    if isinstance(dataset, Sequences):
        return dataset[:num_samples]
    sees = sees_images(model.config)
    if is_mixture(dataset):
        counts = shares_of(dataset, num_samples)
        parts = [
            calibration_sequences(model, name, tokenizer, processor=processor, **options | {"num_samples": count})
            for name, count in counts.items()
        ]
        return Sequences.joined(parts, spread_order(list(map(len, parts))))
    rows = _image_rows(DEFAULT_IMAGES if dataset is None and sees else dataset, seed, sees)
    if rows is None:
        if sees:
            logger.warning(
                "%s sees images, but the calibration data are text: what only images reach is not calibrated for them. Give %s.",
                type(model).__name__,
                _EXPECTED,
            )
        return Sequences(calibration_tokens(dataset, tokenizer, **options))
    if not sees:
        raise ValueError(f"The dataset has images, but {type(model).__name__} takes none; give text.")
    return _samples(model.config, rows, _processor(processor, model_name), num_samples, seq_len)


def sees_images(config: Any) -> bool:
    """Whether a model of this config takes images."""
    return getattr(config, "vision_config", None) is not None


def image_token_ids(config: Any, processor: Any = None) -> set[int]:
    """Ids of the tokens that stand for parts of images."""
    found = set()
    for owner in (config, processor):
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                found.add(value)
    return found


class _Row:
    """A row of a data set, and what it is called in messages."""

    def __init__(self, row: Any, name: str, folder: Path | None = None) -> None:
        self._row, self.name, self._folder = row, name, folder

    def messages(self) -> list[dict[str, Any]]:
        """Chat messages whose images are loaded.

        Raises:
            ValueError: an image cannot be read, or the row has neither text nor messages.
        """
        row = self._row if isinstance(self._row, Mapping) else {"messages": self._row}
        given = [row[key] for key in IMAGES if row.get(key) is not None]
        images = [image for value in given for image in (value if isinstance(value, list | tuple) else [value])]
        turns = self._turns(row)
        inside = any(part["type"] == "image" for turn in turns for part in turn["content"])
        if images and not inside:
            turns[0]["content"] = [{"type": "image", "image": image} for image in images] + turns[0]["content"]
        elif images:
            left = iter(images)
            for part in (part for turn in turns for part in turn["content"] if part["type"] == "image"):
                part.setdefault("image", next(left, None))
        for turn in turns:
            turn["content"] = [self._loaded(part) for part in turn["content"]]
        return turns

    def _turns(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        key = next((key for key in MESSAGES if row.get(key)), None)
        if key is None:
            if not isinstance(row.get("text"), str):
                raise ValueError(f"{self.name} has neither 'text' nor messages (it has {sorted(row)}).")
            return [{"role": "user", "content": _texts(row["text"])}]
        turns = []
        for turn in row[key]:
            if "from" in turn:
                turns.append({"role": _ROLES.get(turn["from"], turn["from"]), "content": _texts(turn["value"])})
            elif "role" in turn:
                content = turn["content"]
                turns.append(
                    {
                        "role": turn["role"],
                        "content": _texts(content) if isinstance(content, str) else [dict(part) for part in content],
                    }
                )
            else:
                turns += [
                    {"role": role, "content": _texts(turn[role])} for role in ("user", "assistant") if role in turn
                ]
        return turns

    def _loaded(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        source = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return {"type": "image", "image": self._image(source)}

    def _image(self, source: Any) -> Any:
        from PIL import Image
        from transformers.image_utils import load_image

        name = source if isinstance(source, str | Path) else "given"
        try:
            if isinstance(source, Mapping):  # bytes of a parquet file
                import io

                return Image.open(io.BytesIO(source["bytes"])).convert("RGB")
            if isinstance(source, Image.Image):
                return source.convert("RGB")
            if isinstance(source, str | Path) and not str(source).startswith(("http://", "https://", "data:")):
                return Image.open((self._folder or Path()) / source).convert("RGB")
            return load_image(source).convert("RGB")
        except Exception as error:
            raise ValueError(
                f"The image '{name}' of {self.name} cannot be read ({type(error).__name__}); remove or replace it."
            ) from error


def _texts(text: str) -> list[dict[str, Any]]:
    """A text as parts of a message; marks in it stand for images."""
    for mark in _MARKS[1:]:
        text = text.replace(mark, _MARKS[0])
    parts: list[dict[str, Any]] = []
    for n, piece in enumerate(text.split(_MARKS[0])):
        parts += [{"type": "image"}] * (n > 0)
        parts += [{"type": "text", "text": piece.strip("\n")}] * bool(piece.strip())
    return parts


def _image_rows(dataset: Any, seed: int, sees: bool) -> Iterable[_Row] | None:
    """The rows of a data set with images, or None if it is text or token ids.

    Raises:
        ValueError: it is of samples as for images, but there is none.
    """
    if isinstance(dataset, list | tuple) and len(dataset) and _is_sample(dataset[0]):
        return _checked([_Row(row, f"sample {n} of the dataset") for n, row in enumerate(dataset)], "The dataset")
    if isinstance(dataset, str | Path) and "\n" not in str(dataset):
        path = Path(dataset)
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if len(files) != 1:
                raise ValueError(
                    f"The folder '{path}' has {len(files)} .jsonl files; one must say which text belongs to which image, as "
                    'lines of {"file_name": .., "text": ..}.'
                )
            return _checked(list(_file_rows(files[0])), f"The dataset '{path}'")
        if path.suffix in (".jsonl", ".json") and path.is_file():
            rows = list(_file_rows(path))
            return rows if any(_has_images(row._row) for row in rows[:64]) else None
        if path.suffix == ".parquet" and path.is_file():
            from datasets import Dataset

            table = Dataset.from_parquet(str(path))
            if not _has_images(dict.fromkeys(table.column_names, True)):
                return None
            return [_Row(table[n], f"row {n} of '{path}'", path.parent) for n in range(len(table))]
        if path.exists() or path.suffix in (".txt", ".parquet"):
            return None
    if sees and isinstance(dataset, Mapping | str):
        names = ("path", "subset", "split", "field")
        source = dict(zip(names, dataset.split(":"), strict=False)) if isinstance(dataset, str) else dataset
        first, found = hub_rows(source, seed)
        return (_Row(row, f"a row of '{source['path']}'") for row in found) if _has_images(first) else None
    return None


def _file_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield _Row(json.loads(line), f"line {number} of '{path}'", path.parent)
            except ValueError as error:
                raise ValueError(f"Line {number} of the dataset '{path}' is not JSON ({error}).") from error


def _checked(rows: list[_Row], name: str) -> list[_Row]:
    if not any(_has_images(row._row) for row in rows):
        raise ValueError(f"{name} has no image in any of its {len(rows)} samples; give {_EXPECTED}, or text.")
    return rows


def _is_sample(value: Any) -> bool:
    """Whether this is a row, or a list of chat messages."""
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    )


def _has_images(row: Any) -> bool:
    if isinstance(row, Mapping) and any(row.get(key) is not None for key in IMAGES):
        return True
    messages = row if isinstance(row, list | tuple) else row.get("messages") if isinstance(row, Mapping) else None
    return any(
        isinstance(part, Mapping) and part.get("type") == "image"
        for message in messages or ()
        if isinstance(message, Mapping)
        for part in (message["content"] if isinstance(message.get("content"), list | tuple) else ())
    )


def _samples(config: Any, rows: Iterable[_Row], processor: Any, num_samples: int, seq_len: int) -> Sequences:
    """The samples that are used, made once for their ids and again when they are needed."""
    if isinstance(rows, list):
        picked = [n * len(rows) // num_samples for n in range(num_samples)] if len(rows) >= num_samples else []
        rest = [n for n in range(len(rows)) if n not in set(picked)]
        rows = [rows[n] for n in picked + rest]
    known, used = image_token_ids(config, processor), list[_Row]()
    ids, images, digest, longest, seen = [], [], hashlib.sha256(), 0, 0
    first: dict[int, Mapping[str, Any]] = {}
    for row in islice(rows, 16 * num_samples):
        made = dict(processed(processor, row.messages()))
        own, seen = made.pop("input_ids"), seen + 1
        longest = max(longest, len(own))
        if len(own) > seq_len:
            continue
        used.append(row)
        ids.append(own)
        images.append(_image_tokens(own, made, known))
        for x in made.values():
            if isinstance(x, Tensor):
                digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
        first[len(used) - 1] = made
        if len(used) == num_samples:
            break
    if len(used) < num_samples:
        raise ValueError(
            f"The calibration dataset gives {len(used)} samples of up to seq_len={seq_len} tokens (of {seen}; the longest has {longest}), "
            f"but num_samples={num_samples} are asked for; give more, lower num_samples, or raise seq_len."
        )
    if not any(bool(own.any()) for own in images):
        raise ValueError(
            f"No token of the calibration samples stands for an image (ids {sorted(known)}); the processor does not fit the model."
        )

    def make(n: int) -> Mapping[str, Any]:
        given = first.pop(n, None)  # kept until it is first asked for
        return given or {k: v for k, v in processed(processor, used[n].messages()).items() if k != "input_ids"}

    kept = Kept(make)
    for n in range(len(used)):
        kept(n)
    first.clear()
    return Sequences(ids, kept, images, digest.hexdigest())


def processed(processor: Any, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a model is given for messages: token ids [T] under "input_ids", the rest as the processor returns it."""
    if getattr(processor, "chat_template", None):
        out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    else:
        parts = [part for message in messages for part in message["content"]]
        found = [part["image"] for part in parts if part["type"] == "image"]
        mark = getattr(processor, "image_token", _MARKS[0])
        pieces = ("".join(mark if p["type"] == "image" else p["text"] for p in turn["content"]) for turn in messages)
        text = "\n".join(pieces)
        out = processor(images=found or None, text=text, return_tensors="pt")
    made = dict(out)
    ids = made.pop("input_ids")
    made.pop("attention_mask", None)  # nothing is padded
    return {"input_ids": ids[0].to(torch.int64), **made}


def _image_tokens(ids: Tensor, made: Mapping[str, Any], known: set[int]) -> Tensor:
    # Ernie's experts of images get the marks around them, too
    for name in ("moe_mm_token_type_ids", "mm_token_type_ids", "images_seq_mask"):
        if isinstance(made.get(name), Tensor):
            return made[name][0] != 0
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
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    raise ValueError(
        f"There is no processor for '{name}' to read calibration images with ({reason}); give processor=, or text as dataset."
    )
