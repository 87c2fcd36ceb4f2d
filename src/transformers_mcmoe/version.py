# SPDX-License-Identifier: Apache-2.0
"""The package's version, as installed, and those of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_DEPENDENCIES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")

try:
    __version__ = version("transformers-mcmoe")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that compute."""
    libraries = {name: version(name) for name in _DEPENDENCIES}
    return {"transformers_mcmoe": __version__, "python": platform.python_version(), **libraries}
