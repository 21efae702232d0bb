"""The Python API does what the commands do: one workspace from its creation to a rollback."""

import shutil
from pathlib import Path

import pytest

import graceful
from graceful.flows.commands.status import workspace_status
from graceful.flows.update.order import UpdateResult
from tests.flows import running, tiny


@pytest.fixture
def updates_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update without a flow server; what is Prefect's is tested with the command."""

    def update_workspace(
        root: str, console: object, *, again: bool = False, adopted: str | None = None, paragon: bool | None = None
    ) -> UpdateResult:
        return running.update(root, again=again, adopted=adopted)

    monkeypatch.setattr("graceful.flows.commands.updates.update_workspace", update_workspace)
    monkeypatch.setattr("graceful.flows.runtime.environment.prepare_environment", lambda root: None)


def test_a_workspace_is_made_filled_updated_searched_and_rolled_back(
    tmp_path: Path, digits_file: Path, updates_in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "config", digits_file)
    shop = graceful.create(tmp_path / "shop", config)
    assert repr(shop) == f"graceful.open({str(tmp_path / 'shop')!r})"

    photos, later = tmp_path / "photos", tmp_path / "later"
    photos.mkdir()
    later.mkdir()
    from graceful.training.images import read_payloads

    for row, payload in enumerate(read_payloads([f"{digits_file}#{row}" for row in range(13)])):
        ((photos if row < 12 else later) / f"{row}.png").write_bytes(payload)
    assert shop.ingest([photos])["added"] == 12
    found = shop.ingest([photos, later])
    assert (found["unchanged"], found["added"]) == (12, 1)

    assert shop.update().outcome == "BOOTSTRAP"
    assert shop.status() == workspace_status(shop.root)
    hits = shop.search([photos / "3.png", str(photos / "5.png")], k=2)
    assert [len(found) for found in hits] == [2, 2]
    assert hits[0][0].score == pytest.approx(1.0, abs=1e-2)
    assert "3.png" in hits[0][0].source

    tiny.write_config(Path(shop.root), digits_file, tiny.grown(5))
    result = shop.update()
    assert result.repeated is False
    location, decision = shop.report()
    assert (decision.outcome, Path(location).name) == (result.outcome, "report.html")
    assert result.champion == shop.status()["champion"] != hits[0][0].generation
    shop.search([photos / "3.png"])  # the open searcher follows
    assert shop.rollback("test")["champion"] == hits[0][0].generation
    assert shop.search([photos / "3.png"], k=1)[0][0].generation == hits[0][0].generation
    assert capsys.readouterr().out == ""


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(graceful.GracefulError, match="graceful init"):
        graceful.open(tmp_path)
    shop = graceful.create(tmp_path / "shop")
    with pytest.raises(graceful.GracefulError, match="graceful update"):
        shop.search(["query.jpg"])
    with pytest.raises(graceful.GracefulError, match="no update has decided yet"):
        shop.report()
    with pytest.raises(ValueError, match="expected a list of paths"):
        shop.ingest("photos")
    with pytest.raises(ValueError, match="expected a list of paths"):
        shop.search("query.jpg")


def test_a_copied_workspace_opens_elsewhere(workspace_root: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace_root, tmp_path / "copy")
    assert graceful.open(tmp_path / "copy").status() == graceful.open(str(workspace_root)).status()
