"""Clusterings of the gallery as they are stored: who is on which photo, one Parquet file per run, never changed.

`clusters/<number>-<random>.parquet` has item_id, cluster ("" for nobody) and name; its metadata says by what it was
made. The newest one that is no preview is what people see, and the next run keeps its names. Two runs at the same time
leave two files: none is lost. Forgetting items writes every file again without them.
"""

import json
import uuid
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graceful.errors import UnknownFormatError
from graceful.files import join, list_files, read_bytes, writing
from graceful.flows.store.workspace import Workspace
from graceful.indexing.cluster_choice import ClusteringConfig

_KEY = b"graceful_clustering"


class Made(BaseModel):
    """By what a clustering was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(default=1, ge=1, le=1)
    number: int = Field(ge=1, description="Rises from run to run.")
    generation: str = Field(description="Whose view was clustered.")
    preview: bool = Field(description="Another generation than the champion: its names are not kept by the next run.")
    config: ClusteringConfig = Field(description="How.")
    next_person: int = Field(ge=1, description="Number of the next person without a name of before.")


class Clustering:
    """One stored clustering: `item_ids`, `cluster` and `name` (N,), sorted by item id."""

    def __init__(
        self, made: Made, item_ids: NDArray[np.str_], cluster: NDArray[np.str_], name: NDArray[np.str_], uri: str = ""
    ) -> None:
        """Values that belong together; `uri` once it is stored."""
        self.made, self.item_ids, self.cluster, self.name, self.uri = made, item_ids, cluster, name, uri

    def names_of(self, item_ids: NDArray[np.str_]) -> NDArray[np.str_]:
        """Name (n,) of each item; "" for nobody and for items that were not there."""
        if not len(self.item_ids):
            return np.full(len(item_ids), "", np.str_)
        place = np.minimum(np.searchsorted(self.item_ids, item_ids), len(self.item_ids) - 1)
        return np.where(self.item_ids[place] == item_ids, self.name[place], "")


def clusterings(workspace: Workspace) -> list[str]:
    """Locations of all stored clusterings, oldest first."""
    return [uri for uri in list_files(workspace.clusters_uri()) if uri.endswith(".parquet")]


def newest(workspace: Workspace) -> Clustering | None:
    """The newest clustering that is no preview. Raises UnknownFormatError."""
    for uri in reversed(clusterings(workspace)):
        if not _made(uri).preview:
            return read_clustering(uri)
    return None


def next_number(workspace: Workspace) -> int:
    """Number of the next run."""
    return 1 + max((_made(uri).number for uri in clusterings(workspace)), default=0)


def write_clustering(workspace: Workspace, clustering: Clustering) -> str:
    """Store a clustering; returns its location."""
    name = f"{clustering.made.number:06}-{uuid.uuid4().hex[:8]}.parquet"
    table = pa.table(
        {
            "item_id": pa.array(clustering.item_ids.tolist(), pa.string()),
            "cluster": pa.array(clustering.cluster.tolist(), pa.string()),
            "name": pa.array(clustering.name.tolist(), pa.string()),
        }
    )
    uri = join(workspace.clusters_uri(), name)
    _write(uri, table.replace_schema_metadata({_KEY: clustering.made.model_dump_json()}))
    return uri


def read_clustering(uri: str) -> Clustering:
    """Read a stored clustering. Raises UnknownFormatError."""
    made = _made(uri)
    table = pq.read_table(pa.BufferReader(read_bytes(uri)))
    item_ids, cluster, name = (np.array(table[key].to_pylist(), np.str_) for key in ("item_id", "cluster", "name"))
    return Clustering(made, item_ids, cluster, name, uri)


def forget_in_clusterings(workspace: Workspace, item_ids: Sequence[str]) -> int:
    """Write every clustering that names one of the items again, without them; returns how many were."""
    num_changed = 0
    for uri in clusterings(workspace):
        table = pq.read_table(pa.BufferReader(read_bytes(uri)))
        named = pc.is_in(table["item_id"], value_set=pa.array(list(item_ids), pa.string()))
        if pc.any(named).as_py():
            _write(uri, table.filter(pc.invert(named)))
            num_changed += 1
    return num_changed


def _write(uri: str, table: pa.Table) -> None:
    with writing(uri) as stream:
        pq.write_table(table, stream)


def _made(uri: str) -> Made:
    try:
        metadata = pq.read_schema(pa.BufferReader(read_bytes(uri))).metadata or {}
        return Made.model_validate(json.loads(metadata[_KEY]))
    except (KeyError, ValidationError, pa.ArrowInvalid) as error:
        found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "another file"
        raise UnknownFormatError(
            f"reading a clustering: expected one that this program wrote, found {found} (at {uri}); remove the file, "
            "or use the program version that wrote it"
        ) from None
