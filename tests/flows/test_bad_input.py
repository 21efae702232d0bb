"""What users and disks get wrong: one clear line, the right exit code, nothing lost, the serving state untouched."""

import contextlib
import errno
import io
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from graceful.files import set_crash_hook
from graceful.flows.cli import app, reported_errors
from graceful.flows.commands.adopt import adopt_generation
from graceful.flows.search.searcher import GallerySearcher
from graceful.flows.store.claim import holder
from graceful.flows.store.events import Promoted, UpdateStarted
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.order import UpdateResult
from tests.flows import running, tiny

pytestmark = pytest.mark.timeout(300)

FAILED, WRONG_USE = 1, 2


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(*arguments) -> tuple[int, str]:
    """Exit code and the line on standard error of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr.strip()


def failing(operation: Callable[[], object]) -> tuple[int, str]:
    """Exit code and line that the command line makes of what an operation raises."""
    line = io.StringIO()
    with contextlib.redirect_stderr(line), contextlib.suppress(typer.Exit):
        try:
            with reported_errors():
                operation()
        except typer.Exit as end:
            return end.exit_code, line.getvalue().strip()
    raise AssertionError("nothing failed")


def update(root: Path) -> tuple[int, str]:
    """A failing update, without the flow server."""
    return failing(lambda: running.update(root))


def one_line(message: str, *parts: str) -> None:
    assert message.startswith("graceful: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.fixture
def untouched(workspace_root):
    """Afterwards the workspace serves exactly what it served before, and can be updated."""
    before = tiny.end_state(workspace_root)
    yield
    after = tiny.end_state(workspace_root)
    for name in ("moves", "certificates", "view", "rows", "decisions"):
        assert after[name] == before[name], name
    assert after["champion"] == before["champion"]


def spoil(digits_file: Path, target: Path, change: Callable[[list[dict]], list[dict]]) -> Path:
    """A copy of the digits with changed rows."""
    table = pq.read_table(digits_file)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), target)
    return target


def write(root: Path, digits_file: Path, **changes) -> None:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    tiny.write_config(root, digits_file, {**tiny.grown(5), **dotted})


# Configuration --------------------------------------------------------------------------------------------------------


def test_unknown_key_names_the_nearest(workspace_root, digits_file, untouched):
    write(workspace_root, digits_file, training__epoch=3)
    code, line = command("update", "--root", workspace_root)
    assert code == WRONG_USE
    one_line(line, "unknown key training.epoch", "did you mean 'epochs'?", "graceful.toml")


def test_unset_variable_is_named(workspace_root, untouched, monkeypatch):
    monkeypatch.delenv("GRACEFUL_DATA", raising=False)
    config = workspace_root / "graceful.toml"
    config.write_text(config.read_text().replace('label_columns = ["label"]', "").replace(
        'training_data = { source = "digits"', 'training_data = { source = "parquet"'))  # fmt: skip
    tables = tiny.settings(Path("$GRACEFUL_DATA/train.parquet"))
    config.write_text("".join(f"{name} = {tiny.inline(value)}\n" for name, value in tables.items()))
    code, line = command("update", "--root", workspace_root)
    assert code == WRONG_USE
    one_line(line, "needs the environment variable GRACEFUL_DATA; set it", "path")


def test_configuration_that_is_not_there(workspace_root, untouched):
    kept = (workspace_root / "graceful.toml").read_text()
    (workspace_root / "graceful.toml").unlink()
    code, line = command("update", "--root", workspace_root)
    assert code == WRONG_USE
    one_line(line, "expected a file, found none", "graceful init")
    (workspace_root / "graceful.toml").write_text(kept)


def test_workspace_that_is_not_there(tmp_path):
    for name in ("update", "status", "rollback", "report"):
        code, line = command(name, "--root", tmp_path / "nowhere")
        assert code == FAILED
        one_line(line, "expected one at", "graceful init")
    assert not (tmp_path / "nowhere").exists() or not list((tmp_path / "nowhere").glob("registry"))


# Data -----------------------------------------------------------------------------------------------------------------


def test_missing_file_is_named(workspace_root, digits_file, untouched, tmp_path):
    write(
        workspace_root, digits_file, training_data__source="parquet", training_data__path=str(tmp_path / "no.parquet")
    )
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "expected a Parquet file, found none", str(tmp_path / "no.parquet"))


def test_absent_label_column_is_named_with_those_that_exist(workspace_root, digits_file, untouched):
    write(workspace_root, digits_file, training_data__label_columns=["species"])
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "species", "found ['image', 'label', 'instance']", str(digits_file))


def test_class_with_one_image_is_named(workspace_root, digits_file, untouched, tmp_path):
    spoiled = spoil(
        digits_file, tmp_path / "digits.parquet",
        lambda rows: [row for row in rows if row["label"] != "4" or row["instance"] in (7, *range(80, 100))],
    )  # fmt: skip
    write(workspace_root, spoiled)
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "at least 2 images of each class, found 1 classes with one (such as 4)")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_unreadable_images_above_the_limit_are_refused_below_it_counted(workspace_root, digits_file, tmp_path, content):
    def change(rows):
        for row in rows:
            if row["label"] == "3" and row["instance"] in (5, 6):
                row["image"] = {"bytes": content, "path": None}
        return rows

    spoiled = spoil(digits_file, tmp_path / "digits.parquet", change)
    before = tiny.end_state(workspace_root)
    write(workspace_root, spoiled)
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "expected at most 1.00% unreadable, found 2 of 150", "max_unreadable_share", "digits.parquet#")
    assert tiny.end_state(workspace_root) == before
    write(workspace_root, spoiled, training_data__max_unreadable_share=0.02)
    running.update(workspace_root)
    started = Workspace(str(workspace_root), None).registry.events(UpdateStarted)[-1].payload
    assert (started.num_unreadable, started.num_training_images) == (2, 148)


def test_test_images_in_the_training_set_are_refused(workspace_root, digits_file, untouched):
    write(workspace_root, digits_file, training_data__where={"label": tiny.DIGITS[:5], "instance": {"max": 81}})
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "expected no common images, found 10", "digits.parquet#")


def test_test_identities_in_the_training_set_are_refused(workspace_root, digits_file, untouched):
    write(workspace_root, digits_file, evaluation__protocol="open_set")
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "expected no common identities, found 5", "0; 1; 2")


def test_empty_image_is_not_ingested(workspace_root, untouched, tmp_path):
    (tmp_path / "empty.png").touch()
    code, line = command("ingest", tmp_path / "empty.png", "--root", workspace_root)
    assert code == FAILED
    one_line(line, "unreadable", "empty.png", "empty")
    code, line = command("ingest", tmp_path / "missing", "--root", workspace_root)
    assert code == FAILED
    one_line(line, "expected a folder, found none", "missing")


def test_an_image_of_too_many_pixels_is_neither_ingested_nor_searched_with(workspace_root, untouched, tmp_path):
    Image.new("1", (13_300, 13_300)).save(tmp_path / "huge.png")
    for name in ("ingest", "search"):
        code, line = command(name, tmp_path / "huge.png", "--root", workspace_root)
        assert code == FAILED
        one_line(line, "huge.png", "is too large: expected at most 67,108,864 pixels, found 13300x13300")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ("empty", "give a readable image")),
        (b"GIF, almost", ("cannot be decoded", "give a readable image")),
        (None, ("found no file", "correct the path")),
    ],
)
def test_search_with_a_bad_image_says_why(workspace_root, untouched, tmp_path, content, said):
    image = tmp_path / "query.png"
    if content is not None:
        image.write_bytes(content)
    code, line = command("search", image, "--root", workspace_root)
    assert code == FAILED
    one_line(line, "query.png", *said)


# Encoders and vectors -------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign_encoders(tmp_path, monkeypatch):
    """A package of somebody else's encoders."""
    (tmp_path / "foreign_encoders.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Bright(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.linear = nn.Linear(64, width)\n"
        "    def forward(self, images):\n"
        "        out = self.linear(images.flatten(1))\n"
        "        return torch.where(images.mean((1, 2, 3))[:, None] > 0.1, torch.nan, out)\n"
        "def nan_for_some(channels, image_size):\n"
        "    return Bright(16)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def judge_adopted(root: Path, factory: str) -> UpdateResult:
    name = adopt_generation(Workspace(str(root)), tiny.open_config(root), "foreign", factory)
    return running.update(root, adopted=name)


def test_nan_in_an_embedding_stops_the_update_and_is_never_stored(workspace_root, untouched, foreign_encoders):
    """Tried on a few images first; what slips through is found by the images that training or judging need."""
    generations = Workspace(str(workspace_root)).registry.generations()
    code, line = failing(lambda: judge_adopted(workspace_root, "foreign_encoders:nan_for_some"))
    assert code == FAILED
    one_line(line, "failures", "non-finite embedding")
    stored = [
        file
        for adopted in set(Workspace(str(workspace_root)).registry.generations()) - set(generations)
        for file in Path(workspace_root, "caches", adopted).rglob("*.parquet")
        if "_staging" not in str(file)
    ]
    for file in stored:
        vectors = np.frombuffer(b"".join(pq.read_table(file)["embedding"].to_pylist()), np.float32)
        assert np.isfinite(vectors).all()


def test_adopted_encoder_that_does_not_exist(workspace_root, untouched):
    code, line = failing(lambda: judge_adopted(workspace_root, "no_such_package:encoder"))
    assert code in (FAILED, WRONG_USE)
    one_line(line, "no_such_package")


def test_width_below_that_of_the_champion_is_refused(workspace_root, digits_file, untouched):
    write(workspace_root, digits_file, training__width=8)
    code, line = update(workspace_root)
    assert code == FAILED
    one_line(line, "width", "16")


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (np.ones((1, 15), np.float32), ("15", "16")),
        (np.full((1, 16), np.nan, np.float32), ("finite",)),
    ],
)
def test_query_vector_of_wrong_width_or_with_nan_is_refused(workspace_root, untouched, vectors, words):
    searcher = GallerySearcher(Workspace(str(workspace_root), None))
    code, line = failing(lambda: searcher.search_vectors(vectors, 3))
    assert code == FAILED
    one_line(line, *words)


def test_corrupted_weights_are_refused_by_their_digest(workspace_root, tmp_path, digits_file):
    before = tiny.end_state(workspace_root)
    champion = before["champion"]
    weights = workspace_root / "generations" / champion / "weights.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    image = tmp_path / "query.png"
    image.write_bytes(pq.read_table(digits_file)["image"][0].as_py()["bytes"])
    for code, line in (command("search", image, "--root", workspace_root), update(workspace_root)):
        assert code == FAILED
        one_line(line, "expected sha256", champion, "restore the file from a copy")
    assert {name: tiny.end_state(workspace_root)[name] for name in ("moves", "view", "certificates")} == {
        name: before[name] for name in ("moves", "view", "certificates")
    }
    weights.write_bytes(kept)
    running.update(workspace_root)


# Machines -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_of_two_updates_started_at_once_one_is_refused(spawn, flow_server, bootstrapped, tmp_path, digits_file):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    write(root, digits_file, training__epochs=150)  # long enough that the second meets the first
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    arguments = ["update", "--root", str(root)]
    processes = [spawn(running.command_in_child, arguments, "", str(logs[0]), flow_server)]
    deadline = time.monotonic() + 120
    while not holder(str(root))[1] and time.monotonic() < deadline:
        time.sleep(0.05)
    processes.append(spawn(running.command_in_child, arguments, "", str(logs[1]), flow_server))
    for process in processes:
        process.join(150)
    texts = [log.read_text() for log in logs]
    assert sorted(process.exitcode for process in processes) == [0, 1], "\n".join(texts)
    refused = next(text for text, process in zip(texts, processes, strict=True) if process.exitcode == 1)
    assert "another update of this workspace is in progress" in refused
    registry = Workspace(str(root), None).registry
    assert [event.kind for event in registry.history()].count("trained") == 2  # the bootstrap and this one
    assert len(registry.generations()) == 2
    assert len(registry.events(Promoted)) == 2


CRASH_POINTS = [
    "table-file-written", "evaluation-written", "certified", "plan-saved", "vectors-before-commit",
    "before-serving-moves",
]  # fmt: skip


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_disk_full_at_a_commit_loses_nothing(workspace_root, point):
    def no_space(name: str) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workspace_root))

    before = tiny.end_state(workspace_root)
    set_crash_hook(no_space)
    try:
        code, line = update(workspace_root)
    finally:
        set_crash_hook(None)
    assert code == FAILED
    one_line(line, "No space left on device")
    after = tiny.end_state(workspace_root)
    if point == "vectors-before-commit":  # in a wave after the move: every item is still read, by what it was read by
        assert set(after["view"].values()) == {before["champion"]}
    else:
        assert (after["champion"], after["moves"]) == (before["champion"], before["moves"])
        assert after["view"] == before["view"]
    running.update(workspace_root)
    assert tiny.end_state(workspace_root)["champion"] != before["champion"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_disk_that_is_really_full_fails_cleanly_and_the_update_ends_when_there_is_room(
    spawn, flow_server, bootstrapped, small_disk
):
    root = tiny.copy_workspace(bootstrapped, small_disk / "workspace")
    before = tiny.end_state(root)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as stream:
        while True:
            stream.write(bytes(4096))
            stream.flush()
    log = small_disk.parent / "log"
    refused = []
    for _ in range(15):
        log.unlink(missing_ok=True)
        process = spawn(running.command_in_child, ["update", "--root", str(root)], "", str(log), flow_server)
        process.join(100)
        if process.exitcode == 0:
            break
        assert process.exitcode in (1, 2)  # 2: the check before it found no room at all
        refused.append(log.read_text().strip().splitlines()[-1])
        state = tiny.end_state(root)
        if state["champion"] == before["champion"]:
            assert state["view"] == before["view"]
        assert "" not in state["view"].values()
        # A little more room each time, so that it fails a little later.
        os.truncate(ballast, max(0, ballast.stat().st_size - 96 * 1024))
    assert refused
    assert all(
        any(words in line for words in ("No space left", "disk full", "free some space", "os error 28", "ENOSPC"))
        for line in refused
    ), refused
    ballast.unlink()
    process = spawn(running.command_in_child, ["update", "--root", str(root)], "", str(log), flow_server)
    process.join(100)
    assert process.exitcode == 0, log.read_text()
    after = tiny.end_state(root)
    assert after["champion"] != before["champion"]
    assert set(after["view"]) == set(before["view"])
    assert "" not in after["view"].values()


def test_a_storage_that_has_gone_is_named_with_what_to_do(capsys):
    with pytest.raises(typer.Exit) as ended, reported_errors():
        os.stat("/nowhere/gallery")
    assert ended.value.exit_code == 1
    assert "'/nowhere/gallery'; see that it is there and may be read and written" in capsys.readouterr().err
