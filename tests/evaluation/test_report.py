"""The report: one page that needs nothing else, for every outcome."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

from graceful.evaluation import report
from graceful.evaluation.captions import matrix_markdown
from graceful.evaluation.cost import CostInputs
from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.flips import nfr_matrix
from graceful.evaluation.headline import decision_markdown, headline
from graceful.evaluation.matrix import CompatibilityMatrix, matrix_from_outcomes
from graceful.evaluation.outcomes import Outcomes
from graceful.evaluation.policy import RolloutPolicy
from tests.evaluation.conftest import gather

Plant = Callable[..., Outcomes]
POLICY = RolloutPolicy(num_resamples=200, required_slices=("camera=night",))
MATRIX = CompatibilityMatrix(("g1", "g2"), np.array([[0.6, np.nan], [0.58, 0.7]]))
PNG = b"\x89PNG\r\n\x1a\n"


def judged(outcomes: Outcomes, policy: RolloutPolicy = POLICY, **kwargs: object) -> tuple[Evidence, Decision]:
    evidence = gather(outcomes, policy, **kwargs)
    return evidence, decide(evidence, policy)


@pytest.fixture
def outcomes(planted: Plant) -> Outcomes:
    return planted(losses=5, wins=100, slices={"camera": np.resize(["day", "night"], 4000)})


class Tags(HTMLParser):
    """Collects what a browser would fetch, and checks that tags close."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(outcomes: Outcomes) -> None:
    evidence, decision = judged(outcomes, cost=CostInputs(rows_per_s=100, num_rows=1000))
    page = report.render_report(
        evidence,
        decision,
        POLICY,
        matrix=MATRIX,
        nfr=nfr_matrix(outcomes, ["served", "fraction/1"]),
        outcomes=outcomes,
        lineage=[{"generation": "g1", "event": "BOOTSTRAP"}, {"generation": "g2", "seconds": 1.5}],
        sections=[
            report.Section("Training", "Six <epochs>."),
            report.Section("Throughput", rows=[{"stage": "decode", "rows_per_s": 5200}], folded=True),
        ],
    )
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched == []
    assert not {"script", "link", "img", "iframe"} & tags.names
    assert "@import" not in page
    assert "url(http" not in page
    for text in (
        "COMPATIBLE ROLLOUT 0 %", "Serve g2 now, on the gallery as it is",
        "camera=night", "guarded", "unavailable", "Six &lt;epochs&gt;.", "5,200", "BOOTSTRAP",
        "quality_margin_points",
    ):  # fmt: skip
        assert text in page


def test_decision_and_reasons_come_before_plots(outcomes: Outcomes) -> None:
    evidence, decision = judged(outcomes)
    page = report.render_report(evidence, decision, POLICY, matrix=MATRIX)
    order = ("<h1>", "Of 10,000 searches", "guards pass", "<svg", "-0.50 points", "Lineage")
    places = [page.index(text) for text in order]
    assert places == sorted(places)


def test_the_same_evidence_gives_the_same_page(outcomes: Outcomes) -> None:
    evidence, decision = judged(outcomes)
    pages = {report.render_report(evidence, decision, POLICY, matrix=MATRIX, outcomes=outcomes) for _ in range(2)}
    assert len(pages) == 1


def test_every_outcome_has_a_page(planted: Plant) -> None:
    policy = RolloutPolicy(num_resamples=200)
    mixed = dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 300)
    cases: dict[str, tuple[Outcomes, dict[str, object]]] = {
        "BOOTSTRAP": (planted(num_queries=20), {"champion": None, "live_owners": {}}),
        "FULL_BACKFILL": (planted(losses=mixed, wins=100), {}),
        "HOLD": (planted(losses=300), {}),
        "INCONCLUSIVE": (planted(num_queries=100), {}),
    }
    for outcome, (outcomes, fields) in cases.items():
        evidence, decision = judged(outcomes, policy, **fields)
        assert decision.outcome == outcome
        matrix = matrix_from_outcomes(outcomes, ["g2"] if outcome == "BOOTSTRAP" else ["g1", "g2"])
        page = report.render_report(evidence, decision, policy, matrix=matrix, outcomes=outcomes)
        assert outcome.replace("_", " ") in page
        assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower()


def test_missing_evidence_has_a_page(planted: Plant) -> None:
    outcomes = planted(num_queries=10)
    bare = Outcomes(outcomes.query_ids, outcomes.identities, outcomes.clusters, {}, {}, {})
    evidence, decision = judged(bare)
    page = report.render_report(evidence, decision, POLICY, matrix=matrix_from_outcomes(bare, ["g1", "g2"]))
    assert "missing" in page
    assert "not measured" not in page.split("guards pass")[0]


def test_pictures_for_a_flow_are_png(outcomes: Outcomes) -> None:
    evidence, decision = judged(outcomes)
    assert report.matrix_png(MATRIX).startswith(PNG)
    assert report.matrix_png(CompatibilityMatrix(("a",), np.full((1, 1), np.nan))).startswith(PNG)
    pictures = report.decision_pngs(evidence, decision, POLICY, outcomes)
    assert len(pictures) == 4
    assert all(picture.startswith(PNG) for picture in pictures.values())


def test_markdown_tables_hold_the_matrix_and_the_decisive_guards(outcomes: Outcomes) -> None:
    text = matrix_markdown(MATRIX)
    assert "| g2 | 58.0 (x) | 70.0 |" in text
    assert "AC 0.00" in text
    evidence, decision = judged(outcomes)
    text = decision_markdown(headline(evidence, decision, POLICY, outcomes), decision, evidence)
    assert text.startswith("## COMPATIBLE_ROLLOUT: Serve g2 now")
    assert "| quality | all searches, with nothing re-embedded yet | -0.50 points | +2.38 points |" in text
    assert "| At once: with nothing re-embedded yet | 12, at most 29 | 250, at least " in text


def test_captions_name_the_worst_pair_and_the_worst_update() -> None:
    assert "g2 on the gallery of g1 (-2.0 points)" in report.matrix_caption(MATRIX)
    pairs = report.nfr_caption(np.array([[0, 0.03, 0.05], [0, 0, 0.01], [0, 0, 0]]), ["a", "b", "c"])
    assert "from a to b broke the most: 3.0 %" in pairs
    one = CompatibilityMatrix(("g1",), np.array([[0.5]]))
    assert "undefined" in report.matrix_caption(one)
