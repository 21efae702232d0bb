"""The steps of an update, in the order in which it takes them. Each finds its own earlier output and goes on.

An `UpdateRun` carries what they share; the tasks of `update.flow` call one step each. Plain Python: an update runs the
same without Prefect.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.cost import CostInputs
from graceful.evaluation.decision import CertificateToIssue, certificates_to_issue
from graceful.files import crash_point, exists, join, read_json, remove, write_json
from graceful.flows.runtime.encoders import load_classifier
from graceful.flows.runtime.session import Session
from graceful.flows.store.evaluations import Evaluation, read_evaluation, write_evaluation
from graceful.flows.update import train as making
from graceful.flows.update.assess import Candidacy, assess, mix_drift
from graceful.flows.update.bench import Classifier
from graceful.flows.update.freeze import freeze
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote, release_previous
from graceful.indexing.gallery import View
from graceful.indexing.planner import nearest_mean_distance
from graceful.indexing.reindex import ReindexReport
from graceful.training.predecessors import PredecessorRef

_ACTED_ON = ("BOOTSTRAP", "COMPATIBLE_ROLLOUT", "FULL_BACKFILL")


class UpdateRun:
    """One update of a workspace: the frozen inputs, and the steps over them."""

    def __init__(self, session: Session, *, again: bool = False, adopted: str | None = None) -> None:
        """Read the data and freeze the inputs, or find them frozen."""
        self.session = session
        self.workspace = session.workspace
        self.registry = session.workspace.registry
        self.compute_s = 0.0
        self.frozen, self.evaluation_set, self.images = freeze(session, again=again, adopted=adopted)
        self.references: list[PredecessorRef] = []

    # Making -----------------------------------------------------------------------------------------------------------

    def extend_cache(self, predecessor: str) -> None:
        """Embed the new training images with a predecessor."""
        self.references.append(making.extend_cache(self.session, self.frozen, self.images, predecessor))

    def train(self) -> str:
        """Train the candidate; returns its id."""
        candidate = making.train_candidate(self.session, self.frozen, self.references)
        self.compute_s += making.training_seconds(self.session, candidate)
        return candidate

    def train_paragon(self) -> str:
        """Train the unconstrained reference; returns its id."""
        paragon = making.train_paragon(self.session, self.frozen)
        self.compute_s += making.training_seconds(self.session, paragon)
        return paragon

    def embed_evaluation(self, generation: str) -> int:
        """Embed the evaluation set with a generation; returns how many images were new."""
        num_new = making.embed_evaluation(self.session, self.evaluation_set, generation)
        if num_new and self.session.encoders.rows_per_s is not None:
            # Stored, so that an update that was killed here and goes on decides by the same prices.
            write_json(self._throughput_uri, {"rows_per_s": round(self.session.encoders.rows_per_s, 3)})
        return num_new

    # Judging ----------------------------------------------------------------------------------------------------------

    def decided(self) -> Evaluation | None:
        """The newest recorded decision of this update."""
        if not self.registry.events("decided", self.frozen.update_key):
            return None
        return read_evaluation(self.workspace.evaluation_uri(self.evaluation_id()))

    def judge(self, candidate: str, paragon: str | None = None) -> Evaluation:
        """Gather the evidence, decide, and record the decision; a recorded one is read and not made again.

        A decision about a mix of generations that has drifted too far since is made again from today's mix.
        """
        found = self.decided()
        gallery = self.session.config.gallery
        if found is not None:
            moved = self.registry.serving().champion != found.decision.champion
            if moved or mix_drift(self.workspace, found) <= gallery.max_mix_drift:
                return found
        started = time.monotonic()
        lineage = [*self.frozen.generations, candidate]
        evaluation = assess(
            self.workspace,
            self.evaluation_set,
            Candidacy(
                candidate=candidate,
                champion=self.frozen.champion,
                generations=self.frozen.generations,
                policy=self.session.config.policy,
                order=gallery.order,
                clients=self._clients(candidate),
                seed=gallery.seed,
                paragon=paragon,
                classifiers=self._classifiers(lineage),
                prefix_widths={name: making.prefix_widths(self.session, name) for name in lineage},
                cost=self._cost(candidate),
            ),
            lambda generation, hashes: making.cached_vectors(self.session, generation, hashes),
        )
        self.compute_s += time.monotonic() - started
        number = len(self.registry.events("decided", self.frozen.update_key)) + 1
        evaluation_id = self.frozen.update_key if number == 1 else f"{self.frozen.update_key}-drift{number}"
        write_evaluation(self.workspace.evaluation_uri(evaluation_id), evaluation)
        crash_point("evaluation-written")
        self.registry.record(
            "decided",
            update_key=self.frozen.update_key,
            generation=candidate,
            occurrence=number,
            payload={
                "evaluation": evaluation_id,
                "outcome": evaluation.decision.outcome,
                "summary": evaluation.decision.summary,
                "paragon": paragon,
            },
        )
        crash_point("decided")
        return evaluation

    def evaluation_id(self) -> str:
        """Name of the newest recorded evaluation."""
        return str(self._recorded()["evaluation"])

    def recorded_paragon(self) -> str | None:
        """The paragon that the newest recorded decision was measured against, if there was one."""
        paragon = self._recorded()["paragon"]
        return None if paragon is None else str(paragon)

    # Acting -----------------------------------------------------------------------------------------------------------

    def acts_on(self, evaluation: Evaluation) -> bool:
        """Whether the decision changes what is served."""
        return evaluation.decision.outcome in _ACTED_ON

    def rollout(self, evaluation: Evaluation) -> Rollout:
        """The decision in the words of the gallery."""
        decision, gallery = evaluation.decision, self.session.config.gallery
        whole = decision.outcome in ("BOOTSTRAP", "FULL_BACKFILL")
        return Rollout(
            update_key=self.frozen.update_key,
            generation=decision.candidate,
            decision=self.evaluation_id(),
            fraction=1.0 if whole else float(decision.fraction or 0.0),
            order=("random" if whole else decision.order) or gallery.order,
            before_move="all" if whole else "wave_zero",
            certificates=_pairs(decision.certificates),
            seed=gallery.seed,
            wave_rows=gallery.wave_rows,
            unit_rows=gallery.unit_rows,
        )

    def ordered_backfill(self, evaluation: Evaluation) -> Rollout:
        """A full backfill that the operator orders although the decision is to hold or to wait."""
        registry, candidate = self.registry, evaluation.decision.candidate
        registry.record(
            "overridden",
            update_key=self.frozen.update_key,
            generation=candidate,
            payload={"decided": evaluation.decision.outcome, "ordered": "FULL_BACKFILL"},
        )
        return replace(
            self.rollout(evaluation),
            decision=f"{self.evaluation_id()}, overridden by the operator",
            fraction=1.0,
            order="random",
            before_move="all",
            certificates=_pairs(certificates_to_issue(evaluation.evidence)),
        )

    def embed_before_move(self, rollout: Rollout) -> ReindexReport:
        """Issue certificates, store the plan, and embed what must be there before the serving state moves."""
        plan = prepare(self.workspace, rollout, self._class_distance if rollout.order == "class_distance" else None)
        rows = plan.num_items if plan.before_move == "all" else plan.num_wave_zero
        with self.session.progress.track(f"embedding with {rollout.generation} before the move", rows) as advance:
            return embed_before_move(self.workspace, rollout, plan, on_rows=advance)

    def move(self, rollout: Rollout) -> None:
        """Move the serving state: last, by compare-and-swap, naming the decision."""
        promote(self.workspace, rollout, prepare(self.workspace, rollout), champion=self.frozen.champion)

    def carry_on(self) -> ReindexReport:
        """Re-index up to the decided fraction, wave by wave, as long as the plan is the active one."""
        serving = self.registry.serving()
        rows = self.registry.plan(serving.active_plan)[0].num_items if serving.active_plan else 0
        with self.session.progress.track("re-indexing", rows) as advance:
            return continue_plan(self.workspace, unit_rows=self.session.config.gallery.unit_rows, on_rows=advance)

    def conclude(self, evaluation: Evaluation) -> None:
        """Write the last line of the update into the lineage, and retire predecessors that own no readable row.

        The predecessors' vectors beside the manifest have served: they are copies from the caches.
        """
        remove(join(self.workspace.update_uri(self.frozen.update_key), "predecessors"))
        decision = evaluation.decision
        kind = {"HOLD": "held", "INCONCLUSIVE": "pending"}.get(decision.outcome)
        if kind is not None:
            self.registry.record(kind, update_key=self.frozen.update_key, generation=decision.candidate)  # type: ignore[arg-type]
        owners: set[str | None] = {self.registry.serving().champion}
        for readable in self.workspace.protected():
            rows = self.workspace.gallery.view(readable).rows_by_generation()
            owners |= {name for name, count in rows.items() if count}
        for name in self.registry.served_generations():
            if name not in owners:
                self.registry.record("retired", update_key=self.frozen.update_key, generation=name)
        self.registry.record(
            "update_completed",
            update_key=self.frozen.update_key,
            generation=decision.candidate,
            payload={"compute_s": round(self.compute_s + self.session.encoders.busy_s, 3)},
        )

    def completed(self) -> bool:
        """Whether this update has nothing left to do."""
        return bool(self.registry.events("update_completed", self.frozen.update_key))

    # Helpers ----------------------------------------------------------------------------------------------------------

    def _recorded(self) -> dict[str, Any]:
        """What the lineage says of the newest decision of this update."""
        return self.registry.events("decided", self.frozen.update_key)[-1].payload

    @property
    def _throughput_uri(self) -> str:
        return join(self.workspace.update_uri(self.frozen.update_key), "throughput.json")

    @cached_property
    def _known_classifiers(self) -> dict[str, Classifier | None]:
        return {}

    def _classifiers(self, generations: list[str]) -> dict[str, Classifier]:
        for name in generations:
            if name not in self._known_classifiers:
                self._known_classifiers[name] = load_classifier(self.workspace.generation_uri(name))
        return {name: found for name in generations if (found := self._known_classifiers[name]) is not None}

    def _clients(self, candidate: str) -> tuple[str, ...]:
        """Older generations whose clients still query; the champion's view is left as it is, for a rollback."""
        supported = set(self.session.config.gallery.supported_query_generations) - {candidate, self.frozen.champion}
        return tuple(name for name in self.frozen.generations if name in supported)

    def _class_distance(self, view: View) -> NDArray[np.float32]:
        distance = np.full(view.num_items, np.nan, np.float32)
        for name, classifier in self._classifiers(list(view.readable)).items():
            positions = view.owned_by(name)
            if len(positions):
                distance[positions] = nearest_mean_distance(view.vectors(positions), classifier.class_means)
        return distance

    def _cost(self, candidate: str) -> CostInputs | None:
        """What a backfill would take, from the throughput measured while the evaluation set was embedded."""
        champion = self.frozen.champion
        if champion is None or not exists(self._throughput_uri):
            return None
        prices = self.session.config.prices
        width = making.read_card(self.workspace.generation_uri(candidate)).width
        return CostInputs(
            rows_per_s=read_json(self._throughput_uri)["rows_per_s"],
            num_workers=max(self.session.config.cluster.embed_workers, 1),
            num_rows=self.workspace.view(champion).num_items,
            bytes_per_row=4 * width,
            **prices.model_dump(),
        )


def _pairs(certificates: Sequence[CertificateToIssue]) -> tuple[tuple[str, str], ...]:
    return tuple((certificate.query_generation, certificate.gallery_generation) for certificate in certificates)


def release_when_due(session: Session) -> bool:
    """End the previous generation's probation when its time has passed."""
    registry = session.workspace.registry
    promotions = registry.events("promoted")
    serving = registry.serving()
    if serving.previous is None or not promotions:
        return False
    if time.time() - promotions[-1].at < session.config.gallery.probation_hours * 3600:
        return False
    release_previous(session.workspace)
    return True
