"""The Python API over a workspace: what the command line does, for programs.

    import graceful
    shop = graceful.create("shop", config="graceful.toml")
    shop.ingest(["photos/"])
    print(shop.update().summary)
    hits = shop.search(["query.jpg"], k=5)[0]

Every method calls the function that the command of that name calls. Errors that a caller can mend are
`graceful.errors.GracefulError`. Nothing is printed unless a workspace is opened with `progress=True`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from graceful.errors import UsageError
from graceful.flows.store.workspace import open_workspace, require_workspace

if TYPE_CHECKING:
    from graceful.evaluation.decision import Decision
    from graceful.flows.search.searcher import GallerySearcher, Hit
    from graceful.flows.update.order import UpdateResult


class Report(NamedTuple):
    """A decision, and the location of the HTML page about it."""

    location: str
    decision: "Decision"


def create(
    root: str | Path,
    config: str | Path | None = None,
    *,
    pictures: str | Path | None = None,
    label: str | None = None,
    progress: bool = False,
) -> "WorkspaceHandle":
    """Create a workspace, or complete one that is there, and open it.

    Args:
        root: Folder, or object-store URI as text.
        config: Configuration to copy into it; by default a template to edit.
        pictures: Folder or file of pictures to look at instead; a configuration that fits them is written.
        label: Column of the labels in a CSV or Parquet file of pictures.
        progress: Whether to show progress on standard error.

    Raises:
        ConfigError: the configuration is wrong, or the workspace has one already.
        InspectionError: nothing can be made of the pictures.
    """
    from graceful.flows.commands.setup import create_workspace

    file = None if config is None else Path(config)
    create_workspace(_place(root), file, None if pictures is None else _place(pictures), label)
    return open(root, progress=progress)


def open(root: str | Path, *, progress: bool = False) -> "WorkspaceHandle":
    """Open a workspace that is there.

    Raises:
        WorkspaceMissingError: there is none.
    """
    require_workspace(_place(root))
    return WorkspaceHandle(_place(root), progress=progress)


class WorkspaceHandle:
    """One workspace. Make it with `graceful.open` or `graceful.create`; it holds nothing open but what it searches."""

    def __init__(self, root: str, *, progress: bool = False) -> None:
        self.root = root
        self._console = Console(stderr=True, quiet=not progress)
        self._searchers: dict[str | None, GallerySearcher] = {}

    def __repr__(self) -> str:
        return f"graceful.open({self.root!r})"

    def ingest(
        self,
        paths: Sequence[str | Path],
        *,
        label: str | None = None,
        prefix: str | None = None,
        replace: bool = False,
    ) -> dict[str, Any]:
        """Add images to the gallery, or new revisions of changed ones, with vectors for whoever must find them.

        Args:
            paths: Images, folders of images, or Parquet files with an image column.
            label: Column with labels, for Parquet and CSV files.
            prefix: First part of the items' ids; by default the name of the folder or file.
            replace: Let these images replace items of the same id from another place.

        Returns:
            How many items were added, changed and unchanged, which images cannot be read, and how many vectors were
            made for each generation.

        Raises:
            ItemClashError: an id would belong to two images; nothing is ingested then.
        """
        from graceful.flows.commands.images import ingest_images

        places = [_place(path) for path in _several(paths, "ingesting")]
        return ingest_images(self.root, places, label, self._console, prefix=prefix, may_replace=replace)

    def update(self, *, again: bool = False, paragon: bool | None = None) -> "UpdateResult":
        """Train a candidate, judge it against what is served, decide, and carry the decision out.

        Run again, it goes on where it was killed; decided before, it does nothing.

        Args:
            again: Judge anew what was decided about before.
            paragon: Also train without constraints; by default what the configuration says.

        Returns:
            Outcome, summary, who serves now, and where the report lies. HOLD and INCONCLUSIVE are outcomes, no errors.
        """
        self._prepare()
        from graceful.flows.commands.updates import update_workspace

        return update_workspace(self.root, self._console, again=again, paragon=paragon)

    def adopt(
        self,
        name: str,
        factory: str,
        *,
        weights: str | Path | None = None,
        kwargs: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> "UpdateResult":
        """Judge an encoder that was trained elsewhere, and roll it out if the gate says so.

        Args:
            name: What to call the encoder; it stands in the lineage.
            factory: "timm/NAME", "torchvision/NAME", or "package.module:function" that returns a torch module
                (n, c, h, w) -> (n, d).
            weights: File of weights to load into it; by default a library's pretrained ones.
            kwargs: Arguments of the factory; what JSON can hold.
            preprocessing: Values that differ from the library's own, or from the configuration's (`image_size`,
                `channels`, `mean`, `std`, `resize`, `resize_size`, `interpolation`, ...).
        """
        self._prepare()
        from graceful.flows.commands.updates import adopt_encoder, update_workspace

        file = None if weights is None else str(weights)
        adopted = adopt_encoder(self.root, name, factory, file, json.dumps(dict(kwargs or {})), preprocessing or {})
        return update_workspace(self.root, self._console, adopted=adopted)

    def status(self) -> dict[str, Any]:
        """Who serves, who owns rows, what is unreadable, what is under way; as `graceful status --json` prints it."""
        from graceful.flows.commands.status import workspace_status

        return workspace_status(self.root)

    def search(self, images: Sequence[str | Path], k: int = 10, *, generation: str | None = None) -> list[list["Hit"]]:
        """Search the gallery with images, as production would; encoder and index stay open and follow the pointer.

        Args:
            images: Files or URIs.
            k: How many items to return for each.
            generation: Query as another than the champion: a generation (its id, or g002: an old client, a canary), or
                a variant by its name (edge), as a phone would.

        Returns:
            For each image up to k hits, best first; scores are cosines, higher is better.

        Raises:
            NothingServedError: no generation serves yet.
            UnreadableQueryError: an image cannot be read, decoded or embedded.
            WrongQueryError: a text tower is asked, which takes texts; see `search_texts`.
            NoVariantError: no variant of this name may read what is served.
        """
        sources = [_place(image) for image in _several(images, "searching")]
        return self._searcher(generation).search_images(sources, k)

    def search_texts(self, texts: Sequence[str], k: int = 10, *, generation: str) -> list[list["Hit"]]:
        """Search the gallery with texts; the tower and the index stay open and follow the pointer.

        Args:
            texts: What to search for, in words.
            k: How many items to return for each.
            generation: The text tower that encodes them: a variant by its name (words), or its id.

        Returns:
            For each text up to k hits, best first; scores are cosines, higher is better.

        Raises:
            NoVariantError: no variant of this name may read what is served.
            WrongQueryError: it takes images.
            UnreadableTextError: a text is empty, too long, or has no vector.
            TextTowerError: the tower cannot be built here, raises, or gives no vectors.
        """
        if isinstance(texts, str):
            raise UsageError(f"searching: expected a list of texts, found the single text {texts!r}; write [text]")
        return self._searcher(generation).search_texts(texts, k)

    def _searcher(self, generation: str | None) -> "GallerySearcher":
        from graceful.flows.search.searcher import GallerySearcher
        from graceful.flows.store.variants import names_variant

        if generation is not None and not names_variant(generation):
            generation = open_workspace(self.root).registry.resolve(generation)
        searcher = self._searchers.get(generation)
        if searcher is None:
            searcher = self._searchers[generation] = GallerySearcher(open_workspace(self.root), generation)
        else:
            searcher.refresh()
        return searcher

    def rollback(self, reason: str = "rollback", *, yes: bool = False) -> dict[str, Any]:
        """Return to the previous generation: one move of a pointer, no data touched. Returns the serving state.

        `yes`: also when items cannot be found afterwards, which is refused otherwise.
        """
        from graceful.flows.commands.status import roll_back

        return roll_back(self.root, reason, yes=yes)

    def report(self, evaluation: str | None = None) -> Report:
        """The decision of an evaluation, by default of the newest, and the location of its report.

        Raises:
            EvaluationMissingError: no update has decided yet, or there is no evaluation of this id.
        """
        from graceful.flows.commands.evaluations import read_report

        return Report(*read_report(self.root, evaluation))

    def _prepare(self) -> None:
        """Set what Prefect reads when it is imported; it starts a server for this process if none runs."""
        from graceful.flows.runtime.environment import prepare_environment

        prepare_environment(self.root)


def _place(given: str | Path) -> str:
    """An absolute local path, or a URI as it was given."""
    text = str(given)
    return text if "://" in text else os.path.abspath(text)


def _several(paths: Sequence[str | Path], doing: str) -> Sequence[str | Path]:
    """A text is a sequence of letters: refuse it before each letter is looked for as a file."""
    if isinstance(paths, str | Path):
        raise UsageError(f"{doing}: expected a list of paths, found the single path {str(paths)!r}; write [path]")
    return paths
