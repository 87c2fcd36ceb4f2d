# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed models through PEFT's own calls (extra `lora`).

`register` runs whenever a packed model is loaded; from then on `get_peft_model`, `PeftModel.from_pretrained`,
`model.add_adapter`, `Trainer` and TRL take packed models as they take dense ones. Which names mean which modules is in
`targets`, what computes in `layers`, the start from the quantization error in `initialization`.

Does not know other tuners: PEFT's IA3, OFT, ... are refused on packed models.
"""

from transformers_mcmoe.integrations.lora.initialization import initialize_lora
from transformers_mcmoe.integrations.lora.registration import register
from transformers_mcmoe.integrations.lora.training import merge_errors, prepare_for_training

__all__ = ["initialize_lora", "merge_errors", "prepare_for_training", "register"]
