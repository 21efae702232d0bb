"""The ledger of the error level: which judgements have used which evaluation identities, and what is left for the next.

A judgement of a candidate is a look, and an event of the lineage. An identity (a cluster of queries) took part in a
look where the set looked at had one of its name, or one of its query images by content: a set that grew, was cut or
renamed keeps what its identities have spent, and only identities that no look has used bring something back. What a set
has spent is the mean of what its identities have, counted by identity and by query, and the larger of the two.

A candidate judged again on the same outcomes is the same look, under whatever limits: bounds hold for all limits at
once. Outcomes differ where today's view does, so that a candidate judged against another champion or mix looks again.
Looks are taken before a bound is computed: killed in between, the same one is found, and none is lost or counted twice.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.outcomes import SERVED, Outcomes, parse_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.spending import Look, next_share
from graceful.files import crash_point
from graceful.flows.store.evaluation_set import EvaluationSet, queries_of_set
from graceful.flows.store.events import Event, Looked
from graceful.flows.store.registry import Registry


def take_look(
    registry: Registry,
    root: str,
    evaluation_set: EvaluationSet,
    outcomes: Outcomes,
    candidate: str,
    policy: RolloutPolicy,
) -> Look:
    """Take the next look at an evaluation set, or find the one that was taken at the same outcomes.

    `outcomes` hold the states that do not depend on the policy: `served` and the live ones.
    """
    digest = outcomes_digest(outcomes)

    def make(before: Sequence[Event[Looked]]) -> Looked:
        return Looked(outcomes=digest, look=next_look(before, root, evaluation_set, policy))

    found = registry.record_once(Looked, f"{candidate}/{digest}/{policy.alpha_spending}", candidate, make)
    crash_point("look-taken")
    return found.look


def next_look(before: Sequence[Event[Looked]], root: str, evaluation_set: EvaluationSet, policy: RolloutPolicy) -> Look:
    """What the next judgement on a set may use, after the looks that were taken; records nothing."""
    looks = [event.payload.look for event in before]
    used: dict[str, float] = defaultdict(float)
    for look in looks:
        used[look.evaluation_set] += look.share
    _, place, sizes = np.unique(evaluation_set.clusters, return_inverse=True, return_counts=True)
    spent, seen, sharing = np.zeros(len(sizes)), np.zeros(len(sizes), bool), set()
    for set_id, share in used.items():
        took_part = _took_part(root, set_id, evaluation_set, place, len(sizes))
        spent += share * took_part
        seen |= took_part
        if took_part.any():
            sharing.add(set_id)
    before_this = min(max(float(spent.mean()), float((spent * sizes).sum() / sizes.sum())), 1.0)
    share = 1.0 if policy.alpha_spending == "none" else next_share(before_this, policy.planned_updates)
    return Look(
        evaluation_set=evaluation_set.set_id,
        number=1 + sum(look.evaluation_set in sharing for look in looks),
        fresh=float((~seen).mean()),
        spent=before_this,
        share=share,
        planned_updates=policy.planned_updates,
    )


def outcomes_digest(outcomes: Outcomes) -> str:
    """Digest of what a candidate is judged by, whatever the policy: queries, clusters, `served` and the live states."""
    digest = hashlib.sha256()
    for column in (outcomes.query_ids, outcomes.clusters):
        digest.update("\0".join(column.tolist()).encode())
    for state in sorted(outcomes.states):
        if state == SERVED or parse_state(state).kind == "live":
            digest.update(state.encode())
            digest.update(np.ascontiguousarray(outcomes.first_rank[state]).tobytes())
            digest.update(np.ascontiguousarray(outcomes.average_precision[state]).tobytes())
    return digest.hexdigest()[:16]


def _took_part(
    root: str, set_id: str, evaluation_set: EvaluationSet, place: NDArray[np.int64], num_clusters: int
) -> NDArray[np.bool_]:
    """Which clusters (C,) of a set took part in the looks at another; `place` (Q,) is the cluster of each query."""
    if set_id == evaluation_set.set_id:
        return np.ones(num_clusters, bool)
    clusters, contents = queries_of_set(root, set_id)
    known = np.isin(evaluation_set.clusters, list(clusters))
    known |= np.array([digest in contents for digest in evaluation_set.queries.content_sha256], bool)
    return np.bincount(place[known], minlength=num_clusters) > 0
