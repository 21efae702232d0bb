"""What a search endpoint tells Prometheus. Every value is there already: a scrape reads no table, encodes nothing."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as _exposition
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from graceful.flows.search.batches import Batches
from graceful.flows.search.bodies import BodyBudget
from graceful.flows.search.looking import SearchState
from graceful.flows.search.refusals import KINDS
from graceful.flows.search.watching import CanaryWatch

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SEARCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class SearchMetrics:
    """Counters of one application; each has a registry of its own."""

    def __init__(
        self, state: SearchState, budget: BodyBudget, lanes: Mapping[str, Batches[Any, Any]], watch: CanaryWatch
    ) -> None:
        """`lanes`: kind of question -> the queue that it waits in."""
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "graceful_search_seconds",
            "Seconds from the whole question to its answer, of answered searches.",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._together = Histogram(
            "graceful_search_batch_size",
            "Searches that were answered together.",
            ["kind"],
            buckets=_SEARCHES,
            registry=self.registry,
        )
        self._errors = Counter(
            "graceful_search_errors", "Searches that were not answered.", ["kind"], registry=self.registry
        )
        for lane in lanes:
            self._seconds.labels(lane)
            self._together.labels(lane)
        for kind in KINDS:
            self._errors.labels(kind)
        ProcessCollector(registry=self.registry)
        self.registry.register(_Standing(state, budget, lanes))
        self.registry.register(_Watching(watch))

    def answered(self, kind: str, seconds: float) -> None:
        """Note a search that was answered."""
        self._seconds.labels(kind).observe(seconds)

    def together(self, kind: str, number: int) -> None:
        """Note how many were answered together."""
        self._together.labels(kind).observe(number)

    def failed(self, kind: str) -> None:
        """Note a search that was not answered."""
        self._errors.labels(kind).inc()

    def exposition(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return _exposition(self.registry)


class _Standing(Collector):
    """How things stand at the moment of a scrape."""

    def __init__(self, state: SearchState, budget: BodyBudget, lanes: Mapping[str, Batches[Any, Any]]) -> None:
        self._state = state
        self._budget = budget
        self._lanes = lanes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state, now = self._state, time.time()
        waiting = GaugeMetricFamily("graceful_search_waiting", "Searches that wait for their turn.", labels=["kind"])
        for kind, lane in self._lanes.items():
            waiting.add_metric([kind], lane.num_waiting)
        yield waiting
        yield _gauge("graceful_search_body_bytes", "Bytes of bodies in memory.", self._budget.held_bytes)
        yield _gauge("graceful_last_look_ok", "1 where the last look succeeded.", float(state.error is None))
        if state.looked_at:
            age = now - state.looked_at
            yield _gauge("graceful_last_look_age_seconds", "Seconds since the last look at what serves.", age)
        searcher = state.searcher
        yield _gauge("graceful_serving", "1 where a generation serves.", float(searcher is not None))
        if searcher is None:
            return
        served, figures = searcher.served, state.figures
        who = GaugeMetricFamily(
            "graceful_serving_generation", "1 for the generation that encodes queries.", labels=["generation"]
        )
        who.add_metric([served.generation], 1)
        yield who
        if figures.champion_since is not None:
            age = now - figures.champion_since
            yield _gauge("graceful_champion_age_seconds", "Seconds since the serving generation moved in.", age)
        rows = GaugeMetricFamily(
            "graceful_rows", "Items found, by the generation whose vector they are found by.", labels=["generation"]
        )
        for generation, number in figures.rows_by_generation.items():
            rows.add_metric([generation], number)
        yield rows
        num_items = sum(figures.rows_by_generation.values()) + served.num_unreadable
        yield _gauge("graceful_items", "Live items of the gallery.", num_items)
        yield _gauge("graceful_unreadable_items", "Live items that cannot be found.", served.num_unreadable)
        share = served.num_unreadable / num_items if num_items else 0.0
        yield _gauge("graceful_unreadable_share", "Share of the live items that cannot be found.", share)
        plan = GaugeMetricFamily(
            "graceful_plan_items", "Items that the active plan re-embeds, in waves.", labels=["generation"]
        )
        if figures.plan_generation is not None:
            plan.add_metric([figures.plan_generation], figures.plan_items)
        yield plan


class _Watching(Collector):
    """How a canary stands, by what all endpoints had written at the last look."""

    def __init__(self, watch: CanaryWatch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[GaugeMetricFamily]:
        found = self._watch.status()
        is_watched = found is not None and "candidate" in found
        yield _gauge("graceful_canary_under_way", "1 while a generation is watched.", float(is_watched))
        for name, text, key in _CANARY:
            family = GaugeMetricFamily(f"graceful_canary_{name}", text, labels=["generation"])
            if found is not None and is_watched and found[key] is not None:
                family.add_metric([found["candidate"]], float(found[key]))
            yield family


_CANARY = (
    ("comparisons", "Answers that were compared.", "compared"),
    ("changed_share", "Share of first answers that change.", "changed_share"),
    ("changed_lower", "Lower bound of that share, at every moment.", "changed_lower"),
    ("changed_limit", "Share that may change.", "max_changed"),
    ("failed_lower", "Lower bound of the share of answers that fail or are late.", "failed_lower"),
    ("failed_limit", "Share that may fail.", "max_failed"),
    ("dropped", "Comparisons for which there was no room.", "dropped"),
    ("vectors", "Searches by a vector, which are not watched.", "vectors"),
    ("labelled", "Pictures with a label.", "labelled"),
    ("nfr_lower", "Lower bound of the share of these that flips negatively, at every moment.", "nfr_lower"),
    ("nfr_limit", "Share of these that may.", "max_nfr"),
)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
