"""What can be known before a GPU hour is spent: whether an update could be decided, and what each option would take.

Everything is measured on this workspace, on samples and in this process; the lineage, the gallery and the caches are
only read. What nobody has measured, and nothing here can, is None ("unavailable"), never 0.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.cost import CostInputs, OptionCost, break_even_days, option_cost
from graceful.evaluation.evidence import OVERALL, StateEvidence
from graceful.evaluation.planning import BestFraction, Detectable, Power, best_fraction, detectable, joint_power, truths
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.spending import at_level
from graceful.files import exists, join
from graceful.flows.runtime.session import Session, open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.evaluation_set import EvaluationSet, load_evaluation_set
from graceful.flows.store.evaluations import Evaluation
from graceful.flows.store.events import Looked
from graceful.flows.store.ledger import next_look
from graceful.flows.store.workspace import Workspace, require_workspace
from graceful.flows.update.foresee import in_plain_words, last_judged, likeness_and_right, queries_of
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit
from graceful.indexing.exact import relevant_ranks
from graceful.indexing.search import build_state
from graceful.indexing.snapshots import SegmentRows
from graceful.indexing.view import View

PROBED_IMAGES, PROBED_VECTORS = 512, 20_000
_WARM_UP = 32


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Probe(_Plain):
    """What was measured of this gallery and the champion's encoder, in this process."""

    num_rows: int = Field(description="Items of the gallery.")
    rows_per_s: float | None = Field(description="Images that one worker embeds per second, files read and written.")
    bytes_per_row: int | None = Field(description="Stored bytes of one vector with its keys.")
    index_hours: float | None = Field(description="Hours to build the index over all rows, scaled from a sample.")
    sampled_images: int = Field(description="Images that were embedded to measure it.")
    sampled_vectors: int = Field(description="Vectors that an index was built over to measure it.")


class Ceiling(_Plain):
    """What the best query could find in one old gallery: the mean of the stored vectors that it should find."""

    generation: str = Field(description="Who embedded the gallery.")
    now: float | None = Field(description="Recall of its own queries there.")
    ceiling: float | None = Field(description="Recall of the mean of the relevant stored vectors as a query.")
    single: float = Field(description="Share of the queries with one relevant row: their ceiling is about 1 whatever.")


class PlannedOption(_Plain):
    """One way to carry an update out, priced."""

    name: str = Field(description="hold, rollout at 0, rollout at the best fraction, full backfill.")
    fraction: float | None = Field(description="Fraction of the gallery that is re-embedded; None: not known.")
    rows: int | None = Field(description="Rows that are re-embedded, those before the move included.")
    hours: float | None = Field(description="Hours of embedding with all workers.")
    extra_bytes: int | None = Field(description="Bytes of the second vectors, beside the old ones.")
    index_hours: float | None = Field(description="Hours of building the index again.")
    price: float | None = Field(description="Price of all that until the next generation.")
    unavailable: tuple[str, ...] = Field(description="Terms of the price that are not known.")
    gain_points: float | None = Field(description="Gain at the last judged update.")
    gain_lower_points: float | None = Field(description="Its lower bound.")
    break_even_days: float | None = Field(description="Days after which that gain, at its lower bound, has paid.")
    pays_in_time: bool | None = Field(description="Whether that is before the next generation; None: not known.")
    over_budget: bool | None = Field(description="Whether it costs more than --max-cost; None: not known.")


class Plan(_Plain):
    """What is known before a training."""

    dry_run: bool = Field(description="Nothing was measured or simulated.")
    steps: tuple[str, ...] = Field(description="What was, or would be, measured.")
    detectable: Detectable | None = Field(description="What the queries can show at best.")
    powers: tuple[Power, ...] = Field(description="Simulated updates; the expected one decides.")
    power: float | None = Field(description="Chance that an update of the expected gain is decided.")
    min_power: float = Field(description="What is asked of it.")
    sentences: tuple[str, ...] = Field(description="What that means, in words.")
    ceilings: tuple[Ceiling, ...] = Field(description="What a query-side method could win in each old gallery.")
    probe: Probe | None = Field(description="What was measured of gallery and encoder.")
    options: tuple[PlannedOption, ...] = Field(description="The options side by side.")
    best: BestFraction | None = Field(description="The best fraction at the last judged update, with its interval.")
    days_until_next: float | None = Field(description="Days until the next generation is due.")
    days_from: str = Field(description="Where that comes from.")
    refused: tuple[str, ...] = Field(description="Why a training should not be started.")


def plan_update(
    root: str,
    *,
    gain_points: float | None = None,
    min_power: float | None = None,
    max_cost: float | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Plan:
    """Look ahead on a workspace; nothing in it is changed.

    Args:
        root: the workspace.
        gain_points: what the next generation is trained to win; by default what the policy says.
        min_power: least chance of a decision; by default that of the policy.
        max_cost: most that an option may cost.
        dry_run: only say what would be measured and simulated.
        say: told each step when it begins.
    """
    require_workspace(root)
    config = load_workspace_config(root)
    policy, prices = config.policy, config.prices
    least = policy.min_power if min_power is None else min_power
    gain = policy.expected_gain_points if gain_points is None else gain_points
    with open_session(root, config) as session:
        workspace = session.workspace
        champion = workspace.registry.serving().champion
        view = None if champion is None else workspace.view(champion)
        steps = _steps(champion, view, session)
        if dry_run:
            return Plan(
                dry_run=True, steps=steps, detectable=None, powers=(), power=None, min_power=least, sentences=(),
                ceilings=(), probe=None, options=(), best=None, days_until_next=prices.days_until_next_generation,
                days_from="[prices]" if prices.days_until_next_generation is not None else "unavailable", refused=(),
            )  # fmt: skip
        say(steps[0])
        evaluation_set = load_evaluation_set(config.evaluation)
        last = last_judged(workspace)
        looks = workspace.registry.events(Looked)
        policy = at_level(policy, None if champion is None else next_look(looks, root, evaluation_set, policy))
        best_possible, powers = _simulate(evaluation_set, policy, gain, last)
        sentences = in_plain_words(best_possible, powers[:3], policy)
        if champion is None or view is None:
            return Plan(
                dry_run=False, steps=steps, detectable=best_possible, powers=tuple(powers), power=powers[2].joint,
                min_power=least, sentences=(*sentences, "There is no champion yet: the first update serves as it is."),
                ceilings=(), probe=None, options=(), best=None, days_until_next=prices.days_until_next_generation,
                days_from="unavailable", refused=(),
            )  # fmt: skip
        say(steps[1])
        ceilings = _ceilings(workspace, evaluation_set, view, policy.k)
        say(steps[2])
        probe = _probe(session, champion, view)
        days, days_from = _days_until_next(session)
        inputs = _cost_inputs(session, probe, days)
        options, best = _options(policy, probe, inputs, last, max_cost)
    refused = []
    if powers[2].joint < least:
        refused.append(
            f"the chance that an update of the expected gain is decided is {powers[2].joint:.0%}, and {least:.0%} is "
            "asked for (policy.min_power, --min-power)"
        )
    if max_cost is not None and all(option.over_budget is not False for option in options[1:]):
        refused.append(f"no rollout and no backfill is known to cost at most {max_cost:g} (--max-cost)")
    return Plan(
        dry_run=False, steps=steps, detectable=best_possible, powers=tuple(powers), power=powers[2].joint,
        min_power=least, sentences=tuple(sentences), ceilings=tuple(ceilings), probe=probe, options=tuple(options),
        best=best, days_until_next=days, days_from=days_from, refused=tuple(refused),
    )  # fmt: skip


def _steps(champion: str | None, view: View | None, session: Session) -> tuple[str, ...]:
    steps = ["read the evaluation set and simulate updates through the gate"]
    if champion is not None and view is not None:
        images = min(PROBED_IMAGES, view.num_items)
        vectors = min(PROBED_VECTORS, view.num_items - len(view.unreadable()))
        kind = session.config.search.kind_for(view.num_items)
        steps += [
            "query each old gallery with the mean of the stored vectors that should be found, where they are cached",
            f"embed {images:,} of {view.num_items:,} stored images with {champion} in this process, and build an index "
            f"({kind}) over {vectors:,} stored vectors",
        ]
    return tuple(steps)


def _simulate(
    evaluation_set: EvaluationSet, policy: RolloutPolicy, gain: float, last: Evaluation | None
) -> tuple[Detectable, list[Power]]:
    queries = queries_of(evaluation_set)
    icc, right = likeness_and_right(last, policy)
    asked = truths(policy, gain, None if last is None else _state(last, 1.0))
    return detectable(queries, policy), [joint_power(queries, policy, truth, icc=icc, right=right) for truth in asked]


def _ceilings(workspace: Workspace, evaluation_set: EvaluationSet, view: View, k: int) -> list[Ceiling]:
    """Of every generation that owns rows of today's view; unavailable where the evaluation set was not embedded."""
    queries, gallery = evaluation_set.queries, evaluation_set.gallery
    places: dict[str, list[int]] = {}
    for place, label in enumerate(gallery.labels.tolist()):
        places.setdefault(label, []).append(place)
    relevant = [
        [place for place in places.get(label, []) if gallery.sources[place] != source]
        for source, label in zip(queries.sources, queries.labels.tolist(), strict=True)
    ]
    asked = [row for row, found in enumerate(relevant) if found]
    single = float(np.mean([len(relevant[row]) == 1 for row in asked])) if asked else 0.0
    found = []
    for generation in [name for name, rows in view.rows_by_generation().items() if rows]:
        stored = _cached(workspace, generation, gallery.content_sha256)
        own = _cached(workspace, generation, queries.content_sha256)
        now = ceiling = None
        if stored is not None and asked:
            means = np.stack([stored[relevant[row]].mean(axis=0) for row in asked])
            means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
            ceiling = _recall(means.astype(np.float32), stored, evaluation_set, asked, k)
            now = None if own is None else _recall(own[asked], stored, evaluation_set, asked, k)
        found.append(Ceiling(generation=generation, now=now, ceiling=ceiling, single=single))
    return found


def _recall(
    vectors: NDArray[np.float32], stored: NDArray[np.float32], chosen: EvaluationSet, rows: list[int], k: int
) -> float:
    ranks = relevant_ranks(
        vectors,
        stored,
        chosen.queries.labels[rows],
        chosen.gallery.labels,
        np.array(chosen.queries.sources)[rows],
        np.array(chosen.gallery.sources),
    )
    return float((ranks.first() <= k).mean())


def _cached(workspace: Workspace, generation: str, hashes: list[str]) -> NDArray[np.float32] | None:
    if not exists(join(workspace.root, "caches", generation)):
        return None
    cache = workspace.cache(generation)
    return None if cache.missing(hashes) else cache.read(hashes)


def _probe(session: Session, champion: str, view: View) -> Probe:
    """Embed a sample of stored images as a re-index would, and build an index over a sample of stored vectors."""
    chosen = np.sort(np.random.default_rng(0).permutation(view.num_items)[:PROBED_IMAGES])
    items = view.items(["source", "content_sha256"], chosen)
    sources, hashes = items["source"].to_pylist(), items["content_sha256"].to_pylist()
    done: list[EmbeddedUnit] = []
    with tempfile.TemporaryDirectory(prefix="graceful-plan-") as folder:
        # The first unit opens libraries and files and is not counted.
        parts = [slice(0, _WARM_UP), slice(_WARM_UP, None)] if len(sources) > 2 * _WARM_UP else [slice(0, None)]
        units = [
            EmbedUnit(
                f"probe-{number}",
                tuple(sources[part]),
                pa.table({"content_sha256": hashes[part]}),
                os.path.join(folder, f"{number}.parquet"),
            )
            for number, part in enumerate(parts)
            if sources[part]
        ]
        session.workspace.embed_with(champion)(units, done.append)
    measured = done[-1] if done and done[-1].num_rows else None
    index_hours, vectors = _index_hours(session, champion, view)
    return Probe(
        num_rows=view.num_items,
        rows_per_s=None if measured is None else round(measured.num_rows / max(measured.seconds, 1e-6), 3),
        bytes_per_row=None if measured is None else round(measured.size_bytes / measured.num_rows),
        index_hours=index_hours,
        sampled_images=0 if measured is None else measured.num_rows,
        sampled_vectors=vectors,
    )


def _index_hours(session: Session, champion: str, view: View) -> tuple[float | None, int]:
    """Hours for all rows, in proportion to a sample, with the kind of index that all rows would get."""
    rows = {name: view.owned_by(name) for name in view.readable}
    owner = max(rows, key=lambda name: len(rows[name]), default=champion)
    positions = rows.get(owner, np.empty(0, np.int64))[:PROBED_VECTORS]
    if not len(positions):
        return None, 0
    vectors = view.vectors(positions)
    part = SegmentRows(owner, view.revisions[positions], lambda places: vectors[places])
    config = session.config.search.model_copy(update={"index": session.config.search.kind_for(view.num_items)})
    started = time.perf_counter()
    build_state("probe", champion, [part], config=config)
    return (time.perf_counter() - started) * view.num_items / len(positions) / 3600, len(positions)


def _days_until_next(session: Session) -> tuple[float | None, str]:
    stated = session.config.prices.days_until_next_generation
    if stated is not None:
        return stated, "[prices]"
    from graceful.flows.schedule import days_between

    return days_between(session.config), "[schedule]"


def _cost_inputs(session: Session, probe: Probe, days: float | None) -> CostInputs | None:
    if probe.rows_per_s is None:
        return None
    prices = session.config.prices.model_dump()
    if prices["fixed_worker_hours"] is None:
        prices["fixed_worker_hours"] = probe.index_hours
    return CostInputs(
        rows_per_s=probe.rows_per_s,
        num_workers=max(session.config.cluster.embed_workers, 1),
        num_rows=probe.num_rows,
        bytes_per_row=probe.bytes_per_row,
        **{**prices, "days_until_next_generation": days},
    )


def _options(
    policy: RolloutPolicy, probe: Probe, inputs: CostInputs | None, last: Evaluation | None, max_cost: float | None
) -> tuple[list[PlannedOption], BestFraction | None]:
    first = None
    best = None
    if last is not None:
        first = min(1.0, last.evidence.wave_zero_share + last.evidence.unreadable_share)
        if inputs is not None:
            costs = [option_cost(inputs, fraction, first_share=first) for fraction in policy.fractions]
            best = best_fraction(last.evidence.states, costs, inputs)
    hold = PlannedOption(
        name="hold", fraction=0.0, rows=0, hours=0.0, extra_bytes=0, index_hours=0.0, price=0.0, unavailable=(),
        gain_points=0.0, gain_lower_points=0.0, break_even_days=None, pays_in_time=None,
        over_budget=None if max_cost is None else False,
    )  # fmt: skip
    wanted = [
        ("rollout at 0", 0.0, first),
        ("rollout at the best fraction", None if best is None else best.fraction, first),
        ("full backfill", 1.0, 1.0),
    ]
    return [hold, *(_priced(*option, probe, inputs, last, max_cost) for option in wanted)], best


def _priced(
    name: str,
    fraction: float | None,
    first: float | None,
    probe: Probe,
    inputs: CostInputs | None,
    last: Evaluation | None,
    max_cost: float | None,
) -> PlannedOption:
    """One option; without an earlier evaluation nobody knows which rows a rollout would have to embed first."""
    cost: OptionCost | None = None
    if inputs is not None and fraction is not None and first is not None:
        cost = option_cost(inputs, fraction, first_share=first)
    state = None if last is None or fraction is None else _state(last, fraction)
    lower = None if state is None or state.difference_lower is None else 100 * state.difference_lower
    price = None if cost is None else cost.total_price
    stored = None if cost is None or probe.bytes_per_row is None else cost.num_rows * probe.bytes_per_row
    paid = None
    if inputs is not None and lower is not None:
        paid = break_even_days(price, inputs.value_per_point_day, lower)
    due = None if inputs is None else inputs.days_until_next_generation
    missing = ("rows before the move",) if first is None else ("best fraction",) if fraction is None else ()
    return PlannedOption(
        name=name,
        fraction=fraction,
        rows=None if cost is None else cost.num_rows,
        hours=None if cost is None else cost.hours,
        extra_bytes=stored,
        index_hours=0.0 if cost is not None and not cost.num_rows else probe.index_hours,
        price=price,
        unavailable=missing if cost is None else cost.unavailable,
        gain_points=None if state is None or state.difference is None else 100 * state.difference,
        gain_lower_points=lower,
        break_even_days=None if paid is None or math.isinf(paid) else paid,
        pays_in_time=None if paid is None or due is None else paid <= due,
        over_budget=None if max_cost is None or price is None else price > max_cost,
    )


def _state(evaluation: Evaluation, fraction: float) -> StateEvidence | None:
    states = evaluation.evidence.states
    return next((s for s in states if s.scope == OVERALL and s.fraction == fraction), None)
