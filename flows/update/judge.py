"""The step that judges: gathers what it needs, decides, and records the decision before anything acts on it."""

import time

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.cost import CostInputs
from graceful.files import exists, read_json
from graceful.flows.store.evaluations import Evaluation, read_evaluation
from graceful.flows.store.events import Decided
from graceful.flows.store.ledger import take_look
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.assess import Candidacy, assess, mix_drift, record_decision
from graceful.flows.update.bench import Classifier
from graceful.flows.update.freeze import Inputs
from graceful.indexing.gallery import View
from graceful.indexing.planner import nearest_mean_distance
from graceful.training.encoder import read_classifier
from graceful.training.generation import read_card


def recorded(inputs: Inputs) -> Decided | None:
    """The newest recorded decision of an update."""
    found = inputs.registry.events(Decided, inputs.frozen.update_key)
    return found[-1].payload if found else None


def judge(inputs: Inputs, candidate: str, paragon: str | None = None) -> tuple[Decided, Evaluation]:
    """Gather the evidence, decide, and record the decision; a recorded one is read and not made again.

    A decision about a mix of generations that has drifted too far since is made again from today's mix.
    """
    registry, workspace, frozen = inputs.registry, inputs.workspace, inputs.frozen
    config = inputs.session.config
    known = recorded(inputs)
    if known is not None:
        evaluation = read_evaluation(workspace.evaluation_uri(known.evaluation))
        moved = registry.serving().champion != evaluation.decision.champion
        if moved or mix_drift(workspace, evaluation) <= config.gallery.max_mix_drift:
            return known, evaluation
    started = time.monotonic()
    lineage = [*frozen.generations, candidate]
    evaluation = assess(
        workspace,
        inputs.evaluation_set,
        Candidacy(
            candidate=candidate,
            champion=frozen.champion,
            generations=frozen.generations,
            policy=config.policy,
            order=config.gallery.order,
            clients=_clients(inputs, candidate),
            seed=config.gallery.seed,
            paragon=paragon,
            classifiers=classifiers(workspace, lineage),
            prefix_widths={name: read_card(workspace.generation_uri(name)).prefix_widths for name in lineage},
            cost=_cost(inputs, candidate),
            search=config.search,
            clusters=None if config.policy.max_cluster_churn is None else config.clusters,
            anchor=_anchor(inputs, candidate),
            take_look=lambda outcomes: take_look(
                registry, workspace.root, inputs.evaluation_set, outcomes, candidate, config.policy
            ),
        ),
        lambda generation, hashes: workspace.cache(generation).read(hashes),
    )
    inputs.session.compute_s += time.monotonic() - started
    return record_decision(workspace, evaluation, frozen.update_key, paragon=paragon), evaluation


def classifiers(workspace: Workspace, generations: list[str]) -> dict[str, Classifier]:
    """Classifiers of the generations that have one; adopted encoders have none."""
    found = {name: load_classifier(workspace.generation_uri(name)) for name in generations}
    return {name: classifier for name, classifier in found.items() if classifier is not None}


def load_classifier(generation_uri: str) -> Classifier | None:
    """Read a generation's classifier rows and class means; None for an adopted encoder."""
    found = read_classifier(generation_uri)
    if found is None:
        return None
    card, rows, means = found
    return Classifier(card.classes, _unit(rows.numpy()), _unit(means.numpy()))


def class_distance(workspace: Workspace, view: View) -> NDArray[np.float32]:
    """Cosine distance (N,) of a view's vectors to the nearest class mean of their generation; NaN where unreadable."""
    distance = np.full(view.num_items, np.nan, np.float32)
    for name, classifier in classifiers(workspace, list(view.readable)).items():
        positions = view.owned_by(name)
        if len(positions):
            distance[positions] = nearest_mean_distance(view.vectors(positions), classifier.class_means)
    return distance


def _clients(inputs: Inputs, candidate: str) -> tuple[str, ...]:
    """Older generations whose clients still query; the champion's view is left as it is, for a rollback."""
    supported = set(inputs.session.config.gallery.supported_query_generations)
    return tuple(n for n in inputs.frozen.generations if n in supported - {candidate, inputs.frozen.champion})


def _anchor(inputs: Inputs, candidate: str) -> str | None:
    """The generation that flips are counted from over several updates; None before there is one beside the champion.

    Of the generations that served and take part, in the order in which they first did: the oldest, or the one that
    `policy.cumulative_updates` names.
    """
    served = list(dict.fromkeys(state.champion for state in inputs.registry.serving_history() if state.champion))
    older = [n for n in served if n in inputs.frozen.generations and n not in (candidate, inputs.frozen.champion)]
    reach = inputs.session.config.policy.cumulative_updates
    if not older or reach == 1:
        return None
    return older[0] if reach is None or reach > len(older) else older[1 - reach]


def _cost(inputs: Inputs, candidate: str) -> CostInputs | None:
    """What a backfill would take, from the throughput measured while the evaluation set was embedded."""
    champion, config = inputs.frozen.champion, inputs.session.config
    throughput = inputs.workspace.throughput_uri(candidate)
    if champion is None or not exists(throughput):
        return None
    return CostInputs(
        rows_per_s=read_json(throughput)["rows_per_s"],
        num_workers=max(config.cluster.embed_workers, 1),
        num_rows=inputs.workspace.view(champion).num_items,
        bytes_per_row=4 * read_card(inputs.workspace.generation_uri(candidate)).width,
        **config.prices.model_dump(),
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
