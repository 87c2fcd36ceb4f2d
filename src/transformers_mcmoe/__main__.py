# SPDX-License-Identifier: Apache-2.0
"""`python -m transformers_mcmoe` is the command `mcmoe`. Knows nothing but where the command line is."""

from transformers_mcmoe.cli import app

if __name__ == "__main__":
    app(prog_name="mcmoe")
