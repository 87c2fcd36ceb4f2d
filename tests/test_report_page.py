# SPDX-License-Identifier: Apache-2.0
"""The report page as a browser shows it, wide and narrow, light and dark: nothing cut, nothing over another, no network."""

import json
import re
import shutil
from pathlib import Path

import pytest
from page_data import report_and_record

from transformers_mcmoe.integrations.plots.comparison import layer_correlations, rank_correlation
from transformers_mcmoe.integrations.plots.drawing import INK, LINE, QUIET
from transformers_mcmoe.report.page import Run, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# of every figure that is shown: texts that leave their figure, and texts that lie over each other
TEXTS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const name = svg.closest('figure').id;
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.push(`${name}: '${text}' is cut`);
      for (const [other, b] of boxes.slice(i + 1)) {
        const wide = Math.min(box.right, b.right) - Math.max(box.left, b.left);
        const high = Math.min(box.bottom, b.bottom) - Math.max(box.top, b.top);
        if (wide > 1 && high > 0.35 * Math.min(box.height, b.height)) found.push(`${name}: '${text}' lies over '${other}'`);
      }
    });
  }
  for (const e of document.querySelectorAll('body *:not(svg *)'))
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline') found.push(`${e.tagName} ${e.className} overflows`);
  return found;
}"""
# texts outside heat maps and their background, as [r, g, b]
COLOURS = """() => {
  const rgb = c => (c.match(/[\\d.]+/g) || []).slice(0, 3).map(Number);
  const ground = rgb(getComputedStyle(document.body).backgroundColor);
  const found = [];
  for (const e of document.querySelectorAll('p, h1, h2, h3, td, th, dt, dd, figcaption, pre, svg text')) {
    if (!e.getBoundingClientRect().width || (e.closest('figure') || {}).id === 'needle') continue;
    const style = getComputedStyle(e);
    const box = e.closest('.tiles div, pre');
    found.push([rgb(e.closest('svg') ? style.fill : style.color), box ? rgb(getComputedStyle(box).backgroundColor) : ground, e.textContent.slice(0, 30)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = [Run(name, *report_and_record(seed)) for seed, name in enumerate(("Mixtral-8x7B-2.54bit", "again"))]
    written = write_page(runs, folder / "report.html", compare=(runs[0], runs[1]), figures=folder / "figures")
    return written


def test_files(page):
    names = {path.name for path in page}
    figures = {
        "frequency",
        "weight",
        "error",
        "bits",
        "coverage",
        "buildup",
        "size",
        "pruning",
        "classes",
        "needle",
        "runs",
    }
    figures |= {f"compare-{name}" for name in ("frequency", "weight", "error", "bits", "layers")}
    assert names == {"report.html", *(f"{name}.png" for name in figures)}
    for path in page[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 4000
    text = page[0].read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text.replace("http://www.w3.org/1999/xlink", ""))
    assert not any(colour in text.partition("</style>")[2] for colour in (INK, QUIET, LINE))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def _luminance(colour):
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a, b):
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(page, width, scheme):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab = context.new_page()
        requests, errors = [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: errors.append(message.text))
        tab.goto(page[0].as_uri())
        assert requests == [page[0].as_uri()]
        assert errors == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(TEXTS) == []
        shown = tab.evaluate(
            "[...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().width).length"
        )
        assert shown == len(page) - 1
        colours = tab.evaluate(COLOURS)
        faint = [(text, _contrast(ink, ground)) for ink, ground, text in colours if _contrast(ink, ground) < 4.5]
        assert faint == []
        assert len(colours) > 100
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (_luminance([int(n) for n in re.findall(r"\d+", background)[:3]]) > 0.5) == (scheme == "light")
        browser.close()


def test_rank_correlation():
    assert rank_correlation([[1, 2, 3]], [[10, 20, 30]]) == pytest.approx(1)
    assert rank_correlation([[1, 2, 3]], [[3, 2, 1]]) == pytest.approx(-1)
    # scipy.stats.spearmanr([1, 2, 2, 4], [1, 3, 2, 2]) with ties
    assert rank_correlation([[1, 2], [2, 4]], [[1, 3], [2, 2]]) == pytest.approx(0.5)
    assert rank_correlation([[1, 1]], [[1, 2]]) is None
    a, b = report_and_record(0)[0], report_and_record(1)[0]
    assert len(layer_correlations(a, b)) == len(a["coverage"])


def test_other_models_are_not_compared(tmp_path):
    a, b = report_and_record(0), report_and_record(0, experts=4)
    runs = [Run("a", *a), Run("b", *b)]
    with pytest.raises(ValueError, match="'a' and 'b' are of models with different experts"):
        write_page(runs[:1], tmp_path / "x.html", compare=(runs[0], runs[1]))


def test_a_run_that_was_never_evaluated(tmp_path):
    """An old report without parts, and no record."""
    report, _ = report_and_record(0)
    report = json.loads(json.dumps(report))
    del report["sizes"]["parts"], report["calibration_source"], report["dtype"]
    report["coverage"] = {}
    report["errors"] = {}
    written = write_page([Run("bare", report, {})], tmp_path / "bare.html", figures=tmp_path / "figures")
    assert {path.name for path in written} == {"bare.html", "bits.png"}
    assert "nan" not in Path(written[0]).read_text(encoding="utf-8").lower().replace("nanosecond", "")
