"""Makes and judges text towers: variants from elsewhere, by which the generation that serves is searched with words.

Nothing is trained. A tower is found again by generation, name, factory and parameters as long as it gives the vectors
that it gave when it was made; one that gives others is another variant. It is judged by labelled texts on the
evaluation gallery, beside the tower that answers now; every text is encoded once by every tower.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.evaluation.decision import JUDGING_VERSION
from graceful.evaluation.variants import judge_text_tower, metrics_on
from graceful.files import join
from graceful.flows.runtime.session import Session
from graceful.flows.store.evaluation_set import load_evaluation_set, save_evaluation_set, with_texts
from graceful.flows.store.events import VariantJudged, VariantTrained
from graceful.flows.store.leaks import refuse_trained_on
from graceful.flows.store.registry import Registry
from graceful.flows.store.variants import answering, judged, settle, standing
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.bench import Bench
from graceful.flows.update.freeze import digest
from graceful.flows.update.train import embed_images
from graceful.indexing.embed import EmbeddedUnit, EmbeddingFailedError, EmbedUnit, embed_units
from graceful.training.generation import BackboneSpec, VariantOf, read_card
from graceful.training.known import KnownImages
from graceful.training.probes import EncoderChangedError
from graceful.training.text_tower import TextTowerError, make_text_tower, open_text_encoder
from graceful.training.texts import LabelledTexts, load_texts


def make_tower(session: Session, name: str, spec: BackboneSpec, cloud: str) -> str:
    """Store the text tower of a name for the generation `cloud`, or find it; returns its id.

    Raises: TextTowerError, UsageError for a factory that is not there.
    """
    workspace, registry = session.workspace, session.workspace.registry
    key = digest([cloud, name, "text", spec.model_dump(mode="json")])[:16]
    for event in reversed(registry.events(VariantTrained)):
        if event.payload.training_key == key and _gives_the_same(workspace.generation_uri(event.generation)):
            return event.generation
    folder, variant = join(workspace.root, "generations"), VariantOf(name=name, of=cloud)
    _, card = make_text_tower(folder, spec, variant=variant, generation_uri=workspace.generation_uri(cloud))
    made = VariantTrained(name=name, of=cloud, training_key=key, factory=spec.name)
    registry.record(made, update_key=f"variant-{key}", generation=card.generation_id)
    return card.generation_id


def _gives_the_same(uri: str) -> bool:
    try:
        open_text_encoder(uri)
    except EncoderChangedError:
        return False
    return True


def judge_tower(session: Session, name: str, variant: str, cloud: str) -> VariantJudged:
    """Judge a text tower, certify what it may read, and record it; a judgement from the same inputs is found.

    Raises: TextTowerError, also where the tower that it is compared with cannot be asked any more.
    """
    workspace, registry = session.workspace, session.workspace.registry
    described = session.config.variants[name]
    policy = described.policy(session.config.policy)
    assert described.queries is not None
    texts = load_texts(described.queries)
    images = load_evaluation_set(session.config.evaluation, KnownImages(workspace.known_images_uri))
    evaluation_set = with_texts(images, texts)
    replaced = _replaced(registry, name, variant)
    asked = [policy.model_dump(mode="json"), described.min_quality_points, JUDGING_VERSION]
    key = digest([variant, evaluation_set.set_id, replaced, *asked])[:16]
    known, times = standing(registry, variant, f"variant-{key}")
    if known is not None:
        return known
    refuse_trained_on(workspace, images)
    save_evaluation_set(workspace.root, evaluation_set)
    with workspace.gallery.lease() as version:
        view = workspace.view(cloud, version)
        owners = {owner: rows / view.num_items for owner, rows in view.rows_by_generation().items() if rows}
    towers = {variant: cloud, **({} if replaced is None else {replaced: registry.variants()[replaced]})}
    galleries = list(dict.fromkeys([*view.readable, *towers.values()]))
    for generation in galleries:
        embed_images(session, generation, *images.images)
    bench = Bench(
        evaluation_set,
        {tower: _encoded(session, tower, texts, judging=variant) for tower in towers},
        {name: workspace.cache(name).read(evaluation_set.gallery.content_sha256) for name in galleries},
        {tower: read_card(workspace.generation_uri(tower)).prefix_widths for tower in towers},
    )
    bench.measure_pairs([*((variant, gallery) for gallery in view.readable), *towers.items()])
    outcomes = bench.outcomes()
    verdict = judge_text_tower(
        outcomes,
        policy,
        variant=variant,
        cloud=cloud,
        live_owners=owners,
        chance=bench.chance(policy.metric, policy.k),
        min_quality_points=described.min_quality_points,
        replaced=None if replaced is None else (replaced, towers[replaced]),
    )
    made = VariantJudged(
        name=name,
        of=cloud,
        approved=verdict.approved,
        reason=verdict.reason,
        evaluation_set=evaluation_set.set_id,
        readable=verdict.readable,
        row=metrics_on(outcomes, policy, variant, list(view.readable)),
        takes="text",
    )
    settle(registry, variant, made, update_key=f"variant-{key}", occurrence=times + 1)
    session.progress.say(f"{variant} {made.reason}")
    return made


def _replaced(registry: Registry, name: str, variant: str) -> str | None:
    """The text tower that answers for a name where `variant` does not; None where none does."""
    found = answering(registry, without=variant).get(name)
    return found if found is not None and judged(registry)[found].takes == "text" else None


def _encoded(session: Session, tower: str, texts: LabelledTexts, *, judging: str) -> NDArray[np.float32]:
    """Unit vectors (n, d) of the labelled texts; those that are not known yet are encoded and kept.

    Raises: TextTowerError, naming the first text without a vector, or a tower to compare with that is gone.
    """
    workspace = session.workspace
    hashes = texts.content_sha256
    try:
        failures = _extend(workspace, tower, hashes, texts.texts)
    except GracefulError as error:
        said = error.__cause__ if isinstance(error, EmbeddingFailedError) else error
        if tower == judging:
            raise TextTowerError(str(said)) from error
        raise TextTowerError(
            f"judging {judging}: expected the texts' vectors by {tower}, which it takes the place of, found that it "
            f"cannot be asked ({said}); restore it, or take it out with 'graceful retire {tower} --reason ...'"
        ) from error
    if failures:
        text, reason = next(iter(failures.items()))
        raise TextTowerError(
            f"encoding texts with {tower}: expected finite vectors that are not zero for {len(set(hashes))} labelled "
            f"texts, found {len(failures)} without (first {text!r}: {reason}); correct the tower, or leave those texts "
            "out"
        )
    return workspace.cache(tower).read(hashes)


def _extend(workspace: Workspace, tower: str, hashes: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """Encode the texts that a tower has not; returns {text: reason} of those that have no vector."""
    opener = partial(open_text_encoder, workspace.generation_uri(tower))

    def encode(units: Sequence[EmbedUnit], on_unit: Callable[[EmbeddedUnit], None]) -> None:
        embed_units(units, opener, on_unit=on_unit)

    return workspace.cache(tower).extend(hashes, texts, encode)[1]
