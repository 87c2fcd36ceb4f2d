# SPDX-License-Identifier: Apache-2.0
"""Rows of data sets with images, as chat messages whose images can be loaded; and which data sets are such.

Knows the shapes that rows have, files and PIL; it does not know processors or models.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers_mcmoe.calibration.data import hub_rows, local_path

# instructions with images, of the kind that vision-language models are tuned on
DEFAULT_IMAGES = {"path": "lmms-lab/LLaVA-NeXT-Data"}
EXPECTED = (
    "a list of {'image': .., 'text': ..} or chat messages, a folder with images and a .jsonl file, such a .jsonl file, or a "
    "Hub id"
)
# keys of a row that images are under, names of their files, and messages that may hold some
IMAGES, FILES, MESSAGES = ("image", "images"), ("file_name", "image_path"), ("messages", "conversations", "texts")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOURCES = ("image", "path", "url", "image_url")
_ROLES = {"human": "user", "gpt": "assistant"}
_MARKS = ("<image>", "<|image|>")
# rows of a stream or a file that are looked at for images
LOOKED_AT = 64


class Row:
    """A row of a data set.

    Args:
        get: returns the row, a mapping or a list of chat messages; images stay in files until they are needed.
        name: what it is called in messages.
        folder: that names of files are relative to.
    """

    def __init__(self, get: Callable[[], Any], name: str, folder: Path | None = None) -> None:
        self._get, self.name, self._folder = get, name, folder or Path()
        self._fetched: dict[str, Any] = {}  # images of the network

    def has_images(self) -> bool:
        """Whether there are any; also False for a row that cannot be read as messages."""
        try:
            turns, images = self._parts()
        except ValueError:
            return False
        return bool(images) or any(part["type"] == "image" for turn in turns for part in turn["content"])

    def messages(self) -> list[dict[str, Any]]:
        """Chat messages, each with a list of parts, whose images are loaded.

        Raises:
            ValueError: an image cannot be read, the row has neither text nor messages, or its images do not fit their marks.
        """
        turns, images = self._parts()
        places = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
        open_places = [part for part in places if "image" not in part]
        if images and not places:
            first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            first["content"] = [{"type": "image", "image": image} for image in images] + first["content"]
        elif len(images) != len(open_places) and (open_places or len(images) != len(places)):
            raise ValueError(f"{self.name} has {len(images)} images for {len(open_places)} places in its text.")
        else:  # images that all parts already have are given twice
            for part, image in zip(open_places, images, strict=False):
                part["image"] = image
        for part in (part for turn in turns for part in turn["content"] if part["type"] == "image"):
            part["image"] = self._load(part["image"])
        return turns

    def _parts(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages as they stand in the row, and images that are given beside them."""
        row = self._get()
        if not isinstance(row, Mapping):
            return self._turns(row), []
        if any(_listed(row.get(key)) for key in ("video", "videos", "audio", "audios")):
            raise ValueError(f"{self.name} has videos or sounds; calibration takes text and images.")
        images = [image for key in IMAGES for image in _listed(row.get(key))]
        if not images:
            names = (name for key in FILES for name in _listed(row.get(key)))
            images = [name for name in names if str(name).lower().endswith(SUFFIXES)]
        key = next((key for key in MESSAGES if row.get(key)), None)
        if key is not None:
            return self._turns(row[key], marked=bool(images)), images
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{self.name} has neither 'text' nor messages (it has {sorted(map(str, row))}).")
        return [{"role": "user", "content": _texts(row["text"], bool(images))}], images

    def _turns(self, given: Any, marked: bool = False) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        for turn in given if isinstance(given, list | tuple) else [given]:
            if not isinstance(turn, Mapping):
                raise ValueError(f"{self.name} has a message of type {type(turn).__name__}, which must be a dict.")
            if isinstance(turn.get("from"), str):
                said = {_ROLES.get(turn["from"], turn["from"]): turn.get("value")}
            elif isinstance(turn.get("role"), str):
                said = {turn["role"]: turn.get("content")}
            else:
                said = {role: turn[role] for role in ("system", "user", "assistant") if role in turn}
            if not said or not all(isinstance(role, str) for role in said):
                raise ValueError(f"{self.name} has a message without a role (it has {sorted(map(str, turn))}).")
            turns += [{"role": role, "content": self._content(content, marked)} for role, content in said.items()]
        if not turns:
            raise ValueError(f"{self.name} has no messages.")
        return turns

    def _content(self, content: Any, marked: bool) -> list[dict[str, Any]]:
        if content is None or isinstance(content, str):
            return _texts(content or "", marked)
        parts: list[dict[str, Any]] = []
        for part in content if isinstance(content, list | tuple) else [content]:
            if isinstance(part, str):
                parts += _texts(part, marked)
                continue
            given = part if isinstance(part, Mapping) else {}
            kind, text = given.get("type"), given.get("text")
            source = next((given[key] for key in SOURCES if given.get(key) is not None), None)
            if isinstance(text, str) and kind in ("text", None):
                parts += _texts(text, marked)
            elif kind in ("image", "image_url") or (kind is None and source is not None):
                source = source.get("url") if kind == "image_url" and isinstance(source, Mapping) else source
                parts.append({"type": "image"} if source is None else {"type": "image", "image": source})
            else:
                raise ValueError(f"{self.name} has a part of type {kind!r}; calibration takes text and images.")
        return parts

    def _load(self, source: Any) -> Any:
        from PIL import Image
        from transformers.image_utils import load_image

        name = str(source) if isinstance(source, str | Path) else "given in the row"
        try:
            if isinstance(source, Mapping):  # as parquet files store them
                given = io.BytesIO(source["bytes"]) if source.get("bytes") else self._folder / source["path"]
                return Image.open(given).convert("RGB")
            if isinstance(source, Image.Image):
                return source.convert("RGB")
            if not str(source).startswith(("http://", "https://", "data:")):
                return Image.open(self._folder / source).convert("RGB")
            if name not in self._fetched:
                self._fetched[name] = load_image(source).convert("RGB")
            return self._fetched[name]
        except Exception as error:
            raise ValueError(
                f"The image '{name[:200]}' of {self.name} cannot be read ({type(error).__name__}); remove or replace it."
            ) from error


def _fixed(row: Any) -> Callable[[], Any]:
    return lambda: row


def _listed(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [value for value in values if value is not None and (not isinstance(value, str) or value)]


def _texts(text: str, marked: bool) -> list[dict[str, Any]]:
    """A text as parts of a message; if it is `marked`, marks in it stand for images."""
    if marked:
        for mark in _MARKS[1:]:
            text = text.replace(mark, _MARKS[0])
    parts: list[dict[str, Any]] = []
    for n, piece in enumerate(text.split(_MARKS[0]) if marked else [text]):
        parts += [{"type": "image"}] * (n > 0)
        parts += [{"type": "text", "text": piece.strip("\n")}] * bool(piece.strip())
    return parts


def rows_with_images(dataset: Any, seed: int, sees: bool) -> Iterable[Row] | None:
    """The rows of a data set with images, or None if it is text or token ids.

    Args:
        dataset: see `MCMoEConfig`.
        seed: of the order of a Hub data set.
        sees: whether they are for a model that takes images; for others, files that have text are text.

    Raises:
        ValueError: it is of samples as for images, but there is none, or a row cannot be read.
        OSError: a Hub data set cannot be reached.
    """
    if isinstance(dataset, list | tuple):
        if not len(dataset) or not _is_sample(dataset[0]):
            return None
        rows = [Row(_fixed(row), f"sample {n} of the dataset") for n, row in enumerate(dataset)]
        return _checked(rows, "The dataset")
    if dataset is None and sees:
        return (Row(_fixed(row), f"a row of '{DEFAULT_IMAGES['path']}'") for row in hub_rows(DEFAULT_IMAGES, seed))
    path = local_path(dataset) if isinstance(dataset, str | Path) else None
    if path is not None and path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(
                f"The folder '{path}' has {len(files)} .jsonl files; one must say which text belongs to which image, as "
                'lines of {"file_name": .., "text": ..}.'
            )
        return _checked(list(_lines(files[0])), f"The dataset '{path}'")
    if not sees:
        return None
    if path is not None:
        if path.is_file() and path.suffix in (".jsonl", ".json"):
            found = list(_lines(path))
        elif path.is_file() and path.suffix == ".parquet":
            found = _table(path)
        else:
            return None
        return found if any(row.has_images() for row in _some(found)) else None
    if isinstance(dataset, Mapping | str):
        names = ("path", "subset", "split", "field")
        source = dict(zip(names, dataset.split(":"), strict=False)) if isinstance(dataset, str) else dataset
        stream = (Row(_fixed(row), f"a row of '{source['path']}'") for row in hub_rows(source, seed))
        first = list(islice(stream, LOOKED_AT))
        return chain(first, stream) if any(row.has_images() for row in first) else None
    return None


def _some(rows: list[Row]) -> list[Row]:
    """Rows that say whether a file is one with images: spread over it."""
    return [rows[n * len(rows) // LOOKED_AT] for n in range(LOOKED_AT)] if len(rows) > LOOKED_AT else rows


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of the dataset '{path}' is not JSON ({error}).") from error
            yield Row(_fixed(row), f"line {number} of '{path}'", path.parent)


def _table(path: Path) -> list[Row]:
    from datasets import Dataset, Image, List

    table = Dataset.from_parquet(str(path))
    for name, feature in table.features.items():
        # their bytes, until one is needed
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return [
        Row(functools.partial(table.__getitem__, n), f"row {n} of '{path}'", path.parent) for n in range(len(table))
    ]


def _checked(rows: list[Row], name: str) -> list[Row]:
    for row in rows:  # a row that cannot be read is named rather than counted as one without images
        if row.has_images():
            return rows
    if rows:
        rows[0].messages()
    raise ValueError(f"{name} has no image in any of its {len(rows)} samples; give {EXPECTED}, or text.")


def _is_sample(value: Any) -> bool:
    """Whether this is a row, or a list of chat messages."""
    return isinstance(value, Mapping) or (
        isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and isinstance(value[0], Mapping)
    )
