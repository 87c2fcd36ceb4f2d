# SPDX-License-Identifier: Apache-2.0
"""What every training on a model's output shares: frozen parameters, and the divergence of two sets of logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence in nats per token of two sets of logits [.., V]."""
    teacher, student = (logits.flatten(0, -2).log_softmax(-1) for logits in (teacher, student))
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """While open, a model is in evaluation mode and its parameters take no gradients."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad = True
