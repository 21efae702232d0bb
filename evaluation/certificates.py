"""Certificates: whether queries of one generation may be scored against vectors of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graceful.evaluation.differences import bands_of, cluster_codes, difference_numbers, paired
from graceful.evaluation.evidence import CertificateEvidence
from graceful.evaluation.outcomes import Outcomes, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy, Verdict, verdict_not_below


def certify(
    outcomes: Outcomes, policy: RolloutPolicy, *, live_owners: Mapping[str, float], candidate: str, champion: str
) -> tuple[CertificateEvidence, ...]:
    """Judge whether the candidate's queries may be scored against each live owner's vectors.

    Needs only the live/... states, so that it can be asked before the fraction states are built (they depend on wave
    0). PASS when the lower bound of the paired difference is at least minus the margin, FAIL when the upper bound is
    below it. The candidate's own rows, if any, are covered by its self-test and left out.
    """
    owners = [owner for owner in live_owners if owner != candidate]
    return certify_pairs(
        outcomes,
        policy,
        [(candidate, owner, float(live_owners[owner])) for owner in owners],
        [(live_state(champion, owner), live_state(candidate, owner)) for owner in owners],
    )


def certify_clients(
    outcomes: Outcomes, policy: RolloutPolicy, clients: Sequence[str], *, candidate: str
) -> tuple[CertificateEvidence, ...]:
    """Judge whether queries of older generations may be scored against the candidate's vectors.

    Each is compared with what it has for sure: a gallery of its own vectors. Without the certificate ingest goes on
    writing vectors for it; no option depends on it.
    """
    return certify_pairs(
        outcomes,
        policy,
        [(client, candidate, 1.0) for client in clients],
        [(pair_state(client, client), pair_state(client, candidate)) for client in clients],
    )


def certify_pairs(
    outcomes: Outcomes,
    policy: RolloutPolicy,
    wanted: Sequence[tuple[str, str, float]],
    states: Sequence[tuple[str, str]],
) -> tuple[CertificateEvidence, ...]:
    """Judge each wanted (query generation, gallery generation, share) by its states (before, after).

    A state that was not measured is UNKNOWN.
    """
    pairs = [
        paired(outcomes, policy, before, after)
        if before in outcomes.first_rank and after in outcomes.first_rank
        else None
        for before, after in states
    ]
    bands = bands_of(cluster_codes(outcomes), policy, pairs, families=[[index] for index in range(len(pairs))])
    certificates, margin = [], policy.quality_margin_points
    for index, (query, gallery, share) in enumerate(wanted):
        numbers = difference_numbers(pairs[index], bands[index], 0)
        verdict: Verdict = "UNKNOWN"
        if margin is not None:
            verdict = verdict_not_below(numbers["difference_lower"], numbers["difference_upper"], -margin / 100)
        certificates.append(
            CertificateEvidence(
                query_generation=query, gallery_generation=gallery, share=share, verdict=verdict, **numbers
            )
        )
    return tuple(certificates)


def wave_zero_generations(certificates: Sequence[CertificateEvidence]) -> tuple[str, ...]:
    """Owners whose certificate is not issued (FAIL or UNKNOWN): their rows are re-embedded before the move."""
    return tuple(item.gallery_generation for item in certificates if item.verdict != "PASS")
