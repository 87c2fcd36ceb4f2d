# SPDX-License-Identifier: Apache-2.0
"""The one place where another library's function is exchanged: PEFT's conversion of a LoraConfig to a model.

PEFT turns the names of a config into those that transformers 5 gives the parts of a MoE model
(`convert_peft_config_for_transformers`, the first thing that every way of adding an adapter does). It makes
`target_parameters` of experts, which packed models do not have, and drops them in silence. For packed models the names
are resolved here instead, and the config learns the packed modules; for all others PEFT's function runs unchanged.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

_PLACE = "convert_peft_config_for_transformers"
_MARK = "_mcmoe_registered"


def register() -> None:
    """Teach PEFT's LoraConfig packed modules. Calling it again does nothing.

    Raises:
        ImportError: PEFT is not installed, or has no such place any more.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("Adapters need PEFT; pip install transformers-mcmoe[lora].")
    import peft
    from peft.utils import transformers_weight_conversion as module

    original = getattr(module, _PLACE, None)
    if getattr(original, _MARK, False):
        return
    if original is None or list(inspect.signature(original).parameters)[:2] != ["peft_config", "model"]:
        raise ImportError(
            f"PEFT {peft.__version__} has no {_PLACE}(peft_config, model) that packed models need; install the version "
            "that constraints.txt of transformers_mcmoe names."
        )

    @functools.wraps(original)
    def convert(peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers_mcmoe.integrations.lora.targets import adapt_config, is_packed

        if is_packed(model):
            return adapt_config(peft_config, model)
        return original(peft_config, model, *args, **kwargs)

    setattr(convert, _MARK, True)
    setattr(module, _PLACE, convert)
