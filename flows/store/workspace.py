"""A workspace: the root below which everything the pipeline remembers lies, and the handles on it.

The layout is written down here once; every other module asks for a location by name.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property

from graceful.errors import GracefulError
from graceful.files import crash_point, exists, is_remote, join, write_json
from graceful.flows.store.registry import Registry, read_by
from graceful.flows.store.variants import live_variants, refuse_variant
from graceful.indexing.cache import EmbeddingCache
from graceful.indexing.gallery import Gallery, GalleryVersion, View
from graceful.indexing.reindex import EmbedFunction
from graceful.indexing.tables import MissingTableError, in_use
from graceful.training.generation import variant_in

_CREATED = "created.json"
EmbedWith = Callable[[str], EmbedFunction]
"""Generation id -> function that embeds units with that generation's encoder."""


class WorkspaceMissingError(GracefulError):
    """There is no workspace at this location."""


class UnsupportedGenerationError(GracefulError):
    """Queries of this generation are no longer answered: its items are not kept."""


class Workspace:
    """Handles on the gallery and the registry below one root, and how to embed with a generation."""

    def __init__(self, root: str, embed_with: EmbedWith | None = None, *, create: bool = False) -> None:
        """Open the workspace; with `create` its tables are made on first use. Without `embed_with` it is only read."""
        self.root = root
        self._create = create
        self.embed_with = embed_with or _no_encoder

    @cached_property
    def gallery(self) -> Gallery:
        """The gallery."""

        def check_owner(generation: str) -> None:
            refuse_variant(self.registry, f"writing vectors of {generation}", generation)

        return Gallery(join(self.root, "gallery"), create=self._create, check_owner=check_owner)

    @cached_property
    def registry(self) -> Registry:
        """The registry."""
        return Registry(join(self.root, "registry"), create=self._create)

    def create(self) -> None:
        """Make the tables of a new workspace; one that was made before is only opened.

        Raises:
            MissingTableError: it was made before, and a table is gone: nothing empty takes its place.
        """
        marker = join(self.root, "registry", _CREATED)
        used = in_use(join(self.root, "registry"), ("lineage", "serving"))
        self._create = not exists(marker) and not used
        if self._create and exists(join(self.root, "gallery", "items")) and self.gallery.view([]).num_items:
            raise MissingTableError(
                f"creating the workspace: expected an empty gallery, found items and no registry ({self.root}); "
                "restore the folder 'registry' from a backup, or choose another folder"
            )
        self.gallery.version()
        self.registry.serving()
        crash_point("workspace-before-marker")
        if not exists(marker):
            write_json(marker, {"format_version": 1})

    def cache(self, generation: str) -> EmbeddingCache:
        """The embedding cache of a generation."""
        return EmbeddingCache(join(self.root, "caches", generation))

    def generation_uri(self, generation: str) -> str:
        """The folder of a generation."""
        return join(self.root, "generations", generation)

    def evaluation_uri(self, evaluation_id: str) -> str:
        """The folder of an evaluation: outcomes, evidence, decision, report."""
        return join(self.root, "evaluations", evaluation_id)

    def update_uri(self, update_key: str) -> str:
        """The folder of an update's frozen inputs."""
        return join(self.root, "updates", update_key)

    def manifest_uri(self, update_key: str) -> str:
        """The list of images that an update trains on."""
        return join(self.update_uri(update_key), "training.parquet")

    def dev_uri(self, update_key: str) -> str:
        """The list of images that an update chooses by; not there without a dev part."""
        return join(self.update_uri(update_key), "dev.parquet")

    def search_uri(self, key: str) -> str:
        """The networks that a search for an architecture has measured."""
        return join(self.root, "searches", f"{key}.json")

    @property
    def known_images_uri(self) -> str:
        """What was found of images that were read before; derived."""
        return join(self.root, "known_images")

    def throughput_uri(self, generation: str) -> str:
        """How fast a generation's encoder was, for pricing."""
        return join(self.root, "throughput", f"{generation}.json")

    def clusters_uri(self) -> str:
        """The folder of clusterings: who is on which photo."""
        return join(self.root, "clusters")

    def index_location(self) -> str:
        """The folder of index snapshots.

        FAISS reads local files: of a workspace in an object store, every machine builds the index for itself.
        """
        if not is_remote(self.root):
            return join(self.root, "index")
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return os.path.join(home, "graceful", "index", hashlib.sha256(self.root.encode()).hexdigest()[:16])

    def view(self, query_generation: str, version: GalleryVersion | None = None) -> View:
        """What a query generation sees: the reading rule applied to its certificates."""
        return self.gallery.view(self.registry.readable(query_generation), version)

    def kept(self, supported: Sequence[str] = ()) -> list[str]:
        """Generations that must keep seeing what they see, the champion first: the one rule of what is protected.

        The champion; the previous one, to which a rollback returns, or the one that a rollback left; those whose plan
        is prepared or under way; the clients that are supported; and the candidate that waits for the operator's word.
        """
        serving = self.registry.serving()
        plan = self.registry.plan_generation(serving.active_plan) if serving.active_plan else None
        names = [serving.champion, serving.previous, serving.left, serving.prepared, plan, *supported]
        names.append(self.registry.pending_generation())
        return list(dict.fromkeys(name for name in names if name is not None))

    def protected(self, supported: Sequence[str] = ()) -> list[list[str]]:
        """Readable lists of every generation that is kept, and of the variants that query for them."""
        names, pairs = self.kept(supported), self.registry.certificates()
        # A generation that is being embedded before it is certified protects its own vectors; a variant has none.
        own = [name for name in names if variant_in(name) is None]
        variants = live_variants(self.registry, names, supported)
        return [
            *(read_by(name, pairs) if (name, name) in pairs else [name] for name in own),
            *(read_by(variant, pairs) for variant in variants),
        ]

    def fence(self) -> None:
        """Let every collection under way look again at what is protected, before it removes anything."""
        self.gallery.fence()

    def may_query(self, generation: str, supported: Sequence[str] = ()) -> None:
        """Refuse queries of a generation whose view is not kept: answers would become fewer without a word.

        Raises:
            UncertifiedGenerationError: it may not even read its own rows.
            UnsupportedGenerationError: it has been released, retired, or never served.
        """
        self.registry.readable(generation)
        names = self.kept(supported)
        names = [*names, *live_variants(self.registry, names, supported)]
        if generation not in names:
            certified = {query for query, gallery in self.registry.certificates() if query == gallery}
            others = ", ".join(name for name in names if name in certified) or "none yet"
            raise UnsupportedGenerationError(
                f"querying as {generation}: expected a generation whose items are kept, found one that is not (it was "
                f"released); generations that may query: {others}; list old clients in "
                "gallery.supported_query_generations"
            )


def open_workspace(root: str) -> Workspace:
    """Open a workspace that is there, for a command that embeds nothing. Raises WorkspaceMissingError."""
    require_workspace(root)
    return Workspace(root)


def require_workspace(root: str) -> None:
    """Raise WorkspaceMissingError, saying what to do, unless there is a workspace at `root`."""
    if not exists(join(root, "registry")):
        raise WorkspaceMissingError(
            f"opening the workspace: expected one at {root}, found none; create it with 'graceful init'"
        )


def _no_encoder(generation: str) -> EmbedFunction:
    raise AssertionError(f"embedding with {generation}: this workspace was opened without encoders")
