"""One self-contained HTML page about one decision, its pictures for a flow's UI, and what both are made of.

The page needs no script and no network: styles, plots (SVG) and pictures are inside it. What a person in a hurry asks
comes first: decision, reason, losses and wins, cost, next command. Every plot has a caption that says what to conclude,
made from the numbers. Only this module imports jinja2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from graceful.evaluation.captions import (
    curve_caption,
    duration,
    flips_caption,
    matrix_caption,
    metric_name,
    moment,
    nfr_caption,
    no_curve_caption,
    number,
    percent,
    points,
    reason_row,
    share_text,
)
from graceful.evaluation.decision import Decision
from graceful.evaluation.evidence import NFR_FAMILIES, OVERALL, Evidence, PairedDifference, StateEvidence
from graceful.evaluation.headline import headline, in_words
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.matrix import CompatibilityMatrix
from graceful.evaluation.outcomes import SERVED, Outcomes, compare
from graceful.evaluation.plots import (
    ForestRow,
    Plot,
    cost_figure,
    curve_figure,
    flips_figure,
    forest_figure,
    heatmap,
    matrix_figure,
    png,
    svg,
)
from graceful.evaluation.policy import RolloutPolicy, verdict_not_above, verdict_not_below
from graceful.evaluation.ways import CARRIED_OUT, Curve, LivedStates, curves, is_whole_gallery, lived_states

TEMPLATE = "report.html.j2"
MAX_FOREST_ROWS = 16
"""Scopes that a plot shows, the worst; all of them stand in the table below it."""


MAX_OPEN = 6
"""Guards that are said in words where they do not pass; the table below has all."""


CAUSE_TEXTS = {
    "model": "also fail in a gallery of the candidate alone",
    "mixed gallery": "only because older vectors are still there",
    "unreadable rows": "because what answers them cannot be read",
    "approximate index": "more because the index that serves is not exact",
}


@dataclass(frozen=True)
class Section:
    """A part of the page that others fill: a text, a figure (SVG markup made here), rows of a table."""

    title: str
    text: str = ""
    figure: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A small picture inside the page, and the digest of what it was made from, by which it can be taken out again."""

    data_uri: str
    content_sha256: str


@dataclass(frozen=True)
class FlipCard:
    """One search that works now and would fail. Pictures are None where there are none, or where they are private."""

    query: str
    identity: str
    rank_before: int
    rank_after: int | None
    right_item: str | None
    wrong_item: str | None
    wrong_identity: str | None
    wrong_owner: str | None
    margin: float | None
    cause: str
    query_picture: Picture | None = None
    right_picture: Picture | None = None
    wrong_picture: Picture | None = None


@dataclass(frozen=True)
class FlipExplorer:
    """Flips of the worst state that users live through: how many, why, and the worst of them to look at."""

    num_flips: int
    causes: Mapping[str, int]
    cards: Sequence[FlipCard]
    num_open: int = 6


def render_report(
    evidence: Evidence,
    decision: Decision,
    policy: RolloutPolicy,
    *,
    matrix: CompatibilityMatrix,
    nfr: NDArray[np.float64] | None = None,
    outcomes: Outcomes | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    explorer: FlipExplorer | None = None,
    files: Sequence[str] = (),
    sections: Sequence[Section] = (),
    appendix: Sequence[Section] = (),
) -> str:
    """Render the page.

    `nfr` (G, G) is the NFR between the matrix' generations, row = before. `outcomes` gives slices, and the bounds of
    what users win. `explorer` shows lost searches; `files` are names of files beside the page to link to. `sections`
    come after the slices, `appendix` after the generations, each in their order; `lineage` rows become a table.
    """
    lived = lived_states(evidence, decision, policy)
    measured = curves(evidence, outcomes, policy)
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            evidence=evidence,
            decision=decision,
            policy=policy.model_dump(mode="json"),
            metric=metric_name(evidence),
            head=headline(evidence, decision, policy, outcomes),
            num_identities=max((state.num_clusters for state in evidence.states), default=None),
            guards_=_guards(evidence, decision),
            confidence={"quality": 1 - evidence.alpha, "flips": 1 - evidence.alpha / NFR_FAMILIES},
            forests=_forests(evidence, lived, policy),
            ways=_ways(evidence, decision, policy, measured, lived),
            explorer=explorer,
            cause_texts=CAUSE_TEXTS,
            files=files,
            worst_when=None if lived.worst is None else moment(lived.worst.fraction),
            slices=_slices(evidence, policy, outcomes, lived),
            cost=_cost(evidence, decision, measured),
            matrices=_matrices(matrix, nfr, metric_name(evidence)),
            sections=[_shown(section) for section in sections],
            appendix=[_shown(section) for section in appendix],
            lineage=_table(lineage),
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "points": points, "percent": percent, "number": number, "duration": duration, "share": share_text,
        "tail": lambda name: name.rpartition("/")[2],
    }  # fmt: skip
    return environment


def report_document(
    evidence: Evidence,
    decision: Decision,
    policy: RolloutPolicy,
    outcomes: Outcomes | None = None,
    explorer: FlipExplorer | None = None,
) -> dict[str, Any]:
    """The figures of the page as JSON: head, guards, curves, slices, flips. Shares are in [0, 1]."""
    head, lived = headline(evidence, decision, policy, outcomes), lived_states(evidence, decision, policy)
    stages = [
        {
            "title": stage.title, "state": stage.state.state, "fraction": stage.state.fraction,
            "lost": stage.lost, "lost_at_most": stage.lost_at_most, "won": stage.won,
            "won_at_least": stage.won_at_least, "baseline": stage.state.baseline, "value": stage.state.value,
        }
        for stage in head.stages
    ]  # fmt: skip
    known = outcomes is not None and lived.worst is not None and {SERVED, lived.worst.state} <= set(outcomes.states)
    slices = slice_rows(evidence, policy, outcomes, lived.worst) if known and outcomes and lived.worst else []
    return {
        "format_version": 1,
        "outcome": decision.outcome,
        "candidate": decision.candidate,
        "champion": decision.champion,
        "title": head.title,
        "why": head.why,
        "per_10000_searches": stages,
        "would_be": head.would_be,
        "cost": head.cost,
        "next": [{"purpose": step.purpose, "command": step.command} for step in head.next_steps],
        "guards": {"num": len(decision.reasons), "num_passed": sum(r.verdict == "PASS" for r in decision.reasons)},
        "curves": [
            {"title": curve.title, "points": [point._asdict() for point in curve.points]}
            for curve in curves(evidence, outcomes, policy)
        ],
        "slices": slices,
        "flips": None if explorer is None else {"num": explorer.num_flips, "causes": dict(explorer.causes)},
    }


def matrix_png(matrix: CompatibilityMatrix, *, dpi: int = 160) -> bytes:
    """Heat map of a compatibility matrix in per cent, the criterion marked; NaN is left blank."""
    return png(matrix_figure(matrix), dpi)


def decision_pngs(
    evidence: Evidence, decision: Decision, policy: RolloutPolicy, outcomes: Outcomes | None = None, *, dpi: int = 160
) -> dict[str, bytes]:
    """The figures that a decision rests on, by title, as the page has them: limits, quality and flips on the way."""
    lived, measured = lived_states(evidence, decision, policy), curves(evidence, outcomes, policy)
    drawn = [*_forests(evidence, lived, policy), *_ways(evidence, decision, policy, measured, lived)]
    return {one.title: png(one.figure, dpi) for one in drawn}


def slice_rows(
    evidence: Evidence, policy: RolloutPolicy, outcomes: Outcomes, state: StateEvidence
) -> list[dict[str, Any]]:
    """Every value of every slice in one state: right now and then, lost with its bounds, won; most lost first.

    The bounds hold for each row by itself: among many slices some are far off by chance.
    """
    rows = []
    for name in sorted(outcomes.slices):
        column = outcomes.slices[name]
        for value in sorted(set(column.tolist()) - {""}):
            pair = compare(outcomes, SERVED, state.state, k=evidence.k, within=column == value)
            if not len(pair.before):
                continue
            lost, won = pair.right_before & ~pair.right_after, ~pair.right_before & pair.right_after
            bounds = share_bounds(lost, outcomes.clusters[pair.counted], evidence.alpha / NFR_FAMILIES)
            rows.append(
                {
                    "slice": f"{name}={value}",
                    "guarded": name in policy.required_slices or f"{name}={value}" in policy.required_slices,
                    "n": bounds.num_queries,
                    "effective_n": bounds.effective_n,
                    "right_now": float(pair.right_before.mean()),
                    "right_then": float(pair.right_after.mean()),
                    "nfr": bounds.value,
                    "nfr_lower": bounds.lower,
                    "nfr_upper": bounds.upper,
                    "pfr": float(won.mean()),
                }
            )
    return sorted(rows, key=lambda row: (-row["nfr"], row["slice"]))


@dataclass(frozen=True)
class _Drawn:
    """A figure with its title and what to conclude from it."""

    title: str
    figure: Plot
    caption: str

    @property
    def svg(self) -> str:
        return svg(self.figure, self.title)


def _guards(evidence: Evidence, decision: Decision) -> dict[str, Any]:
    """Every guard as a row: how many pass, those that do not, all of them; the decisive ones first."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, reason in enumerate(decision.reasons):
        row = {**reason_row(reason, evidence), "decisive": place < decision.num_decisive}
        key = tuple(row[name] for name in ("guard", "where", "limit", "value", "bound", "n", "verdict"))
        known = rows.setdefault(key, {**row, "times": 0})
        known["times"] += 1
    found = list(rows.values())
    left = [reason for reason in decision.reasons if reason.verdict != "PASS"]
    open_ones = {in_words(reason, evidence): reason.verdict for reason in left}
    return {
        "num": len(decision.reasons),
        "num_passed": sum(reason.verdict == "PASS" for reason in decision.reasons),
        "open": [(verdict, said) for said, verdict in open_ones.items()][:MAX_OPEN],
        "num_more": max(0, len(open_ones) - MAX_OPEN),
        "all": found,
    }


def _forests(evidence: Evidence, lived: LivedStates, policy: RolloutPolicy) -> list[_Drawn]:
    """Guards against their limits, each scope in the worst of the states that are lived through."""
    fractions = {state.fraction for state in lived.states}
    pool = evidence.hoped_states if lived.would_be and _is_hoped(evidence, lived) else evidence.states
    states = [state for state in pool if state.fraction in fractions]
    if not states:
        return []
    drawn, scopes = [], list(dict.fromkeys(state.scope for state in states))
    losses, quality = [], []
    for scope in scopes:
        inside = [state for state in states if state.scope == scope]
        most = max(inside, key=lambda s: 1.0 if s.nfr_upper is None else s.nfr_upper)
        if most.nfr is not None:
            verdict = (
                "" if policy.nfr_limit is None else verdict_not_above(most.nfr_lower, most.nfr_upper, policy.nfr_limit)
            )
            losses.append(ForestRow(_label(scope, most), most.nfr, most.nfr_lower, most.nfr_upper, verdict))
        least = min(inside, key=lambda s: -1.0 if s.difference_lower is None else s.difference_lower)
        if least.difference is not None:
            quality.append(_quality_row(_label(scope, least), least, policy))
    for item in evidence.certificates:
        if item.difference is not None:
            quality.append(_quality_row(f"on vectors of {item.gallery_generation.partition('-')[0]}", item, policy))
    if losses:
        title = "Searches that work now and would fail"
        limit = "" if policy.nfr_limit is None else f"The dashed line is the limit, {share_text(policy.nfr_limit)}."
        figure = forest_figure(_worst(losses, lower_is_worse=False), policy.nfr_limit, "per cent", good_side="left")
        drawn.append(_Drawn(title, figure, limit))
    if quality:
        margin = policy.quality_margin_points
        title = f"{metric_name(evidence)} against what is served now"
        limit = "" if margin is None else f"The dashed line is the limit, {points(-margin / 100)} points."
        figure = forest_figure(
            _worst(quality, lower_is_worse=True), None if margin is None else -margin / 100, "points", good_side="right"
        )
        drawn.append(_Drawn(title, figure, limit))
    return drawn


def _is_hoped(evidence: Evidence, lived: LivedStates) -> bool:
    return any(state in evidence.hoped_states for state in lived.states)


def _label(scope: str, state: StateEvidence) -> str:
    where = "everything" if state.state == "fraction/1" else share_text(state.fraction)
    return f"{'all searches' if scope == OVERALL else scope}\n{where} re-embedded"


def _quality_row(label: str, item: PairedDifference, policy: RolloutPolicy) -> ForestRow:
    margin = policy.quality_margin_points
    lower, upper = item.difference_lower, item.difference_upper
    verdict = "" if margin is None else verdict_not_below(lower, upper, -margin / 100)
    return ForestRow(label, item.difference or 0.0, lower, upper, verdict)


def _worst(rows: Sequence[ForestRow], *, lower_is_worse: bool) -> list[ForestRow]:
    """The first row, which is about everything, and the worst of the others."""
    others = sorted(rows[1:], key=lambda row: row.value if lower_is_worse else -row.value)
    return [*rows[:1], *others[: MAX_FOREST_ROWS - 1]]


def _ways(
    evidence: Evidence, decision: Decision, policy: RolloutPolicy, measured: Sequence[Curve], lived: LivedStates
) -> list[_Drawn]:
    """Quality and flips while the gallery is re-embedded."""
    overall = [state for state in evidence.states if state.scope == OVERALL]
    if not overall or overall[0].baseline is None:
        return []
    last, metric, whole = overall[-1], metric_name(evidence), is_whole_gallery(evidence)
    chosen = decision.fraction if decision.outcome in CARRIED_OUT and not whole else None
    caption = no_curve_caption(last, measured) if whole else curve_caption(overall, decision, policy)
    figure = curve_figure(measured, overall[0].baseline, chosen, last.value, metric)
    title = f"{metric}: everything is re-embedded first" if whole else f"{metric} while the gallery is re-embedded"
    drawn = [_Drawn(title, figure, caption)]
    if measured:
        figure = flips_figure(measured, policy.nfr_limit, chosen)
        caption = flips_caption(lived.states or overall, policy)
        drawn.append(_Drawn("Searches lost and won on the way", figure, caption))
    return drawn


def _slices(
    evidence: Evidence, policy: RolloutPolicy, outcomes: Outcomes | None, lived: LivedStates
) -> dict[str, Any] | None:
    """Slices in the worst state that users live through, as a plot and as rows."""
    state = lived.worst
    if outcomes is None or state is None or not {SERVED, state.state} <= set(outcomes.states):
        return None
    rows = slice_rows(evidence, policy, outcomes, state)
    if not rows:
        return None
    shown = [
        ForestRow(
            f"{row['slice']}\nn {row['n']:,}", row["nfr"], row["nfr_lower"], row["nfr_upper"],
            verdict_not_above(row["nfr_lower"], row["nfr_upper"], policy.nfr_limit)
            if row["guarded"] and policy.nfr_limit is not None else "",
        )
        for row in rows[:MAX_FOREST_ROWS]
    ]  # fmt: skip
    figure = forest_figure(shown, policy.nfr_limit, "per cent of the searches lost", good_side="left")
    return {"rows": rows, "when": moment(state.fraction), "svg": svg(figure, "Searches lost by slice")}


def _cost(evidence: Evidence, decision: Decision, measured: Sequence[Curve]) -> dict[str, Any] | None:
    """What every fraction costs; against quality where there is a curve."""
    if not evidence.costs:
        return None
    chosen = decision.fraction if decision.outcome in CARRIED_OUT else None
    plot = ""
    if measured and not is_whole_gallery(evidence):
        figure = cost_figure(evidence.costs, measured[0], chosen, metric_name(evidence))
        plot = svg(figure, "Cost against quality")
    return {"rows": evidence.costs, "inputs": evidence.cost_inputs, "svg": plot}


def _matrices(matrix: CompatibilityMatrix, nfr: NDArray[np.float64] | None, metric: str) -> list[_Drawn]:
    drawn = [_Drawn(f"Quality matrix: {metric} in per cent", matrix_figure(matrix), matrix_caption(matrix))]
    if nfr is not None and len(matrix.generations) > 1:
        names = matrix.generations
        figure = heatmap(nfr, names, names, "wrong with", "right with", "Reds")
        title = "Negative flips between generations, each on its own gallery, in per cent of queries"
        drawn.append(_Drawn(title, figure, nfr_caption(nfr, names)))
    return drawn


def _shown(section: Section) -> dict[str, Any]:
    return {**vars(section), "table": _table(section.rows) if section.rows else None}


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return {"columns": columns, "rows": [[number(row.get(column)) for column in columns] for row in rows]}
