"""Whether an update can be decided at all with these queries and limits: asked before anything is trained."""

from collections.abc import Sequence

import numpy as np

from graceful.errors import GracefulError
from graceful.evaluation.intervals import ICC_FLOOR, intra_cluster_correlation
from graceful.evaluation.outcomes import SERVED, compare, fraction_state
from graceful.evaluation.planning import (
    ASSUMED_RIGHT,
    Detectable,
    Power,
    Queries,
    detectable,
    expected_truth,
    joint_power,
)
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.spending import at_level
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.evaluations import Evaluation, read_evaluation
from graceful.flows.store.events import Decided, Looked
from graceful.flows.store.ledger import next_look
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.freeze import Inputs

_DRAWS = 20  # before a training that goes on all the same; 'graceful plan' takes more


class UnderpoweredError(GracefulError):
    """An update would most likely end undecided, and the policy refuses to train for that."""

    exit_code = 2


def foresee(inputs: Inputs) -> None:
    """Warn, or refuse as the policy says, where an update would most likely end undecided.

    Raises: UnderpoweredError.
    """
    registry, policy = inputs.registry, inputs.session.config.policy
    if inputs.frozen.champion is None or policy.min_power == 0:
        return
    look = next_look(registry.events(Looked), inputs.workspace.root, inputs.evaluation_set, policy)
    policy = at_level(policy, look)
    queries = queries_of(inputs.evaluation_set)
    if not len(queries.clusters):
        return
    best = detectable(queries, policy)
    power = None
    if best.can_pass:
        icc, right = likeness_and_right(last_judged(inputs.workspace), policy)
        truth = expected_truth(policy, policy.expected_gain_points)
        power = joint_power(queries, policy, truth, icc=icc, right=right, num_draws=_DRAWS)
        if power.joint >= policy.min_power:
            return
    said = " ".join(in_plain_words(best, [power] if power else [], policy))
    if policy.when_underpowered == "refuse":
        raise UnderpoweredError(
            f"planning an update: expected a chance of at least {policy.min_power:.0%} that it is decided, found less: "
            f"{said.rstrip('.')}; see 'graceful plan', or set policy.min_power"
        )
    inputs.session.progress.say(f"Before training: {said} See 'graceful plan'.")


def queries_of(evaluation_set: EvaluationSet) -> Queries:
    """The queries with something to find: those with a row of their identity that is not their own."""
    queries, gallery = evaluation_set.queries, evaluation_set.gallery
    rows: dict[str, int] = {}
    for label in gallery.labels.tolist():
        rows[label] = rows.get(label, 0) + 1
    own = set(zip(gallery.sources, gallery.labels.tolist(), strict=True))
    pairs = zip(queries.sources, queries.labels.tolist(), strict=True)
    asked = np.array([bool(label) and rows.get(label, 0) > ((source, label) in own) for source, label in pairs], bool)
    slices = {name: values[asked] for name, values in evaluation_set.slices.items()}
    return Queries(clusters=np.asarray(evaluation_set.clusters)[asked], slices=slices)


def last_judged(workspace: Workspace) -> Evaluation | None:
    """The newest evaluation of an update that had something to compare with."""
    for event in reversed(workspace.registry.events(Decided)):
        if event.payload.outcome == "BOOTSTRAP":
            continue
        evaluation = read_evaluation(workspace.evaluation_uri(event.payload.evaluation))
        if evaluation.evidence.states:
            return evaluation
    return None


def likeness_and_right(last: Evaluation | None, policy: RolloutPolicy) -> tuple[float, float]:
    """How alike queries of one identity were when they flipped, and which share was right: measured, or assumed."""
    if last is None or fraction_state(1) not in last.outcomes.first_rank:
        return ICC_FLOOR, ASSUMED_RIGHT
    found = compare(last.outcomes, SERVED, fraction_state(1), metric=policy.metric, k=policy.k)
    if not len(found.before):
        return ICC_FLOOR, ASSUMED_RIGHT
    losses = found.right_before & ~found.right_after
    # An estimate from few flips is mostly noise: it is not taken to be less than what the bounds assume.
    icc = max(intra_cluster_correlation(losses, last.outcomes.clusters[found.counted]), ICC_FLOOR)
    return icc, float(found.right_before.mean())


def in_plain_words(best: Detectable, powers: Sequence[Power], policy: RolloutPolicy) -> list[str]:
    """What these queries can and cannot decide, in sentences; `powers` with the expected update last."""
    found = []
    asked = f"these {best.num_queries:,} queries of {best.num_identities:,} identities"
    if best.num_identities < policy.min_identities:
        found.append(f"With {asked} nothing is judged: min_identities is {policy.min_identities}.")
    if policy.max_nfr is not None and best.smallest_nfr > policy.max_nfr:
        what = "no number of identities" if best.identities_needed is None else f"{best.identities_needed:,} identities"
        verb = "is enough" if best.identities_needed is None else "are the least"
        found.append(
            f"With {asked} no update can pass: {what} {verb} for max_nfr {100 * policy.max_nfr:g} %, and more queries "
            f"of the same ones do not help. The lowest rate that they can show is {100 * best.smallest_nfr:.1f} %."
        )
    elif policy.max_nfr is not None and best.shown_without_flips > policy.max_nfr and best.identities_needed:
        found.append(
            f"With {asked} an update without any flip does not pass: {best.identities_needed:,} identities are the "
            f"least for max_nfr {100 * policy.max_nfr:g} %."
        )
    for power in powers[-1:]:
        said = (
            f"With {asked} an update that is truly {power.truth.name} passes every guard {power.joint:.0%} of the time"
        )
        if power.joint < 1:
            least = power.bottleneck
            shown = {
                "quality": f"a loss below {power.shown_loss_points:.2f} points, the limit is "
                f"{policy.quality_margin_points:g}"
                if policy.quality_margin_points is not None
                else "",
                "NFR": f"an NFR below {100 * power.shown_nfr:.2f} %, the limit is {100 * (policy.max_nfr or 0):g} %",
                "dip": f"a dip below {power.shown_loss_points:.2f} points, the limit is {policy.max_dip_points or 0:g}",
            }[least]
            said += f"; the {least} guard is what fails first: {policy.power:.0%} of the time it can show {shown}"
        found.append(f"{said}.")
    return found
