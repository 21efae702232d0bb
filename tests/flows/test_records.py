"""Records of an unknown form are refused by name and place: in the lineage, and in a stored evaluation."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import set_crash_hook
from graceful.flows.store.evaluations import EvaluationMissingError, read_evaluation, recompute
from graceful.flows.store.events import KINDS, Held, Promoted, UpdateCompleted
from graceful.flows.store.registry import LINEAGE_SCHEMA, Registry
from graceful.flows.store.workspace import Workspace
from graceful.indexing.tables import MissingTableError, VersionedTable
from tests.synthetic import item_row


@pytest.fixture
def evaluation(workspace_root) -> Path:
    return next(Path(workspace_root, "evaluations").iterdir())


def change(file: Path, **values: object) -> None:
    record = json.loads(file.read_text())
    record.update(values)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["question.json", "policy.json", "evidence.json", "decision.json"])
def test_a_record_with_an_unknown_key_is_refused_by_key_and_file(evaluation, name):
    change(evaluation / name, surprise=1)
    with pytest.raises(UnknownFormatError, match=rf"surprise.*{name}"):
        recompute(str(evaluation))


@pytest.mark.parametrize("name", ["question.json", "evidence.json", "decision.json"])
def test_a_record_of_another_format_version_is_refused(evaluation, name):
    change(evaluation / name, format_version=99)
    with pytest.raises(UnknownFormatError, match=rf"format_version.*{name}"):
        read_evaluation(str(evaluation))


def test_a_record_that_is_no_json_is_refused_by_file(evaluation):
    (evaluation / "question.json").write_text("{")
    with pytest.raises(UnknownFormatError, match=r"no JSON.*question\.json"):
        read_evaluation(str(evaluation))


def test_a_missing_record_is_named(evaluation):
    (evaluation / "question.json").unlink()
    with pytest.raises(EvaluationMissingError, match=r"expected question\.json, found none"):
        read_evaluation(str(evaluation))


def test_lineage_keeps_what_happened_with_its_fields_and_its_order(tmp_path):
    registry = Registry(str(tmp_path), create=True)
    registry.record(Promoted(), update_key="u", generation="g001-aaaaaa")
    registry.record(UpdateCompleted(compute_s=1.5), update_key="u", generation="g001-aaaaaa")
    assert [event.kind for event in registry.history()] == ["promoted", "update_completed"]
    assert registry.events(UpdateCompleted)[0].payload.compute_s == 1.5
    assert registry.events(Held) == []
    assert len(set(KINDS)) == len(KINDS) == 25


@pytest.mark.parametrize(
    ("kind", "payload", "words"),
    [
        ("beamed_up", "{}", "beamed_up"),
        ("promoted", '{"by": 1}', "Extra inputs"),
        ("decided", "{}", "Field required"),
        ("held", "{", "Expecting"),
    ],
)
def test_an_event_that_is_not_known_is_refused_by_kind_and_place(tmp_path, kind, payload, words):
    registry = Registry(str(tmp_path), create=True)
    row = {"event_id": "e1", "kind": kind, "update_key": "", "generation": "", "at": 1.0, "payload": payload}
    VersionedTable(f"{tmp_path}/lineage", LINEAGE_SCHEMA).append(pa.Table.from_pylist([row], schema=LINEAGE_SCHEMA))
    with pytest.raises(GracefulError) as refused:
        registry.history()
    for word in (words, kind, "e1", str(tmp_path)):
        assert word in str(refused.value)


def test_nothing_empty_takes_the_place_of_a_table_that_is_gone(tmp_path):
    """Neither `init` nor `replay`, which create what a new workspace needs, may do so where one was."""
    root = str(tmp_path / "ws")
    for _ in range(2):
        Workspace(root).create()
    Workspace(root).gallery.ingest(pa.Table.from_pylist([item_row("one", "id1", "a")]))
    for table in ("gallery/vectors", "gallery/items", "registry/serving"):
        shutil.move(tmp_path / "ws" / table, tmp_path / "away")
        with pytest.raises(MissingTableError, match=f"{table}, found none; restore it"):
            Workspace(root).create()
        assert not (tmp_path / "ws" / table).exists()
        shutil.move(tmp_path / "away", tmp_path / "ws" / table)
    shutil.move(tmp_path / "ws" / "registry", tmp_path / "away")
    with pytest.raises(MissingTableError, match="found items and no registry"):
        Workspace(root).create()


@pytest.mark.parametrize("kills", [1, 2])
def test_workspace_whose_creation_was_killed_is_created_by_the_next_one(tmp_path, kills):
    root = str(tmp_path / "ws")

    class CrashError(BaseException):
        pass

    for _ in range(kills):

        def crash(name):
            if name == "workspace-before-marker":
                raise CrashError

        set_crash_hook(crash)
        try:
            with pytest.raises(CrashError):
                Workspace(root).create()
        finally:
            set_crash_hook(None)
    Workspace(root).create()
    assert Workspace(root).gallery.view([]).num_items == 0
