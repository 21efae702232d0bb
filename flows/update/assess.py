"""Judges a candidate: ranks, outcomes, certificates, evidence, decision; and records what was decided."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.certificates import certify, wave_zero_generations
from graceful.evaluation.consumers import Consumed
from graceful.evaluation.cost import CostInputs
from graceful.evaluation.evidence import CertificateEvidence, Question
from graceful.evaluation.outcomes import Outcomes, live_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.spending import Look, at_level
from graceful.files import crash_point
from graceful.flows.store.evaluation_set import EvaluationSet, near_copy_share
from graceful.flows.store.evaluations import Evaluation, judge, write_evaluation
from graceful.flows.store.events import Decided
from graceful.flows.store.labels import read_labels
from graceful.flows.store.thresholds import served_thresholds
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.bench import Bench, Classifier, plan_ranking, production_owners
from graceful.flows.update.consumers import measure_clusterings, sample_scores
from graceful.flows.update.flips import explain_flips
from graceful.flows.update.query_log import UNREADABLE, QueryLog
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.gallery import GalleryVersion, View
from graceful.indexing.index_choice import SearchConfig
from graceful.training.generation import ordinal_of

MAX_OTHER_WAVES = 4  # each costs one view of the gallery and as many states as the policy has fractions

Vectors = Callable[[str, Sequence[str]], NDArray[np.float32]]
"""(generation, content hashes) -> embeddings (n, D) made before."""


@dataclass(frozen=True)
class Candidacy:
    """Who is judged, against whom, and how the gallery would be re-indexed."""

    candidate: str
    champion: str | None
    generations: tuple[str, ...]
    policy: RolloutPolicy
    order: str
    clients: tuple[str, ...] = ()
    seed: int = 0
    paragon: str | None = None
    classifiers: Mapping[str, Classifier] | None = None
    prefix_widths: Mapping[str, Sequence[int]] | None = None
    cost: CostInputs | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    clusters: ClusteringConfig | None = None
    """How the states are clustered; None: they are not."""
    anchor: str | None = None
    take_look: Callable[[Outcomes], Look] | None = None


def assess(workspace: Workspace, evaluation_set: EvaluationSet, candidacy: Candidacy, vectors: Vectors) -> Evaluation:
    """Measure every state that would be served and the diagnosis around it, and decide.

    `candidacy.generations` are all generations of the matrix beside the candidate, by ordinal. `candidacy.clients` are
    older ones that still query; the champion is not among them: after a rollback it must see what it sees now.
    `candidacy.take_look` is asked for this judgement's part of the error level before anything is bounded; without it
    the judgement has all of it.
    """
    candidate, champion = candidacy.candidate, candidacy.champion
    lineage = sorted({*candidacy.generations, candidate}, key=ordinal_of)
    everyone = [*lineage, *([candidacy.paragon] if candidacy.paragon else [])]
    bench = Bench(
        evaluation_set,
        {name: vectors(name, evaluation_set.queries.content_sha256) for name in everyone},
        {name: vectors(name, evaluation_set.gallery.content_sha256) for name in everyone},
        candidacy.prefix_widths or {},
    )
    if evaluation_set.log is not None and champion is not None:
        bench.log = QueryLog(
            evaluation_set,
            {name: vectors(name, evaluation_set.log.content_sha256) for name in (champion, candidate)},
            bench.gallery_vectors,
            bench.prefix_widths,
            k=candidacy.policy.k,
            labels=read_labels(workspace.root),
        )
    bench.measure_pairs([(query, gallery) for query in lineage for gallery in lineage[: lineage.index(query) + 1]])
    bench.measure_pairs([(client, candidate) for client in candidacy.clients])
    if candidacy.paragon is not None:
        bench.measure_pairs([(candidacy.paragon, candidacy.paragon)])
    for name, classifier in (candidacy.classifiers or {}).items():
        if name in everyone:
            bench.measure_classification(name, classifier)
    question = Question(
        candidate=candidate,
        champion=champion,
        order=candidacy.order,
        clients=candidacy.clients,
        cost=candidacy.cost,
        near_copy_share=near_copy_share(workspace.root, evaluation_set),
        chance=bench.chance(candidacy.policy.metric, candidacy.policy.k),
        anchor=candidacy.anchor,
    )
    if champion is None:
        sample = sample_scores(bench, candidacy.policy, [(candidate, candidate)], candidacy.seed)
        return judge(bench.outcomes(), candidacy.policy, question, Consumed(scores=sample))
    # One version for everything that is judged, and it stays readable however long that takes.
    with workspace.gallery.lease() as version:
        return _judge_against(workspace, evaluation_set, candidacy, champion, bench, question, version)


def _judge_against(
    workspace: Workspace,
    evaluation_set: EvaluationSet,
    candidacy: Candidacy,
    champion: str,
    bench: Bench,
    question: Question,
    version: GalleryVersion,
) -> Evaluation:
    candidate = candidacy.candidate
    lineage = sorted({*candidacy.generations, candidate}, key=ordinal_of)
    view = workspace.view(champion, version)
    shares = _shares(view)
    owners = production_owners(evaluation_set, view, champion)
    bench.measure_served(champion, owners)
    for query in (champion, candidate):
        bench.measure_live(query, owners, list(shares))
    look = candidacy.take_look(bench.outcomes()) if candidacy.take_look is not None else None
    certificates = _certificates(bench, at_level(candidacy.policy, look), shares, candidate, champion)
    decided = wave_zero_generations(certificates)
    for wave_zero in (decided, *_other_waves(bench, certificates, candidate)):
        passed = sorted({*shares} - {*wave_zero, candidate}, key=ordinal_of)
        seen = workspace.gallery.view([*passed, candidate], version)
        otherwise = champion if champion in passed else UNREADABLE
        before = production_owners(evaluation_set, seen, otherwise)
        ranking = plan_ranking(
            evaluation_set, before, lineage, candidacy.order, candidacy.seed, bench.gallery_vectors,
            candidacy.classifiers or {},
        )  # fmt: skip
        # Fully re-embedded is one state, whatever came first.
        fractions = [f for f in candidacy.policy.fractions if wave_zero == decided or f < 1]
        bench.measure_fractions(
            candidate, before, ranking, fractions, None if wave_zero == decided else wave_zero
        )  # fmt: skip
    unreadable = len(view.unreadable()) / max(view.num_items, 1)
    question = question.model_copy(
        update={
            "live_owners": shares,
            "unreadable_share": unreadable,
            "wave_zero": decided,
            "look": look,
            "thresholds": served_thresholds(workspace.registry, candidacy.policy.thresholds, champion, list(shares)),
        }
    )
    wanted = [(query, owner) for query in (champion, candidate) for owner in dict.fromkeys((*shares, candidate))]
    wanted = [pair for pair in wanted if pair != (champion, candidate)]
    wanted += [(client, candidate) for client in candidacy.clients]
    consumed = Consumed(
        measure_clusterings(bench, candidacy.clusters), sample_scores(bench, candidacy.policy, wanted, candidacy.seed)
    )
    evaluation = judge(bench.outcomes(), candidacy.policy, question, consumed)
    kind, target = candidacy.search.kind_for(view.num_items), candidacy.search.recall_target
    return replace(evaluation, flips=explain_flips(bench, evaluation.outcomes, evaluation.evidence, kind, target))


def _other_waves(bench: Bench, certificates: Sequence[CertificateEvidence], candidate: str) -> list[tuple[str, ...]]:
    """Every wave 0 that another margin could decide, beside the decided one: at most MAX_OTHER_WAVES, the likeliest.

    A wider margin certifies owners in the order of their lower bounds, so that n owners give n + 1 of them and not
    2^n. All owners at once is left out: nothing of the old gallery is served then.
    """
    decided = wave_zero_generations(certificates)
    ranked = sorted(
        (c for c in certificates if c.difference is not None and bench.comparable(candidate, c.gallery_generation)),
        key=lambda c: -math.inf if c.difference_lower is None else c.difference_lower,
        reverse=True,
    )
    certified = [{c.gallery_generation for c in ranked[:count]} for count in range(1, len(ranked) + 1)]
    hoped = {c.gallery_generation for c in ranked if c.verdict != "FAIL"}
    near = sorted(certified, key=lambda passed: abs(len(passed) - (len(certificates) - len(decided))))
    every = [c.gallery_generation for c in certificates]
    waves = [tuple(name for name in every if name not in passed) for passed in (hoped, *near)]
    return [wave for wave in dict.fromkeys(waves) if set(wave) != set(decided) and len(wave) < len(every)][
        :MAX_OTHER_WAVES
    ]


def _certificates(
    bench: Bench, policy: RolloutPolicy, shares: Mapping[str, float], candidate: str, champion: str
) -> tuple[CertificateEvidence, ...]:
    """Judge the live owners; one of another width is never certified, however wide the margin is."""
    found = certify(bench.outcomes(), policy, live_owners=shares, candidate=candidate, champion=champion)
    passed = [item.gallery_generation for item in found if item.verdict == "PASS"]
    wrong = [owner for owner in passed if not bench.comparable(candidate, owner)]
    if not wrong:
        return found
    for owner in wrong:
        bench.measure_nothing(live_state(champion, owner))
        bench.measure_nothing(live_state(candidate, owner))
    return certify(bench.outcomes(), policy, live_owners=shares, candidate=candidate, champion=champion)


def record_decision(
    workspace: Workspace, evaluation: Evaluation, update_key: str, *, paragon: str | None = None
) -> Decided:
    """Store an evaluation and write its decision into the lineage, before anything acts on it or shows it."""
    number = len(workspace.registry.events(Decided, update_key)) + 1
    made = Decided(
        evaluation=update_key if number == 1 else f"{update_key}-drift{number}",
        outcome=evaluation.decision.outcome,
        summary=evaluation.decision.summary,
        paragon=paragon,
    )
    write_evaluation(workspace.evaluation_uri(made.evaluation), evaluation)
    crash_point("evaluation-written")
    workspace.registry.record(made, update_key=update_key, generation=evaluation.decision.candidate, occurrence=number)
    crash_point("decided")
    return made


def live_shares(workspace: Workspace, champion: str) -> dict[str, float]:
    """Share of the gallery that each generation owns in the champion's view; those that own nothing are left out."""
    return _shares(workspace.view(champion))


def _shares(view: View) -> dict[str, float]:
    rows = view.rows_by_generation()
    return {name: count / view.num_items for name, count in rows.items() if count}


def mix_drift(workspace: Workspace, evaluation: Evaluation) -> float:
    """Largest change of any generation's share of the gallery since the evidence was gathered."""
    champion = evaluation.decision.champion
    if champion is None:
        return 0.0
    now, then = live_shares(workspace, champion), evaluation.evidence.live_owners
    return max((abs(now.get(name, 0.0) - then.get(name, 0.0)) for name in {*now, *then}), default=0.0)
