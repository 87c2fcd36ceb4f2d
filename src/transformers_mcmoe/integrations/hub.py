# SPDX-License-Identifier: Apache-2.0
"""Packed models on the Hugging Face Hub: weights, tokenizer, report, evaluation and a model card in one commit.

Knows huggingface_hub and the files of a packed model; what the card says is `card`'s business.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoProcessor, AutoTokenizer

from transformers_mcmoe.evaluation.record import EVALUATION_NAME, NEEDLE_NAME, load_record, write_record
from transformers_mcmoe.integrations.card import FIGURES, MARK, build_card, inherited
from transformers_mcmoe.report.building import REPORT_NAME, load_report

logger = logging.getLogger(__name__)

# of what an earlier upload left: weights in other shards would be found beside the new ones
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# figures that a card shows
SHOWN = ("bits", "frequency", "size", "buildup")
ATTEMPTS = 4
_Result = TypeVar("_Result")


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
    create_pr: bool = False,
    max_shard_size: str | int = "5GB",
) -> CommitInfo:
    """Upload a packed model with its tokenizer, report, evaluation and a model card made from them.

    `model.push_to_hub` of a packed model is this function.

    Args:
        model: a packed model.
        repo_id: "owner/name", or "name" under the token's user; made if there is none.
        tokenizer: tokenizer or processor; default the one beside the weights that the model came from.
        base_model: Hub id of the dense model; default the one it was compressed from, if that was a Hub id.
        license: Hub name of the licence; default that of the dense model's card.
        private: for a new repository.
        token: Hub token; default the one that is logged in.
        revision: branch.
        commit_message: default "Upload packed model".
        commit_description: further lines of it.
        tags: of the card, beside its own.
        create_pr: open a pull request instead.
        max_shard_size: of a weight file.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        ValueError: the model is not packed.
        OSError: the Hub cannot be reached, refuses the token, or the connection is cut again and again.
    """
    source = str(model.config.name_or_path)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        elif not copy_tokenizer(source, folder):
            logger.warning("No tokenizer goes with the model: '%s' has none; give tokenizer=.", source)
        record = _record_of(source, model.hf_quantizer.commit)
        if record:
            write_record(record, folder / EVALUATION_NAME)
        return push_folder(
            folder,
            repo_id,
            base_model=base_model,
            license=license,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            commit_description=commit_description,
            tags=tags or (),
            create_pr=create_pr,
        )


def copy_tokenizer(source: str, folder: Path) -> bool:
    """Save the processor or tokenizer of a model into a folder; False if it has none that can be read."""
    for loader in (AutoProcessor, AutoTokenizer):
        try:
            loader.from_pretrained(source).save_pretrained(folder)
            return True
        except Exception as error:
            logger.debug("%s: %s", loader.__name__, error)
    return False


def _record_of(source: str, commit: str | None) -> dict[str, Any]:
    """What was measured of a model that was loaded; nothing was of one that has just been compressed."""
    try:
        return load_record(source, commit)
    except OSError:
        return {}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a saved packed model as one commit; weights of an earlier upload are deleted in it. See `push_to_hub`.

    A README.md in the folder that was not made by this project is the card; else one is made, with figures where matplotlib is
    installed.

    Raises:
        ValueError: the folder holds no packed model.
        OSError: see `push_to_hub`.
    """
    folder = Path(folder)
    if not (folder / REPORT_NAME).is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"'{folder}' holds no packed model with its report; give the folder that mcmoe compress wrote."
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory)
        repo_id = _hub(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id, repo_id)
        facts = {"license": license} if license else {}
        write_card(folder, made, repo_id, base_model=base_model, facts=facts, token=token, tags=tags)
        if revision is not None and not create_pr:
            _hub(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
        files = {path.relative_to(root).as_posix(): path for root in (folder, made) for path in _files(root)}
        if not load_record(folder):  # figures of another state of the model stay here
            for name in (EVALUATION_NAME, NEEDLE_NAME):
                files.pop(name, None)
        _check_card(files["README.md"])

        def commit() -> CommitInfo:
            there = api.list_repo_files(repo_id, revision=revision)
            stale = [n for n in there if n not in files and any(fnmatch(n, pattern) for pattern in WEIGHTS)]
            operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
                *(CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name) for name in stale),
            ]
            message = commit_message or "Upload packed model"
            return api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

        return _hub(commit, repo_id)


def _files(folder: Path) -> list[Path]:
    """Files to upload: hidden ones are not."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def write_card(
    folder: Path,
    output: Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    facts: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write README.md and its figures for a packed model's folder into another folder.

    Args:
        folder: the packed model's.
        output: where the card goes; nothing is written if the folder has a card of the user's own.
        repo_id: "owner/name".
        base_model: Hub id, or folder, of the dense model.
        facts: metadata that goes before what the dense model's card says.
        token: to read a private model's card.
        tags: beside those that the card has anyway.
    """
    own = folder / "README.md"
    if own.is_file() and MARK not in own.read_text(encoding="utf-8"):
        return
    report, record = load_report(str(folder)), load_record(folder)
    base = base_model or report.get("base_model")
    known = inherited(base, token) if base else {}
    on_hub = base if base and not Path(base).is_dir() else None
    figures = _figures(report, record, output)
    known |= facts or {}
    card = build_card(repo_id, report, record, base_model=on_hub, facts=known, figures=figures, tags=tags)
    (output / "README.md").write_text(str(card), encoding="utf-8")


def _figures(report: Mapping[str, Any], record: Mapping[str, Any], output: Path) -> dict[str, str]:
    """Title -> path of the figures that were drawn."""
    try:
        from transformers_mcmoe.integrations.plots import report_figures

        drawn = [figure for figure in report_figures(report, record) if figure.name in SHOWN]
        (output / FIGURES).mkdir(parents=True, exist_ok=True)
        for figure in drawn:
            figure.png(output / FIGURES / f"{figure.name}.png")
    except ImportError as error:
        logger.warning("The card has no figures: %s", error)
        return {}
    return {figure.title: f"{FIGURES}/{figure.name}.png" for figure in drawn}


def _check_card(path: Path) -> None:
    """Raise ValueError if the Hub would refuse a card's metadata."""
    try:
        ModelCard.load(path).validate()
    except Exception as error:
        if not isinstance(error, HfHubHTTPError) and not _is_transport(error):
            raise
        # older clients ask huggingface.co whatever HF_ENDPOINT says; the commit is checked once more anyway
        logger.warning("The model card was not checked beforehand: %s", _reason(error))


def _hub(ask: Callable[[], _Result], repo_id: str) -> _Result:
    """What the Hub answers; a cut connection is tried again, and what was uploaded is not sent twice.

    Raises:
        OSError: one sentence on why there is no answer.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except LocalTokenNotFoundError as error:
            raise OSError("There is no Hub token; log in (hf auth login), set HF_TOKEN, or give one.") from error
        except RevisionNotFoundError as error:
            raise OSError(f"'{repo_id}' has no such branch; check the revision.") from error
        except RepositoryNotFoundError as error:
            raise OSError(f"The Hub knows no '{repo_id}', or this token may not write to it; check both.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status == 401:
                raise OSError(
                    "The Hub refuses the upload without a valid token; log in (hf auth login) or set HF_TOKEN."
                ) from error
            if status == 403:
                raise OSError(f"This token may not write to '{repo_id}'; take one with write access.") from error
            if status < 500 or attempt == ATTEMPTS:
                raise OSError(
                    f"The Hub refuses the upload to '{repo_id}' (HTTP {status}): {_reason(error)}"
                ) from error
        except Exception as error:
            if not _is_transport(error):
                raise
            if attempt == ATTEMPTS:
                raise OSError(
                    f"The connection to the Hub failed {ATTEMPTS} times ({type(error).__name__}); push again, what has arrived is "
                    "not sent twice."
                ) from error
        logger.warning("The connection to the Hub broke; trying again (%d of %d).", attempt + 1, ATTEMPTS)
        time.sleep(float(os.environ.get("MCMOE_RETRY_SECONDS", "2")) * attempt)
    raise AssertionError("unreachable")


def _is_transport(error: Exception) -> bool:
    """Whether it is a failure of the network, in whichever HTTP library the Hub's client uses."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests") or isinstance(
        error, ConnectionError
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
