"""What consumers of scores and clusters would see, as tables of the report; nothing where nothing was measured."""

from collections.abc import Callable

from graceful.evaluation.captions import percent
from graceful.evaluation.consumers import ClusterEvidence, ThresholdEvidence
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.report import Section
from graceful.evaluation.slices import DiscoveredSlice

Row = dict[str, str]


def consumer_sections(evidence: Evidence) -> list[Section]:
    """Thresholds, people and discovered slices, each where there is something to show."""
    found = evidence.consumers
    sections = [
        Section(
            "Thresholds of consumers",
            "A pair of images is accepted when its score is at least the threshold of the generation whose vector is "
            "read. Bounds are those of identities on both sides.",
            rows=_rows(found.thresholds, _threshold),
        ),
        Section(
            "People",
            "The evaluation gallery clustered again in each state, names kept where most photos are. F agrees with who "
            "is really on the photos: a repaired cluster changes persons too.",
            rows=_rows(found.clusters, _cluster),
        ),
        Section(
            "Slices that lose more than the rest",
            f"{found.slices_tested:,} slices were tested in each state, and corrected for that many. They warn, and "
            "decide nothing."
            + (f" {found.slices_left_out:,} pairs were too many to look at." if found.slices_left_out else ""),
            rows=_rows(found.discovered, _discovered),
        ),
    ]
    return [section for section in sections if section.rows]


def _rows(items: tuple, row: Callable[..., Row]) -> list[Row]:
    return [row(item) for item in items]


def _threshold(item: ThresholdEvidence) -> Row:
    known = [f"{owner}: {'none' if value is None else f'{value:.4f}'}" for owner, value in item.thresholds.items()]
    return {
        "consumer": item.consumer,
        "queries": item.query_generation,
        "where": item.state or f"rows of {item.gallery_generation}",
        "threshold": ", ".join(known),
        "FAR": _bounded(item.far, item.far_upper),
        "FRR": _bounded(item.frr, item.frr_upper),
        "pairs": f"{item.num_impostors:,} + {item.num_genuine:,}",
    }


def _cluster(item: ClusterEvidence) -> Row:
    return {
        "where": item.state,
        "photos that change person": _bounded(item.changed, item.changed_upper),
        "people split": f"{item.num_split:,}",
        "merged": f"{item.num_merged:,}",
        "gone": f"{item.num_gone:,}",
        "B-cubed F now": percent(item.b_cubed_f_served),
        "then": percent(item.b_cubed_f),
    }


def _discovered(item: DiscoveredSlice) -> Row:
    return {
        "slice": item.scope,
        "where": item.state,
        "lost": f"{item.num_lost:,} of {item.num_queries:,}",
        "share": f"{percent(item.nfr)}, at least {percent(item.nfr_lower)}",
        "elsewhere": percent(item.nfr_elsewhere),
        "corrected p": f"{item.q_value:.2g}",
    }


def _bounded(value: float | None, upper: float | None) -> str:
    return "not measured" if value is None else f"{percent(value)}, at most {percent(upper)}"
