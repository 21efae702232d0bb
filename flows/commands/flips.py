"""Commands about searches that would be lost: which, because of what, and because of which item. Read only."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graceful.errors import GracefulError
from graceful.evaluation.outcomes import SERVED, compare, fraction_state
from graceful.evaluation.ways import lived_states
from graceful.files import exists, join, resolve
from graceful.flows.store.evaluation_set import evaluation_set_uri
from graceful.flows.store.evaluations import FLIPS_FILE, Evaluation, read_evaluation, read_flips, worst_first
from graceful.flows.store.events import Decided, Event, UpdateStarted
from graceful.flows.store.workspace import Workspace, open_workspace

_DETAILS = ("right_item", "right_owner", "wrong_item", "wrong_identity", "wrong_owner", "margin", "cause")


class NothingDecidedError(GracefulError):
    """No decision was made yet about what is asked for."""


class NotExplainedError(GracefulError):
    """The evaluation was made before flips were explained."""


class NotJudgedError(GracefulError):
    """The item took no part in the evaluation."""


def flips_of(root: str, generation: str | None, limit: int) -> dict[str, Any]:
    """Searches that are right with what served and would be wrong with a candidate, the worst first.

    Wrong in the worst state that users live through, as in the head of the report. What is right, and which queries
    count, is what the report says.
    """
    workspace, event, evaluation = _decided(root, generation, "looking for flips")
    outcomes, k, decision = evaluation.outcomes, evaluation.evidence.k, evaluation.decision
    worst = lived_states(evaluation.evidence, decision, evaluation.policy).worst
    after = fraction_state(1.0 if decision.fraction is None else decision.fraction) if worst is None else worst.state
    found: dict[str, Any] = {
        "evaluation": event.payload.evaluation,
        "generation": event.generation,
        "against": decision.champion,
        "state": after,
        "num_queries": len(outcomes),
        "num_flips": 0,
        "num_repaired": 0,
        "flips": [],
    }
    if decision.champion is None:
        return found
    missing = [state for state in (SERVED, after) if state not in outcomes.first_rank]
    if missing:
        raise NothingDecidedError(
            f"looking for flips of {event.generation}: expected the state {missing[0]!r} to be measured, found "
            f"{', '.join(outcomes.states)}; run 'graceful update --again'"
        )
    pair = compare(outcomes, SERVED, after, k=k)
    counted = np.flatnonzero(pair.counted)
    then, now = outcomes.first_rank[SERVED], outcomes.first_rank[after]
    lost = counted[pair.right_before & ~pair.right_after]
    explained = read_flips(workspace.evaluation_uri(event.payload.evaluation))
    details = {row["query"]: row for row in explained.filter(pc.equal(explained["state"], after)).to_pylist()}
    flips = []
    for row in lost:
        query = str(outcomes.query_ids[row])
        flips.append(
            {
                "query": query,
                "identity": str(outcomes.identities[row]),
                "slices": {name: str(values[row]) for name, values in outcomes.slices.items() if values[row]},
                "rank_before": int(then[row]),
                "rank_after": int(now[row]) or None,
                **{name: details.get(query, {}).get(name) for name in _DETAILS},
            }
        )
    flips.sort(key=lambda flip: (-(flip["rank_after"] or np.inf), -(flip["margin"] or 0.0), flip["query"]))
    return {
        **found,
        "num_queries": len(counted),
        "num_flips": len(lost),
        "num_repaired": int((~pair.right_before & pair.right_after).sum()),
        "flips": flips[:limit],
    }


def blame(root: str, item: str, generation: str | None) -> dict[str, Any]:
    """What one item has to do with the searches that a candidate would lose, in every state that was judged.

    `item`: its id in the gallery, or the source of an image of the evaluation set. It may be the wrong answer that
    comes first, the right answer that comes first no more, or the search itself.

    Raises:
        NotJudgedError: neither the gallery nor the evaluation knows the item.
        NotExplainedError: the evaluation was made before flips were explained.
    """
    workspace, event, evaluation = _decided(root, generation, f"blaming {item}")
    location = workspace.evaluation_uri(event.payload.evaluation)
    champion = evaluation.decision.champion
    if champion is not None and not exists(join(location, FLIPS_FILE)):
        raise NotExplainedError(
            f"blaming {item}: expected {FLIPS_FILE} beside the evaluation, found none (in {location}); run 'graceful "
            "update --again', which writes it"
        )
    names, owner = _names_of(workspace, event, item)
    flips = worst_first(read_flips(location))
    mentioned = pc.is_in(flips["wrong_item"], value_set=names)
    parts = {
        "wrong_answer_to": mentioned,
        "right_answer_lost": pc.is_in(flips["right_item"], value_set=names),
        "own_search_lost": pc.is_in(flips["query"], value_set=names),
    }
    worst = lived_states(evaluation.evidence, evaluation.decision, evaluation.policy).worst
    return {
        "item": item,
        "evaluation": event.payload.evaluation,
        "generation": event.generation,
        "against": champion,
        "owner_now": owner,
        "worst_state": None if worst is None else worst.state,
        **{name: _by_query(flips.filter(chosen)) for name, chosen in parts.items()},
    }


def _decided(root: str, generation: str | None, act: str) -> tuple[Workspace, Event[Decided], Evaluation]:
    """The newest decision about a generation, or about any; with its evaluation."""
    workspace = open_workspace(root)
    registry = workspace.registry
    wanted = None if generation is None else registry.resolve(generation)
    found = [event for event in registry.events(Decided) if wanted in (None, event.generation)]
    if not found:
        raise NothingDecidedError(
            f"{act}: expected a decision about {wanted or 'a candidate'}, found none; run 'graceful update'"
        )
    return workspace, found[-1], read_evaluation(workspace.evaluation_uri(found[-1].payload.evaluation))


def _names_of(workspace: Workspace, event: Event[Decided], item: str) -> tuple[pa.Array, str | None]:
    """Every name that the evaluation has for an item, and the generation whose vector of it is read now."""
    (row,) = workspace.gallery.items.find([item]).to_pylist()
    images = _images(workspace, event)
    names, owner = {item}, None
    if row["revision"] is not None:
        names |= {row["source"], *_sources(images, pc.equal(images["content_sha256"], row["content_sha256"]))}
        champion = workspace.registry.serving().champion
        if champion is not None:
            view = workspace.view(champion)
            place = int(np.searchsorted(view.revisions, row["revision"]))
            if place < view.num_items and view.revisions[place] == row["revision"] and view.owner[place] >= 0:
                owner = view.readable[view.owner[place]]
    known = _sources(images, pc.is_in(images["source"], value_set=pa.array(sorted(names))))
    if row["revision"] is None and not known:
        raise NotJudgedError(
            f"blaming {item}: expected the id of an item of the gallery, or the source of an image of the evaluation "
            f"set, found neither; 'graceful search' prints ids, 'graceful flips {event.generation}' sources"
        )
    return pa.array(sorted(names), pa.string()), owner


def _images(workspace: Workspace, event: Event[Decided]) -> pa.Table:
    """Sources and content hashes of the images that an update was judged by; none where it names no set."""
    started = workspace.registry.events(UpdateStarted, event.update_key)
    schema = pa.schema([("source", pa.string()), ("content_sha256", pa.string())])
    if not started:
        return schema.empty_table()
    location = evaluation_set_uri(workspace.root, started[0].payload.evaluation_set)
    filesystem, path = resolve(join(location, "rows.parquet"))
    return pq.read_table(path, columns=schema.names, filesystem=filesystem).cast(schema)


def _sources(images: pa.Table, chosen: Any) -> list[str]:
    return list(images.filter(chosen)["source"].to_pylist())


def _by_query(flips: pa.Table) -> list[dict[str, Any]]:
    """One entry a search, of its worst state, with all the states in which it is lost."""
    found: dict[str, dict[str, Any]] = {}
    for row in flips.to_pylist():
        found.setdefault(row["query"], {**row, "states": []})["states"].append(row["state"])
    return [{**entry, "states": sorted(set(entry["states"]))} for entry in found.values()]
