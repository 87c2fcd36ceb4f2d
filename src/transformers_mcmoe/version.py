# SPDX-License-Identifier: Apache-2.0
"""The package's version, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("transformers-mcmoe")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
