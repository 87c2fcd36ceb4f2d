# SPDX-License-Identifier: Apache-2.0
"""Figures (extra `plots`): `pruning` of what expert pruning skips, `compression` of a report and its
evaluation, `comparison` of two.

`drawing` is the only file that knows matplotlib; what is shown is measured elsewhere.
"""

from transformers_mcmoe.integrations.plots.comparison import comparison_figures
from transformers_mcmoe.integrations.plots.compression import report_figures, runs_figure
from transformers_mcmoe.integrations.plots.drawing import Figure
from transformers_mcmoe.integrations.plots.pruning import plot_expert_pruning, plot_quality_against_rate

__all__ = [
    "Figure",
    "comparison_figures",
    "plot_expert_pruning",
    "plot_quality_against_rate",
    "report_figures",
    "runs_figure",
]
