"""Records of an unknown form are refused by name and place: in the lineage, and in a stored evaluation."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from graceful.errors import GracefulError, UnknownFormatError
from graceful.flows.store.evaluations import EvaluationMissingError, read_evaluation, recompute
from graceful.flows.store.events import KINDS, Held, Promoted, UpdateCompleted
from graceful.flows.store.registry import LINEAGE_SCHEMA, Registry
from graceful.indexing.tables import VersionedTable


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
    assert len(set(KINDS)) == len(KINDS) == 16


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
