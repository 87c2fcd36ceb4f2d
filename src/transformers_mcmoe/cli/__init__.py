# SPDX-License-Identifier: Apache-2.0
"""The command `mcmoe`. The only package that prints; what its commands do is elsewhere and can be called from Python.

`command` has what they share, `console` what they show, `options` those of a compression; every other file is a command.
"""

from transformers_mcmoe.cli import planning, compress, inspect, evaluate, report, push, export, serve, generate  # noqa: F401, I001  (help lists commands in this order)
from transformers_mcmoe.cli.command import app

__all__ = ["app"]
