# SPDX-License-Identifier: Apache-2.0
"""How figures are made: the same drawing as a PNG file, or as SVG for a page that may be wide or narrow, light or dark.

Knows matplotlib, not what is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# text, quiet text, and frames on paper; in a page they are replaced by its own
INK, QUIET, LINE = "#1b1f24", "#57606a", "#c3cad2"
_VARIABLES = {INK: "var(--ink)", QUIET: "var(--quiet)", LINE: "var(--line)"}
# told apart with any kind of colour vision, and readable on white and on near-black
SERIES = ("#2f7ed8", "#d9822b", "#3aa17e", "#b565c9", "#c94f4f", "#7a8a99")
SEQUENTIAL = "viridis"
WIDE, NARROW = 9.0, 4.6


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn in any form.

    Attributes:
        name: stem of its file.
        title: heading, plain text.
        caption: what it shows and how to read it.
        draw: draws into a matplotlib figure; is told whether that is narrow.
        height: inches, when wide.
        narrow_height: inches, when narrow; default `height`.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Any, bool], Any]
    height: float = 3.2
    narrow_height: float | None = None

    def svg(self, narrow: bool = False) -> str:
        """An `<svg>` element whose colours are CSS variables and whose ids no other figure has."""
        with _look():
            figure = _figure(NARROW if narrow else WIDE, self._height(narrow))
            self.draw(figure, narrow)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, variable)
        mark = f"{self.name}-{'n' if narrow else 'w'}-"
        text = re.sub(r'\bid="', f'id="{mark}', text)
        text = re.sub(r'href="#', f'href="#{mark}', text)
        text = re.sub(r"url\(#", f"url(#{mark}", text)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, flags=re.DOTALL)
        return text.replace('role="img">', f'role="img" aria-label="{_escaped(self.title)}">', 1)

    def png(self, path: str | Path) -> None:
        """Write it as a PNG file on white."""
        with _look():
            figure = _figure(WIDE, self._height(False))
            self.draw(figure, False)
            figure.suptitle(self.title, fontsize=11, color=INK)
            figure.savefig(path, format="png", dpi=150, facecolor="white")

    def _height(self, narrow: bool) -> float:
        return self.narrow_height if narrow and self.narrow_height is not None else self.height


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _look() -> Any:
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("Figures need matplotlib; pip install transformers-mcmoe[plots].") from error
    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "mcmoe",
            "font.size": 9,
            "font.family": "DejaVu Sans",
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 9,
            "axes.edgecolor": LINE,
            "axes.facecolor": "none",
            "xtick.color": LINE,
            "ytick.color": LINE,
            "xtick.labelcolor": QUIET,
            "ytick.labelcolor": QUIET,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "grid.color": LINE,
            "grid.linewidth": 0.4,
        }
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")  # no window system, no global state


def figure_of(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, in matplotlib's own look."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("Figures need matplotlib; pip install transformers-mcmoe[plots].") from error
    figure = Canvas(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure into a file; its suffix says which format."""
    figure.savefig(path, dpi=150)
