# SPDX-License-Identifier: Apache-2.0
"""MCMoEHfQuantizer: answers transformers' hooks, and nothing else.

A dense checkpoint is compressed before its weights are read (`pipeline.compress`); from there on, and for packed
checkpoints from the start, modules are replaced on meta and transformers loads the packed tensors itself.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import shutil
import tempfile
import time
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers import HfQuantizer, auto, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.hub import extract_commit_hash

from transformers_mcmoe.config import QUANT_METHOD, MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.distributed import RankDone, World, world
from transformers_mcmoe.kernels import gpu
from transformers_mcmoe.models.experts import Experts, FusedExperts
from transformers_mcmoe.models.names import packed_conversions
from transformers_mcmoe.models.routers import SlicedRouter
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.nn import PackedExperts, PackedLinear
from transformers_mcmoe.nn.checks import check_grids, check_tensors
from transformers_mcmoe.pipeline import Compressed, compress, unread_patterns
from transformers_mcmoe.pipeline.prepare import tokens_for
from transformers_mcmoe.plan import average_bits
from transformers_mcmoe.pruning import (
    recorded_ratios,
    start_expert_pruning,
    start_learned_pruning,
    trained,
    with_thresholds,
)
from transformers_mcmoe.replacement import pack_modules, unpack_modules
from transformers_mcmoe.report import build_report, expert_placement, read_report, write_report
from transformers_mcmoe.routing import ExpertPruning, attached
from transformers_mcmoe.tuning import tune

logger = logging.getLogger(__name__)


class MCMoEHfQuantizer(HfQuantizer):
    """Quantizer backend of `quant_method` "mcmoe".

    Attributes:
        report: the report of the compression, None until it is asked for on a reloaded model.
        commit: of the Hub repository that a packed model was loaded from, None for a folder.
    """

    requires_calibration = False  # True would forbid compression inside from_pretrained
    quantization_config: MCMoEConfig

    def __init__(self, quantization_config: MCMoEConfig, **kwargs: Any) -> None:
        # the plan is written into the config; the user's object stays as it is and may be used again
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.report: dict[str, Any] | None = None
        self.commit: str | None = None
        self._result: Compressed | None = None
        self._work_dir: Path | None = None
        self._packed: dict[str, Experts] = {}
        self._dense: list[str] = []
        self._save_directory: Path | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        config = self.quantization_config
        self._world = World() if self.pre_quantized else world(config.world_size, config.device)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses disk offload while compressing: transformers would offload the dense tensors."""
        compressing = not self.pre_quantized or self._result is not None
        if compressing and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts modules on disk while the model is being compressed; compress it first "
                "(mcmoe compress, or save_pretrained without a device_map) and load the packed checkpoint."
            )

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            raise ValueError("transformers_mcmoe needs the checkpoint's files; a state_dict cannot be compressed.")
        if not self.pre_quantized:
            self._compress(model, checkpoint_files, dtype or torch.get_default_dtype())
        else:
            self.commit = extract_commit_hash(str(checkpoint_files[0]), None)
        structure, self.quantization_config.plan, self._dense = pack_modules(model, self.quantization_config)
        self._packed = structure.experts
        check_tensors(model, structure, checkpoint_files)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        return model

    def _compress(self, model: Any, checkpoint_files: list[str], dtype: torch.dtype) -> None:
        config = self.quantization_config
        if config.work_dir is not None:
            self._work_dir = config.work_dir
        else:
            self._work_dir = Path(self._world.first(lambda: tempfile.mkdtemp(prefix="mcmoe-")))
            if self._world.leads:
                # the packed files stay mapped into memory: they go with the model, or at exit
                weakref.finalize(model, shutil.rmtree, self._work_dir, ignore_errors=True)
        result = compress(model, checkpoint_files, config, dtype=dtype, work_dir=self._work_dir)
        # the loader reads this very list; of two tensors with one name the later file's is taken
        checkpoint_files.extend(str(file) for file in result.files)
        patterns = unread_patterns(Structure(model), result.replaced)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}
        if config.leaves and not self._world.leads:
            if result.teacher is not None:
                result.teacher.hidden.path.unlink(missing_ok=True)  # the first rank tunes
            raise RankDone
        config.plan, self._result = result.plan, result
        self.pre_quantized = True

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Drops the converters that would stack packed experts."""
        return packed_conversions(weight_conversions, self._packed, self._dense)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_grids(model)
        cast_renamed(model, self._dtypes)
        if self._result is not None:
            self.report = build_report(model, self.quantization_config, self._result)
            self.quantization_config.bits = round(average_bits(self._result.matrices), 6)
            self._tune(model, self._result)
            if not self.quantization_config.leaves:
                self._world.barrier()  # all ranks have opened the files, which the first may remove
        self._prune(model)
        if self._result is not None and self.report is not None and self.quantization_config.expert_parallel > 1:
            self.report["expert_parallel"] = expert_placement(self.quantization_config, self._result)
        self._result = None
        _tell_peft()
        model.save_pretrained = types.MethodType(save_pretrained, model)
        model.push_to_hub = types.MethodType(push_to_hub, model)
        return model

    def _tune(self, model: Any, result: Compressed) -> None:
        """Train what is real-valued in the packed model on the dense model's output, if the config asks for it."""
        config, started = self.quantization_config, time.monotonic()
        if result.teacher is None:
            return
        assert self.report is not None
        try:
            self.report["tuning"] = asdict(tune(model, result.teacher, config))
        except ValueError as error:  # hours of work are not thrown away
            logger.warning("The model is compressed, but not tuned: %s", error)
            self.report["fallbacks"].append(f"Not tuned: {error}")
        self.report["seconds"]["tune"] = time.monotonic() - started
        result.teacher.hidden.path.unlink(missing_ok=True)

    def _prune(self, model: Any) -> None:
        """Start the expert pruning that the config asks for, or that the checkpoint was saved with."""
        config, compressed = self.quantization_config, self.report is not None
        odp, otp = asked_pruning(config)
        config.odp = config.otp = None
        try:
            if otp is not None:
                if not otp.trained:
                    otp = trained(model, otp, tokens_for(model, config), config.progress)
                config.otp = start_learned_pruning(model, otp)
            if odp is not None:
                if not odp.calibrated:
                    tokens = tokens_for(model, config) if compressed and odp.layers == "auto" else None
                    odp = with_thresholds(model, odp, recorded_ratios(model), tokens)
                config.odp = start_expert_pruning(model, odp)
        except ValueError as error:
            if not compressed:
                raise
            # hours of work are not thrown away
            logger.warning("The model is compressed, but not pruned: %s", error)
            self.report["fallbacks"].append(f"Not pruned: {error}")  # type: ignore[index]

    @contextmanager
    def saving_to(self, directory: Path) -> Iterator[None]:
        """While open, saving writes the report into a folder."""
        self._save_directory = directory
        try:
            yield
        finally:
            self._save_directory = None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Called in the middle of `save_pretrained`, before files are uploaded: the report goes beside the weights.

        On a GPU the experts of a layer share one allocation, and transformers would clone each of them there.
        """
        if self._save_directory is not None:
            if self.report is None:
                try:
                    self.report = read_report(model)
                except (OSError, ValueError) as error:
                    logger.warning("The saved model gets no report: %s", error)
            if self.report is not None:
                write_report(self.report, self._save_directory)
        state = model.state_dict()
        if {tensor.device.type for tensor in state.values()} & {"cpu", "meta"}:  # nothing, or not all, is on a GPU
            return None, {}
        # only packed matrices: copies of tied weights would no longer be recognized
        return {name: t.to("cpu") if t.dtype == torch.uint8 else t for name, t in state.items()}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # transformers hands over the config's, which saving turns into a string
        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedExperts | PackedLinear) and any(p.is_meta for p in module.parameters()):
                raise ValueError(f"'{path}' is offloaded; load the model without disk offload to dequantize it.")
            if isinstance(module, PackedExperts) and not module.is_plain:
                raise ValueError(f"'{path}' has adapters; call merge_and_unload() or unload() before dequantizing.")
        pruning = attached(model)
        if pruning is not None:
            pruning.detach()
        unpack_modules(model, dtype)
        for name in ("save_pretrained", "push_to_hub"):
            model.__dict__.pop(name, None)
            if any(isinstance(module, SlicedRouter) for module in model.modules()):
                model.__dict__[name] = _refuse_saving
        # names revert by the family's own mapping again, experts included
        model.__dict__.pop("_weight_conversions", None)
        if pruning is not None:
            ExpertPruning(model, pruning.options)
        return model

    def is_serializable(self) -> bool:
        """Packed models can always be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach inputs, biases and everything that is not packed."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Where every MoE layer is one operator; elsewhere the loop over experts depends on the data."""
        plan = self.quantization_config.plan
        if gpu.name() == "triton" and plan is not None and any(any(w.ranks) for w in plan.experts.values()):
            return False  # factors are no part of the operator there
        return all(isinstance(e, FusedExperts) and e.plain_activation() for e in self._packed.values())


def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a packed model: the model's own, with the report beside the weights."""
    with self.hf_quantizer.saving_to(Path(save_directory)):
        return type(self).save_pretrained(self, save_directory, *args, **kwargs)


def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
    """`push_to_hub` of a packed model, see `integrations.hub.push_to_hub`: with tokenizer, report and model card."""
    from transformers_mcmoe.integrations import hub

    return hub.push_to_hub(self, repo_id, **kwargs)


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    """In the place of `save_pretrained` of a model with dropped experts that was dequantized."""
    raise ValueError(
        "This model was dequantized and some of its experts were dropped: routers would find them again once it is loaded. "
        "Save transformers_mcmoe.unpack(packed_model), which renumbers the others."
    )


def _tell_peft() -> None:
    """PEFT takes packed models from now on, where it is installed."""
    if importlib.util.find_spec("peft") is None:
        return
    from transformers_mcmoe.integrations.lora.registration import register

    try:
        register()
    except ImportError as error:
        logger.warning("Adapters are not available: %s", error)


def asked_pruning(config: MCMoEConfig) -> tuple[ODPConfig | None, OTPConfig | None]:
    """The rule that a model is to be pruned by; options of trained routers also where they are off.

    A config that is given beside a packed checkpoint goes before what that was saved with.

    Raises:
        ValueError: learned pruning is asked of a checkpoint without routers.
    """
    odp = config.odp if isinstance(config.odp, ODPConfig) else None
    otp = config.otp if isinstance(config.otp, OTPConfig) else None
    if "otp" in config.asked:
        wanted = config.asked["otp"]
        if isinstance(wanted, OTPConfig):
            if otp is None:
                raise ValueError(
                    "The checkpoint has no pruning routers; load it without otp, and call train_expert_pruning."
                )
            return None, replace(otp, on=True, target=wanted.target or otp.target)
        otp = None if otp is None else replace(otp, on=False)
    if "odp" in config.asked:
        odp = config.asked["odp"] or None
        otp = None if otp is None else replace(otp, on=otp.on and odp is None)
    return odp, otp


def cast_renamed(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters the dtype that the model was asked for in.

    transformers 5.16 leaves those of packed checkpoints whose names it changes, such as routers, in the checkpoint's.
    """
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and not parameter.is_meta and not any(part in name for part in kept):
            parameter.data = parameter.data.to(wanted)


def _accept_beside_packed_checkpoints() -> None:
    """Let options of a config that is given for a packed checkpoint reach it: `MCMoEConfig.get_loading_attributes`.

    transformers asks only the config types in a tuple of its own.
    """
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if types is None:
        raise ImportError(
            f"transformers {transformers.__version__} takes no options for quantized checkpoints where its releases 5.16 "
            "to 5.23 do; install one of those, or update transformers_mcmoe."
        )
    if MCMoEConfig not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, MCMoEConfig)


_accept_beside_packed_checkpoints()
# importing twice (a reload, a second install path) must not fail
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(MCMoEHfQuantizer)
