# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens [N, T] and texts to measure on, from a Hub data set, a local file, strings or token ids.

Knows text and tokenizers; it does not know the model that will read the tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.config.values import is_mixture

logger = logging.getLogger(__name__)

# the papers' calibration text: the first training shard of C4
DEFAULT_DATASET = {
    "path": "allenai/c4",
    "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
    "split": "train",
    "field": "text",
}
# the text that perplexities are usually given for
DEFAULT_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
LOCAL_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_SHUFFLE_BUFFER = 10_000
# local text is read up to this many times what is needed, and the samples are spread over it
_LOCAL_SPREAD = 16
_ALTERNATIVES = "dataset= a local .txt, .jsonl or .parquet file, a list of strings, or token ids [N, T]"


def calibration_tokens(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    model_name: str = "",
) -> Tensor:
    """Token ids for calibration.

    Texts are tokenized one by one, joined, and cut into sequences of `seq_len`; texts of a Hub data set come in
    seeded random order, local ones in theirs, with `num_samples` sequences spread evenly over all that there are.

    Args:
        dataset: see `MCMoEConfig`.
        tokenizer: tokenizer object, its id, or None for `model_name`'s.
        num_samples: N.
        seq_len: T.
        seed: seed of the order of a Hub data set.
        model_name: id or path of the model.

    Returns:
        [N, T] int64.

    Raises:
        ValueError: the data set is empty, too short, or has no text field; there is no tokenizer for texts.
        OSError: the Hub data set cannot be reached; the message names the local alternatives.
    """
    if isinstance(dataset, Tensor) or _is_token_lists(dataset):
        return _given_tokens(dataset, num_samples)
    if is_mixture(dataset):
        parts = [
            calibration_tokens(name, tokenizer, num_samples=count, seq_len=seq_len, seed=seed, model_name=model_name)
            for name, count in shares_of(dataset, num_samples).items()
        ]
        return _spread(parts)
    texts = _texts(DEFAULT_DATASET if dataset is None else dataset, seed)
    tokenizer = _tokenizer(tokenizer, model_name)
    needed = num_samples * seq_len
    limit = needed if _is_hub(dataset) else _LOCAL_SPREAD * needed
    ids: list[int] = []
    for text in texts:
        if text.strip():
            ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"] + _end(tokenizer))
        if len(ids) >= limit:
            break
    return _cut(torch.tensor(ids, dtype=torch.int64), num_samples, seq_len)


def shares_of(mixture: Mapping[str, float], num_samples: int) -> dict[str, int]:
    """Sequences of each data set: its share of `num_samples`, one at least; the largest remainders are rounded up.

    Raises:
        ValueError: a share is no positive number, or there are fewer sequences than data sets.
    """
    if not all(isinstance(share, int | float) and share > 0 for share in mixture.values()):
        raise ValueError(f"dataset={dict(mixture)!r} mixes data sets: each needs a positive number, its share.")
    if num_samples < len(mixture):
        raise ValueError(
            f"num_samples={num_samples} is less than the {len(mixture)} data sets that dataset mixes; raise it."
        )
    exact = {name: num_samples * share / sum(mixture.values()) for name, share in mixture.items()}
    counts = {name: max(1, int(count)) for name, count in exact.items()}
    while (left := num_samples - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        free = [name for name in exact if step > 0 or counts[name] > 1]
        name = max(free, key=lambda name: step * (exact[name] - counts[name]))
        counts[name] += step
    return counts


def _spread(parts: Sequence[Tensor]) -> Tensor:
    """Sequences of several data sets, [N, T], in an order in which any first ones are of all of them by their shares."""
    return torch.cat(list(parts))[spread_order(list(map(len, parts)))]


def spread_order(counts: Sequence[int]) -> list[int]:
    """Numbers of the sequences of several data sets, one behind the other, in an order in which any first ones are of all."""
    place = torch.cat([(torch.arange(count) + 0.5) / count for count in counts])
    return place.argsort(stable=True).tolist()


def text_tokens(dataset: Any, tokenizer: Any) -> Tensor:
    """Token ids of a whole text, to be measured on.

    A local .txt file is one text; rows of other sources are joined by blank lines, in their order.

    Args:
        dataset: as for calibration; None is WikiText-2's test set on the Hub.
        tokenizer: tokenizer object.

    Returns:
        [n] int64.

    Raises:
        ValueError: there is no text.
        OSError: the Hub data set cannot be reached.
    """
    return torch.tensor(tokenizer(whole_text(dataset))["input_ids"], dtype=torch.int64)


def whole_text(dataset: Any) -> str:
    """The text of a data set, as `text_tokens` joins it.

    Raises:
        ValueError: there is no text.
        OSError: the Hub data set cannot be reached.
    """
    source = DEFAULT_TEXT if dataset is None else dataset
    text = "\n\n".join(_texts(source, None))
    if not text.strip():
        raise ValueError(f"The text {source!r} is empty; give another.")
    return text


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of token ids: tells whether two figures, or two compressions, are of one text."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def _cut(ids: Tensor, num_samples: int, seq_len: int) -> Tensor:
    available = len(ids) // seq_len
    if available < num_samples:
        found = "is empty" if len(ids) == 0 else f"gives {len(ids)} tokens, {available} sequences of {seq_len}"
        raise ValueError(
            f"The calibration dataset {found}, but num_samples={num_samples} are asked for; give more text, or lower "
            f"num_samples{' or seq_len' if len(ids) else ''}."
        )
    rows = ids[: available * seq_len].view(available, seq_len)
    picked = torch.arange(num_samples) * available // num_samples
    return rows[picked].clone()


def _end(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id] if getattr(tokenizer, "eos_token_id", None) is not None else []


def _is_token_lists(dataset: Any) -> bool:
    return isinstance(dataset, list | tuple) and len(dataset) > 0 and not isinstance(dataset[0], str)


def _given_tokens(dataset: Any, num_samples: int) -> Tensor:
    """Token ids [N, T] that the user gives; the first `num_samples` rows, or all if there are fewer."""
    try:
        tokens = dataset if isinstance(dataset, Tensor) else torch.stack([torch.as_tensor(row) for row in dataset])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError("Token ids given as dataset must be sequences of one length.") from error
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.numel() == 0:
        raise ValueError(
            f"Token ids given as dataset must be a non-empty integer tensor [N, T]; this one is {tokens.dtype} "
            f"of shape {tuple(tokens.shape)}."
        )
    return tokens[:num_samples].to("cpu", torch.int64)


def _is_hub(dataset: Any) -> bool:
    return (
        dataset is None or isinstance(dataset, Mapping) or (isinstance(dataset, str) and local_path(dataset) is None)
    )


def local_path(dataset: str | Path) -> Path | None:
    """The file or folder that a data set's name means; None for the name of one on the Hub."""
    if isinstance(dataset, str) and ("\n" in dataset or max(len(part.encode()) for part in dataset.split("/")) > 255):
        raise ValueError(f"dataset is a text of {len(dataset)} characters; give texts as a list of strings: [text].")
    path = Path(dataset)
    return path if path.exists() or path.suffix in LOCAL_FORMATS else None


def _texts(dataset: Any, seed: int | None) -> Iterable[str]:
    if isinstance(dataset, str | Path) and (path := local_path(dataset)) is not None:
        return _file_texts(path)
    if isinstance(dataset, str):
        names = ("path", "subset", "split", "field")
        return _hub_texts(dict(zip(names, dataset.split(":"), strict=False)), seed)
    if isinstance(dataset, Mapping):
        return _hub_texts(dataset, seed)
    if isinstance(dataset, Sequence):
        return dataset
    raise ValueError(f"dataset={dataset!r} is of type {type(dataset).__name__}; give a Hub id, or {_ALTERNATIVES}.")


def _file_texts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"The dataset '{path}' is no file; give a Hub id, or {_ALTERNATIVES}.")
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    if path.suffix in (".jsonl", ".json"):
        lines = path.read_text(encoding="utf-8").split("\n")
        return [_field(_json(line, path, number), path) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".parquet":
        from datasets import Dataset  # imports pandas and pyarrow; only where it is needed

        return [_field(row, path) for row in Dataset.from_parquet(str(path))]
    raise ValueError(f"The dataset '{path}' has no known format; use one of {LOCAL_FORMATS}.")


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"Line {number} of the dataset '{path}' is not JSON ({error}).") from error


def _field(row: Any, source: Any, field: str = "text") -> str:
    if not isinstance(row, Mapping) or not isinstance(row.get(field), str):
        has = f"it has {sorted(row)}" if isinstance(row, Mapping) else f"a row is {type(row).__name__}"
        raise ValueError(f"The dataset '{source}' has no text field {field!r} ({has}).")
    return row[field]


def _hub_texts(source: Mapping[str, Any], seed: int | None) -> Iterator[str]:
    """Texts of a Hub data set, as `hub_rows` gives its rows."""
    field = source.get("field") or "text"
    rows = hub_rows(source, seed)
    first = next(rows, None)
    if first is None:
        return iter(())
    _field(first, source["path"], field)  # said before anything is tokenized
    return (_field(row, source["path"], field) for row in itertools.chain([first], rows))


def hub_rows(source: Mapping[str, Any], seed: int | None) -> Iterator[Any]:
    """The rows of a Hub data set, streamed in seeded random order or in its own.

    Raises:
        ValueError: the description names no data set.
        OSError: it cannot be reached.
    """
    from datasets import load_dataset

    if not source.get("path"):
        raise ValueError(f"The dataset {dict(source)!r} has no path; give the Hub id as 'path'.")
    path = source["path"]
    try:
        dataset = load_dataset(
            path,
            source.get("subset") or None,
            data_files=source.get("data_files"),
            split=source.get("split") or "train",
            streaming=True,
        )
        rows = iter(dataset if seed is None else dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
        first = next(rows)
    except StopIteration:
        return iter(())
    except Exception as error:
        raise OSError(
            f"The dataset '{path}' cannot be read from the Hub ({type(error).__name__}); go online, or "
            f"give {_ALTERNATIVES}."
        ) from error
    return itertools.chain([first], rows)


def _tokenizer(tokenizer: Any, model_name: str) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    name = str(tokenizer or model_name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"There is no tokenizer for '{name}' to read the calibration texts with ({type(error).__name__}); give "
            "tokenizer=, or token ids [N, T] as dataset."
        ) from error
