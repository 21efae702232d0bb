"""Every cell of the crash table (docs/crash_table.md): an act that is disturbed anywhere ends as if it had not been."""

import json
import os
import resource
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from graceful.files import CRASH_EXIT_CODE, CRASH_VARIABLE, set_crash_hook
from graceful.flows.store.claim import UpdateInProgressError, claim
from graceful.flows.update.serving import ingest
from graceful.indexing.maintenance import collect
from tests.flows import crash_table
from tests.flows.crash_table import ACTS, OTHER, ROWS, end_state, make_world, open_world

pytestmark = pytest.mark.timeout(120)

JOIN_S = 60
FAILED = 3


@pytest.fixture(scope="module")
def memory():
    """A folder in memory: hundreds of small files are written and flushed."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="graceful-crash-", dir=base))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def world(memory):
    make_world(str(memory / "world"))
    return memory / "world"


@pytest.fixture(scope="module")
def undisturbed(world, memory):
    """End state of each act when nobody disturbs it, and the points that it passes."""
    ends, points = {}, {}
    for act, carry_out in ACTS.items():
        root = memory / f"undisturbed {act}"
        shutil.copytree(world, root)
        workspace, passed = open_world(str(root)), []
        set_crash_hook(passed.append)
        carry_out(workspace)
        set_crash_hook(None)
        ends[act], points[act] = end_state(workspace), passed
    return ends, points


@pytest.fixture
def root(world, memory):
    shutil.rmtree(memory / "mine", ignore_errors=True)
    return shutil.copytree(world, memory / "mine")


@pytest.fixture(autouse=True)
def no_crash_hook():
    yield
    set_crash_hook(None)


every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def resume(root, row, undisturbed, **options):
    """Call the same act again, as an operator would, and compare."""
    workspace = open_world(str(root))
    ACTS[row.act](workspace)
    assert end_state(workspace, **options) == undisturbed[0][row.act]
    assert nothing_left_over(workspace) == []


def nothing_left_over(workspace):
    """What a collection leaves of files that no version names, and of leases."""
    collect(workspace.gallery, workspace.protected, orphan_age_s=0.0)
    tables = (workspace.gallery.items_table, workspace.gallery.vectors_table)
    leases = [str(file) for file in Path(workspace.root, "gallery", "leases").glob("*.json")]
    return [file for table in tables for file in table.orphans(older_than_s=0.0)] + leases


def test_every_crash_point_of_the_code_is_in_the_table(undisturbed):
    listed = {row.point for row in ROWS} | set(crash_table.ELSEWHERE)
    assert {point for point in crash_table.points_of_the_code() if "{" not in point} <= listed
    for row in ROWS:
        assert row.point in undisturbed[1][row.act], f"{row.name} is never passed"


def test_the_page_is_made_from_the_table():
    assert crash_table.PAGE.read_text() == crash_table.page(), "run 'python -m tests.flows.crash_table'"


def in_child(act, root, point, how):
    """Entry point of a child: carry an act out, and fail at a point."""
    if how == "kill":
        os.environ[CRASH_VARIABLE] = point
    else:
        set_crash_hook(lambda name: fill_the_disk() if name == point else None)
    try:
        ACTS[act](open_world(root))
    except Exception as error:
        os._exit(FAILED if not isinstance(error, AssertionError) else 1)
    os._exit(0)


def fill_the_disk():
    """From here on writing one byte into any file is refused by the kernel, in this process, for whoever writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def run_in_child(spawn, row, root, how):
    process = spawn(in_child, row.act, str(root), row.point, how)
    process.join(JOIN_S)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@every_row
def test_killed_process(row, root, undisturbed, spawn):
    assert run_in_child(spawn, row, root, "kill") == CRASH_EXIT_CODE
    resume(root, row, undisturbed)


@every_row
def test_full_disk(row, root, undisturbed, spawn):
    """Says so, or had nothing left to write."""
    assert run_in_child(spawn, row, root, "disk") in (FAILED, 0)
    resume(root, row, undisturbed)


class Killed(BaseException):
    """Ends an act between two writes."""


@every_row
def test_torn_write(row, root, undisturbed):
    """The newest file that no commit names loses its second half, as after a power cut before it was flushed."""

    def tear(name):
        if name == row.point:
            set_crash_hook(None)
            for file in torn_candidates(root):
                os.truncate(file, file.stat().st_size // 2)
            raise Killed

    set_crash_hook(tear)
    with pytest.raises(Killed):
        ACTS[row.act](open_world(str(root)))
    resume(root, row, undisturbed)


def torn_candidates(root):
    """The newest file that no log names and that is no log, lease or note itself."""
    named = set()
    for log in root.rglob("_delta_log/*.json"):
        for line in log.read_text().splitlines():
            path = json.loads(line).get("add", {}).get("path")
            if path:
                named.add(path.rpartition("/")[2])
    loose = [
        file for file in (*(root / "gallery").rglob("*.parquet"), *(root / "registry").rglob("*.parquet"))
        if file.name not in named and file.parent.name not in ("plan_items", "_delta_log")
    ]  # fmt: skip
    return sorted(loose, key=lambda file: file.stat().st_mtime_ns)[-1:]


@every_row
def test_same_act_twice_and_twice_at_once(row, root, undisturbed):
    """Another handle carries the same act out between two writes of this one; one of them may be refused."""
    done = []

    def overtake(name):
        if name == row.point and not done:
            done.append(name)
            set_crash_hook(None)
            ACTS[row.act](open_world(str(root)))

    set_crash_hook(overtake)
    with suppress(*crash_table.REFUSALS):
        ACTS[row.act](open_world(str(root)))
    set_crash_hook(None)
    assert done
    resume(root, row, undisturbed)


@every_row
def test_two_flows(row, root, undisturbed):
    """Another flow ingests an item and collects in the gap; a second update is refused while the first one runs."""
    done = []

    def meanwhile(name):
        if name == row.point and not done:
            done.append(name)
            set_crash_hook(None)
            other = open_world(str(root))
            if row.act in ("roll out", "backfill", "approve"):
                with pytest.raises(UpdateInProgressError), claim(str(root), "another update"):
                    pass
            ingest(other, OTHER, unit_rows=2)
            collect(other.gallery, other.protected, dead_share=0.0)

    workspace = open_world(str(root))
    with claim(str(root), "an update"):
        set_crash_hook(meanwhile)
        ACTS[row.act](workspace)
    assert done
    champion = workspace.registry.serving().champion
    assert dict(zip(*owners(workspace, champion), strict=True))["other"] is not None
    resume(root, row, undisturbed, without=("other",))


def owners(workspace, query):
    view = workspace.view(query)
    return view.item_ids, [view.readable[code] if code >= 0 else None for code in view.owner]
