"""Labelled texts are read as data sets are, and what cannot be searched with is refused by name."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graceful.errors import UsageError
from graceful.training.datasets import EmptyDatasetError
from graceful.training.manifest import DatasetNotFoundError
from graceful.training.texts import MAX_TEXT_CHARS, TextQueriesConfig, UnreadableTextError, checked_text, load_texts

TABLE = {
    "said": ["a red shoe", "ein Haus, am See", "boots"],
    "kind": ["shoe", "house", "shoe"],
    "colour": ["red", "white", "black"],
    "year": [2019, 2020, 2021],
}


def config(tmp_path: Path, source: str, table=TABLE, **changes) -> TextQueriesConfig:
    path = tmp_path / f"texts.{source}"
    if source == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        rows = zip(*table.values(), strict=True)
        quoted = [",".join('"' + ("" if value is None else str(value)) + '"' for value in row) for row in rows]
        path.write_text("\n".join([",".join(table), *quoted]) + "\n")
    given = {"text_column": "said", "label_columns": ["kind", "colour"], **changes}
    return TextQueriesConfig.model_validate({"source": source, "path": str(path), **given})


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_texts_come_in_the_order_of_their_rows_with_labels_as_images_have_them(tmp_path, source):
    found = load_texts(config(tmp_path, source))
    assert found.texts == TABLE["said"]
    assert found.labels.tolist() == ["shoe/red", "house/white", "shoe/black"]
    assert found.clusters.tolist() == found.labels.tolist()
    assert found.sources == [f"{tmp_path}/texts.{source}#{row}" for row in range(3)]
    assert found.content_sha256[0] == hashlib.sha256(b"a red shoe").hexdigest()
    chosen = load_texts(config(tmp_path, source, where={"kind": ["shoe"]}, label_columns=["colour"], cluster="kind"))
    assert (chosen.texts, chosen.labels.tolist()) == (["a red shoe", "boots"], ["red", "black"])
    assert chosen.clusters.tolist() == ["shoe", "shoe"]
    assert chosen.sources[1].endswith("#2"), "the row in the file"


def test_a_range_and_several_files_are_taken_too(tmp_path):
    one = config(tmp_path, "parquet", where={"year": {"min": 2020}})
    assert load_texts(one).texts == TABLE["said"][1:]
    both = one.model_copy(update={"path": (one.path, one.path)})
    assert load_texts(both).texts == TABLE["said"][1:] * 2


@pytest.mark.parametrize("source", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("table", "changes", "said"),
    [
        (TABLE, {"text_column": "text"}, r"expected the columns \['text'\]"),
        (TABLE, {"label_columns": ["label"]}, r"expected the columns \['label'\]"),
        (TABLE, {"where": {"kind": ["hat"]}}, "found none among 3 rows"),
        ({**TABLE, "said": ["a", None, "b"]}, {}, r"#1: expected a text, found nothing"),
        (
            {**TABLE, "said": ["a", "b", "x" * 1001]},
            {},
            r"#2: expected a text of at most 1,000 characters, found 1,001",
        ),
        ({**TABLE, "kind": ["a", None, "b"]}, {}, "expected a label in every row, found 1 without"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, source, table, changes, said):
    with pytest.raises((UsageError, EmptyDatasetError), match=said):
        load_texts(config(tmp_path, source, table, **changes))


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path, source):
    asked = config(tmp_path, source)
    Path(str(asked.path)).unlink()
    with pytest.raises(DatasetNotFoundError, match="found none"):
        load_texts(asked)


def test_a_text_is_searched_with_as_it_is():
    assert checked_text(" a red shoe\n") == " a red shoe\n"
    assert checked_text("x" * MAX_TEXT_CHARS)
    for wrong in ("", " \t\n", "x" * (MAX_TEXT_CHARS + 1), "\ud800"):
        with pytest.raises(UnreadableTextError, match="searching: expected a text"):
            checked_text(wrong)
