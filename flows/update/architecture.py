"""Looks for a variant's architecture: a super-net under the variant's constraints, then parts of it on the dev part.

The variant itself is made as ever, once the architecture that was found stands in the configuration: what is trained
is what can be read there. Each step finds its own earlier output: the super-net by generation, name and recipe, every
measured network in the search's file, which is written anew after each.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from graceful.files import exists, join, read_json, remove, write_json
from graceful.flows.runtime.session import Session
from graceful.flows.settings.config import ConfigError
from graceful.flows.update.freeze import digest
from graceful.flows.update.train import lay_vectors, train, training_job
from graceful.flows.update.variants import constrained, served_with, update_of
from graceful.training.architecture import Candidate, SearchConfig, best
from graceful.training.generation import VariantOf, ordinal_of
from graceful.training.job import TRAINING_VERSION, DevPart
from graceful.training.manifest import read_manifest
from graceful.training.search import search
from graceful.training.supernet import supernet_recipe

FORMAT_VERSION = 1


class SearchRecord(BaseModel):
    """A search for an architecture, as stored in searches/<key>.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(default=FORMAT_VERSION, description="Version of this record.")
    name: str = Field(description="Name of the variant.")
    of: str = Field(description="Generation that the variant queries for.")
    supernet: str = Field(description="Id of the super-net; its folder is beside those of the generations.")
    search: SearchConfig = Field(description="Space, limits and number of networks.")
    candidates: tuple[Candidate, ...] = Field(description="What was measured, in this order.")

    @property
    def best(self) -> Candidate:
        """The candidate of the highest reward."""
        return best(self.candidates)


def search_architectures(session: Session, names: Sequence[str]) -> list[SearchRecord]:
    """Search the architecture of variants of the generation that serves; one that was killed goes on.

    Raises:
        ConfigError: a variant has no table `search`, nothing serves, or the generation has no dev part.
        UsageError: the limits leave nothing of the space.
    """
    cloud = served_with(session, names)
    for name in names:
        if session.config.variants[name].tower is not None:
            raise ConfigError(
                f"searching the architecture of {name}: expected a network that is trained here, found a text tower; "
                "name another variant"
            )
        if session.config.variants[name].search is None:
            raise ConfigError(
                f"searching the architecture of {name}: expected a table [variants.{name}.search] in the "
                "configuration, found none; add it, with block_widths and a limit such as max_multiply_adds"
            )
    if session.cluster.submits_jobs:
        raise ConfigError(
            "searching an architecture: expected a cluster that this process joins, found "
            f"{session.config.cluster.address}, to which jobs are submitted; run this on the cluster with "
            'cluster.address = "auto"'
        )
    return [_search(session, name, cloud) for name in names]


def _search(session: Session, name: str, cloud: str) -> SearchRecord:
    workspace, variant = session.workspace, session.config.variants[name]
    assert variant.search is not None
    made = update_of(workspace.registry, cloud)
    if not exists(workspace.dev_uri(made.update_key)):
        raise ConfigError(
            f"searching the architecture of {name}: expected a dev part that {cloud} was not trained on, found none; "
            "set evaluation.dev = { share = 0.1 } and update: networks are compared on it, never on the evaluation set"
        )
    recipe = supernet_recipe(variant.recipe(session.config.training), variant.search)
    key = digest([cloud, name, recipe.model_dump(mode="json"), TRAINING_VERSION])[:16]
    folder, images = f"search-{key}", read_manifest(workspace.manifest_uri(made.update_key))
    laid = [lay_vectors(session, folder, generation, images) for generation in constrained(workspace, cloud)]
    frozen = made.model_copy(update={"training_key": key, "ordinal": ordinal_of(cloud)})
    uri, of = workspace.generation_uri(cloud), VariantOf(name=name, of=cloud)
    job = training_job(session, frozen, recipe, f"{name}-supernet", uri, laid, of)
    supernet = train(session, job).generation_id
    aside = read_manifest(workspace.dev_uri(made.update_key))
    beside = lay_vectors(session, folder, cloud, aside, "-dev")
    dev = DevPart(manifest_uri=workspace.dev_uri(made.update_key), predecessors=(beside,))
    job = job.model_copy(update={"dev": dev})

    asked = variant.search.model_dump(mode="json", exclude={"evaluations"})  # with more of them, it goes on
    where = workspace.search_uri(digest([supernet, asked])[:16])
    candidates = SearchRecord.model_validate(read_json(where)).candidates if exists(where) else ()
    record = SearchRecord(name=name, of=cloud, supernet=supernet, search=variant.search, candidates=candidates)
    if len(record.candidates) < variant.search.evaluations:
        session.encoders.release()  # the trials may need every processor that the embedding workers hold
        session.cluster.ensure()
    with session.progress.track(f"searching the architecture of {name}", variant.search.evaluations) as advance:
        measured = list(record.candidates)
        advance(len(measured))

        def keep(candidate: Candidate) -> None:
            measured.append(candidate)
            write_json(where, record.model_copy(update={"candidates": tuple(measured)}).model_dump(mode="json"))
            advance(1, f"reward {best(measured).reward:.4f}")

        search(job, workspace.generation_uri(supernet), variant.search, record.candidates, keep)
    remove(join(workspace.update_uri(folder), "predecessors"))  # copies from the caches
    return record.model_copy(update={"candidates": tuple(measured)})
