"""Labelled texts: what people would type, with the labels of the images that they should find. No image, no torch.

By them a text tower is judged. One row is one text and one label: of a text that fits images of several labels, a hit
of another label than its row's counts as wrong.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from graceful.errors import GracefulError, UsageError
from graceful.training.datasets import EmptyDatasetError, Where, where_mask
from graceful.training.rows import as_text, table_rows

MAX_TEXT_CHARS = 1_000
"""Characters of the longest text that is searched with."""


class UnreadableTextError(GracefulError):
    """A text that cannot be searched with: empty, too long, or without a vector."""


class TextQueriesConfig(BaseModel):
    """Labelled texts: a table with a text in each row, and the label of the images that it should find."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["parquet", "csv"] = Field(description="Kind of file; of CSV, UTF-8 with a header.")
    path: str | tuple[str, ...] = Field(description="File or files; of Parquet also a folder of them.")
    text_column: str = Field(default="text", description="Column with the texts.")
    label_columns: tuple[str, ...] = Field(
        default=("label",),
        min_length=1,
        description="Joined with / to the label, as those of the evaluation gallery are, whose labels they name.",
    )
    where: Where = Field(default_factory=dict, description="Column to its allowed values, or to {min, max}.")
    cluster: str | None = Field(
        default=None, description="Column whose values are resampled together; by default the label."
    )


@dataclass(frozen=True)
class LabelledTexts:
    """Aligned rows: where each is from, its text, its label, and what it is resampled together with."""

    sources: list[str]
    texts: list[str]
    labels: NDArray[np.str_]
    clusters: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def content_sha256(self) -> list[str]:
        """Digest of each text, by which its vectors are kept."""
        return [hashlib.sha256(text.encode()).hexdigest() for text in self.texts]


def load_texts(config: TextQueriesConfig) -> LabelledTexts:
    """Read labelled texts, in the order of files and rows.

    Raises: DatasetNotFoundError, EmptyDatasetError, UsageError for a missing column, label or text.
    """
    paths = (config.path,) if isinstance(config.path, str) else config.path
    further = [config.text_column, *config.where, *([config.cluster] if config.cluster else [])]
    rows = table_rows(config.source, paths, config.label_columns, further)
    chosen = np.flatnonzero(where_mask(config.where, rows.columns, len(rows.sources)))
    if not len(chosen):
        raise EmptyDatasetError(
            f"loading texts: expected at least one, found none among {len(rows.sources)} rows that pass "
            f"where={config.where} (in {', '.join(paths)}); check the filter"
        )
    texts = []
    for row in chosen:
        given = rows.columns[config.text_column][row]
        try:
            texts.append(checked_text("" if given is None else str(given)))
        except UnreadableTextError as error:
            raise UsageError(f"loading texts: {rows.sources[row]}: {str(error).partition(': ')[2]}") from None
    labels = rows.labels[chosen]
    clusters = labels if config.cluster is None else as_text(rows.columns[config.cluster][chosen])
    return LabelledTexts([rows.sources[row] for row in chosen], texts, labels, clusters)


def checked_text(text: str) -> str:
    """Return a text that may be searched with, as it is. Raises UnreadableTextError."""
    if not text.strip():
        raise UnreadableTextError("searching: expected a text, found nothing; say what to search for")
    if len(text) > MAX_TEXT_CHARS:
        raise UnreadableTextError(
            f"searching: expected a text of at most {MAX_TEXT_CHARS:,} characters, found {len(text):,}; shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry
        raise UnreadableTextError("searching: expected a text, found what is no Unicode; send it anew") from None
    return text
