"""Makes and judges the variants of the generation that serves: encoders that only query, such as one for phones.

After an update has carried its decision out, so that no variant delays or changes it; or asked for by name. A variant
is trained on what its generation was trained on, from scratch, against the stored vectors of that generation and of
every older one whose rows it reads: no network of theirs is run in the loop. Certificates come before the judgement
that lets it answer, and each step finds its own earlier output: a training by generation, name and recipe, a judgement
by variant, evaluation set and policy. Text towers, which come from elsewhere, are made and judged by `text_towers`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.decision import JUDGING_VERSION
from graceful.evaluation.outcomes import Outcomes
from graceful.evaluation.variants import judge_variant, metrics_on
from graceful.files import join, remove
from graceful.flows.runtime.session import Session
from graceful.flows.settings.config import ConfigError
from graceful.flows.store.evaluation_set import EvaluationSet, load_evaluation_set, save_evaluation_set
from graceful.flows.store.events import Trained, UpdateStarted, VariantJudged, VariantTrained
from graceful.flows.store.leaks import refuse_trained_on
from graceful.flows.store.registry import Registry, read_by
from graceful.flows.store.variants import settle, standing
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.act import Step
from graceful.flows.update.bench import Bench, production_owners
from graceful.flows.update.freeze import digest
from graceful.flows.update.text_towers import judge_tower, make_tower
from graceful.flows.update.train import embed_images, lay_vectors, train, training_job
from graceful.indexing.gallery import View
from graceful.training.generation import VariantOf, ordinal_of, read_card
from graceful.training.job import TRAINING_VERSION
from graceful.training.known import KnownImages
from graceful.training.manifest import read_manifest


def make_variants(session: Session, names: Sequence[str], do: Step) -> dict[str, str]:
    """Train and judge variants of the generation that serves, those that are there already left alone; name -> id.

    Raises:
        ConfigError: the configuration describes no variant of a name, or nothing serves yet.
    """
    cloud = served_with(session, names)
    found = {}
    for name in names:
        found[name] = do(f"train variant {name}", partial(train_variant, session, name, cloud))
        do(f"judge variant {name}", partial(judge, session, name, found[name], cloud))
    return found


def served_with(session: Session, names: Sequence[str]) -> str:
    """The generation that serves, of which variants of these names can be made. Raises ConfigError where none can."""
    unknown = [name for name in names if name not in session.config.variants]
    if unknown:
        raise ConfigError(
            f"making the variant {unknown[0]}: expected a table [variants.{unknown[0]}] in the configuration, found "
            f"{', '.join(session.config.variants) or 'no variants'}; add it"
        )
    cloud = session.workspace.registry.serving().champion
    if cloud is None:
        raise ConfigError("making a variant: expected a generation that serves, found none; run 'graceful update'")
    return cloud


def train_variant(session: Session, name: str, cloud: str) -> str:
    """Train a variant of the generation `cloud`, or make its text tower, or find it; returns its id."""
    workspace, registry = session.workspace, session.workspace.registry
    if (tower := session.config.variants[name].tower) is not None:
        return make_tower(session, name, tower, cloud)
    recipe = session.config.variants[name].recipe(session.config.training)
    key = digest([cloud, name, recipe.model_dump(mode="json"), TRAINING_VERSION])[:16]
    for event in registry.events(VariantTrained):
        if event.payload.training_key == key:
            return event.generation
    made = update_of(registry, cloud)
    images = read_manifest(workspace.manifest_uri(made.update_key))
    folder = f"variant-{key}"
    laid = [lay_vectors(session, folder, generation, images) for generation in constrained(workspace, cloud)]
    frozen = made.model_copy(update={"training_key": key, "ordinal": ordinal_of(cloud)})
    variant = VariantOf(name=name, of=cloud)
    card = train(session, training_job(session, frozen, recipe, name, workspace.generation_uri(cloud), laid, variant))
    trained = VariantTrained(name=name, of=cloud, training_key=key, summary=card.training)
    registry.record(trained, update_key=folder, generation=card.generation_id)
    remove(join(workspace.update_uri(folder), "predecessors"))  # copies from the caches
    return card.generation_id


def judge(session: Session, name: str, variant: str, cloud: str) -> VariantJudged:
    """Judge a variant, certify what it may read, and record it; a judgement from the same inputs is found."""
    described = session.config.variants[name]
    if described.tower is not None:
        return judge_tower(session, name, variant, cloud)
    workspace, policy = session.workspace, described.policy(session.config.policy)
    evaluation_set = load_evaluation_set(session.config.evaluation, KnownImages(workspace.known_images_uri))
    key = digest([variant, evaluation_set.set_id, policy.model_dump(mode="json"), JUDGING_VERSION])[:16]
    known, times = standing(workspace.registry, variant, f"variant-{key}")
    if known is not None:
        return known
    refuse_trained_on(workspace, evaluation_set)
    save_evaluation_set(workspace.root, evaluation_set)
    with workspace.gallery.lease() as version:
        view = workspace.view(cloud, version)
        outcomes, chance = _measure(session, evaluation_set, variant, cloud, view)
        owners = {owner: rows / view.num_items for owner, rows in view.rows_by_generation().items() if rows}
    verdict = judge_variant(outcomes, policy, variant=variant, cloud=cloud, live_owners=owners, chance=chance)
    made = VariantJudged(
        name=name,
        of=cloud,
        approved=verdict.approved,
        reason=verdict.reason,
        evaluation_set=evaluation_set.set_id,
        readable=verdict.readable,
        row=metrics_on(outcomes, policy, variant, [*view.readable, variant]),
        of_self_test=metrics_on(outcomes, policy, cloud, [cloud]).get(cloud),
    )
    settle(workspace.registry, variant, made, update_key=f"variant-{key}", occurrence=times + 1)
    session.progress.say(f"{variant} {made.reason}")
    return made


def _measure(
    session: Session, evaluation_set: EvaluationSet, variant: str, cloud: str, view: View
) -> tuple[Outcomes, float | None]:
    """Outcomes of variant and cloud on pure galleries and on the rows of each owner, and what chance would reach."""
    workspace, policy = session.workspace, session.config.policy
    everyone = [*view.readable, variant]
    for generation in everyone:
        embed_images(session, generation, *evaluation_set.images)

    def vectors(hashes: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        return {generation: workspace.cache(generation).read(hashes) for generation in everyone}

    bench = Bench(
        evaluation_set,
        vectors(evaluation_set.queries.content_sha256),
        vectors(evaluation_set.gallery.content_sha256),
        {name: read_card(workspace.generation_uri(name)).prefix_widths for name in everyone},
    )
    owners = production_owners(evaluation_set, view, cloud)
    bench.measure_pairs([(query, gallery) for query in (cloud, variant) for gallery in view.readable])
    bench.measure_pairs([(variant, variant)])
    live = [owner for owner, rows in view.rows_by_generation().items() if rows and owner != cloud]
    for query in (cloud, variant):
        bench.measure_live(query, owners, live)
    return bench.outcomes(), bench.chance(policy.metric, policy.k)


def constrained(workspace: Workspace, cloud: str) -> list[str]:
    """The generation itself, and every older one whose rows it reads: they have vectors to compare with."""
    rows = workspace.view(cloud).rows_by_generation()
    older = [
        name
        for name in read_by(cloud, workspace.registry.certificates())
        if rows.get(name) and ordinal_of(name) < ordinal_of(cloud)
    ]
    return [*older, cloud]


def update_of(registry: Registry, generation: str) -> UpdateStarted:
    """The update that made a generation: its training images are the variant's."""
    keys = {event.update_key for event in registry.events(Trained) if event.generation == generation}
    return next(event.payload for event in registry.events(UpdateStarted) if event.update_key in keys)
