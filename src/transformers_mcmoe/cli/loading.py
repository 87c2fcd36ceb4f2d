# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers and texts by name, with an error in one sentence where there is none of that name.

Knows transformers' way to find things; names are checked before anything large is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from transformers_mcmoe.cli.command import Refused
from transformers_mcmoe.cli.console import say
from transformers_mcmoe.config import QUANT_METHOD
from transformers_mcmoe.models.structure import model_class


def read_config(model: str) -> Any:
    """The config of a model.

    Raises:
        Refused: there is no such model, or its config cannot be read.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise Refused(
                f"The folder '{model}' holds no model: it has no config.json; give a model's folder or Hub id."
            )
    elif folder.exists():
        raise Refused(f"'{model}' is a file; give a model's folder or Hub id.")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise Refused(f"There is no folder '{model}'; give a model's folder or Hub id.")
    else:
        _find_on_hub(model)
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:
        raise Refused(f"The config of '{model}' cannot be read: {_first_line(error)}") from error


def _find_on_hub(model: str) -> None:
    say(f"Looking for '{model}' on the Hub.")
    try:
        cached_file(model, "config.json")
    except OSError as error:
        if "couldn't connect" in str(error):
            raise Refused(
                f"'{model}' is no folder here, and the Hub cannot be reached; check the name, or the network."
            ) from error
        raise Refused(
            f"'{model}' is no folder here, and the Hub gives out no model of that name; check it, or log in "
            "(hf auth login) if it is private."
        ) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__


def is_packed(config: Any) -> bool:
    """Whether a config is that of a model packed by this project."""
    found = getattr(config, "quantization_config", None)
    return (
        found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    ) == QUANT_METHOD


def load_model(model: str, dtype: str = "auto") -> Any:
    """A model, packed or dense, in eval mode.

    Raises:
        Refused: there is no such model.
    """
    return model_class(read_config(model)).from_pretrained(model, dtype=dtype).eval()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        Refused: it has none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise Refused(
            f"'{model}' has no tokenizer that can be read ({type(error).__name__}); save one beside it."
        ) from error
