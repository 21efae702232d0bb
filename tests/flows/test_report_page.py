"""The report of every outcome in a real browser, on a desk and on a phone: what fits, what is legible, what it asks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from graceful.evaluation.cost import CostInputs
from graceful.evaluation.decision import decide
from graceful.evaluation.matrix import CompatibilityMatrix
from graceful.evaluation.outcomes import Outcomes
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.report import render_report
from graceful.flows.settings.config import ReportConfig
from graceful.flows.store.evaluations import FLIPS
from graceful.flows.update.explorer import explore
from tests.evaluation.conftest import gather, plant
from tests.flows.browsing import NEEDS_BROWSER, open_browser, visit

pytestmark = [pytest.mark.timeout(300), *NEEDS_BROWSER]

POLICY = RolloutPolicy(num_resamples=200, required_slices=("camera",))
MIXED = dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 300)
SIZES = {"desk": (1280, 800), "phone": (400, 850)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BOOTSTRAP": ({"num_queries": 20}, {"champion": None, "live_owners": {}}),
    "COMPATIBLE_ROLLOUT": ({"losses": {0.0: 15, 0.05: 12, 1.0: 3}, "wins": 100}, {}),
    "FULL_BACKFILL": ({"losses": MIXED, "wins": 100}, {}),
    "HOLD": ({"losses": 300, "wins": 50}, {}),
    "INCONCLUSIVE": ({"num_queries": 100, "losses": 1, "wins": 3}, {}),
}
LOW_CONTRAST = """() => {
  const channel = value => (value /= 255, value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const found = parts(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *:not(svg *)')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page for every outcome, with flips of pictures that exist."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("search", "right", "wrong"):
        draw = np.random.default_rng(len(name))
        Image.fromarray(draw.integers(0, 255, (300, 200, 3), np.uint8)).save(folder / f"{name}.png")
    pages = {}
    for outcome, (planted, asked) in CASES.items():
        outcomes = plant(**planted)
        cameras = np.resize(
            ["day", "night", "a camera with a very long name that nobody would have thought of"], len(outcomes)
        )
        outcomes = Outcomes(
            outcomes.query_ids, outcomes.identities, outcomes.clusters, {"camera": cameras}, outcomes.first_rank,
            outcomes.average_precision,
        )  # fmt: skip
        evidence = gather(outcomes, POLICY, cost=CostInputs(rows_per_s=100, num_rows=10_000), **asked)
        decision = decide(evidence, POLICY)
        assert decision.outcome == outcome
        flips = [
            {
                "query": str(folder / "search.png"), "identity": f"person {number}", "state": "fraction/0",
                "rank_before": 1, "rank_after": 2 + number, "right_item": str(folder / "right.png"),
                "right_owner": "g1", "wrong_item": str(folder / "wrong.png"), "wrong_identity": "another",
                "wrong_owner": "g1", "margin": 0.1, "cause": "mixed gallery",
            }
            for number in range(9)
        ]  # fmt: skip
        table = pa.Table.from_pylist(flips, schema=FLIPS)
        pages[outcome] = folder / f"{outcome}.html"
        pages[outcome].write_text(
            render_report(
                evidence,
                decision,
                POLICY,
                matrix=CompatibilityMatrix(("g1", "g2"), np.array([[0.6, np.nan], [0.58, 0.7]])),
                outcomes=outcomes,
                explorer=None if outcome == "BOOTSTRAP" else explore(table, "fraction/0", ReportConfig()),
                lineage=[{"generation": "g1", "event": "promoted", "what": "x" * 300}],
                files=["report.json"],
            )
        )
    return pages


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("outcome", CASES)
def test_a_report_fits_reads_well_and_asks_nobody(
    browser: Any, pages: dict[str, Path], tmp_path: Path, outcome: str, size: str
) -> None:
    width, height = SIZES[size]
    seen = visit(browser, pages[outcome].as_uri(), width, height, offline=True)
    page = seen.page
    page.goto(pages[outcome].as_uri())
    page.wait_for_load_state("networkidle")
    bottom = page.evaluate("document.getElementById('head').getBoundingClientRect().bottom")
    assert bottom <= height, "the head fits the first screen"
    before = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().top < 2000).length"
    )
    assert outcome == "BOOTSTRAP" or before >= 2, "figures come soon, not after a long table"
    page.screenshot(path=tmp_path / f"{outcome}-{size}.png", full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scroll, also with all opened"
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length") == 0
    assert page.evaluate("document.images.length") == (0 if outcome == "BOOTSTRAP" else 27)
    assert page.evaluate("document.scripts.length") == 0
    assert page.evaluate("[...document.querySelectorAll('svg')].every(e => e.getAttribute('aria-label'))")
    assert seen.errors == []
    assert seen.outside == []
    page.close()
