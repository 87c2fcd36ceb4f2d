# SPDX-License-Identifier: Apache-2.0
"""The report of a compression: what the pipeline measured, as JSON beside the weights and as a page to look at.

`building` makes and reads it, `page` draws it together with what `mcmoe evaluate` found.
"""

from transformers_mcmoe.report.building import (
    REPORT_NAME,
    build_report,
    compression_report,
    expert_placement,
    load_report,
    read_report,
    write_report,
)

__all__ = [
    "REPORT_NAME",
    "build_report",
    "compression_report",
    "expert_placement",
    "load_report",
    "read_report",
    "write_report",
]
