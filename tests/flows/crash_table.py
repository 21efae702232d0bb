"""The crash table: every gap between two writes, every way to fail in it, and what an operator finds afterwards.

    python -m tests.flows.crash_table

writes docs/crash_table.md; tests/flows/test_crash_table.py tries every cell that can happen. An act is carried out on a
small world whose end is known; it is disturbed at a crash point, the same act is called again, and the end must be that
of an act which nobody disturbed.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graceful.evaluation.decision import CertificateToIssue, Decision
from graceful.files import crash_point
from graceful.flows.search.views import open_view
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.settings.rollout import RolloutConfig
from graceful.flows.store.approvals import answer, awaited
from graceful.flows.store.events import Decided, VariantJudged
from graceful.flows.store.registry import ServingMovedError
from graceful.flows.store.variants import settle
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.act import Case, decide_and_act
from graceful.flows.update.serving import NothingToRollBackError, delete, ingest, release_previous, rollback
from graceful.indexing.maintenance import collect, forget
from graceful.indexing.tables import TableConflictError
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row, items

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "crash_table.md"
G1, G2, G3 = GENERATIONS = ("g001-aaaaaa", "g002-bbbbbb", "g003-cccccc")
NOISE = 0.3
"""Generations differ, so that a vector of the wrong one is seen."""
GALLERY = GalleryConfig(wave_rows=3, unit_rows=1, order="random")
LATE = pa.Table.from_pylist([item_row("item-000-0", "id000", "changed"), item_row("late", "id001", "new")])
OTHER = pa.Table.from_pylist([item_row("other", "id002", "other")])


# The world and its acts -----------------------------------------------------------------------------------------------


def open_world(root: str) -> Workspace:
    """A handle of one's own."""
    models = SyntheticModels(*[SyntheticGeneration(name, noise=NOISE) for name in GENERATIONS])
    return Workspace(root, models, create=True)


def make_world(root: str) -> None:
    """Six items served by the second generation, with one image changed and one item deleted since; g1 is previous."""
    workspace = open_world(root)
    ingest(workspace, items(2, 3))
    update(workspace, G1, None, "BOOTSTRAP")
    update(workspace, G2, G1, "COMPATIBLE_ROLLOUT", (G1,), 0.5)
    ingest(workspace, pa.Table.from_pylist([item_row("item-001-0", "id001", "changed")]))
    delete(workspace, ["item-001-2"])
    workspace.gallery.merge_small_files()


def update(
    workspace: Workspace,
    candidate: str,
    champion: str | None,
    outcome: str,
    certified: tuple[str, ...] = (),
    fraction: float = 1.0,
    approval: RolloutConfig = RolloutConfig(),
) -> None:
    """The second half of an update, as every update carries it out, with the crash points of its steps."""
    key = f"update-{candidate}"
    decision = Decision(
        outcome=outcome,  # type: ignore[arg-type]
        summary="",
        candidate=candidate,
        champion=champion,
        fraction=fraction,
        order="random",
        certificates=tuple(
            CertificateToIssue(query_generation=candidate, gallery_generation=name) for name in (candidate, *certified)
        ),
        reasons=(),
    )

    def judge() -> tuple[Decided, Any]:
        made = Decided(evaluation=key, outcome=outcome, summary="")
        workspace.registry.record(made, update_key=key, generation=candidate)
        return made, SimpleNamespace(decision=decision)

    def do(name: str, act: Callable[[], Any]) -> Any:
        result = act()
        crash_point(f"after {name}")
        return result

    case = Case(workspace, key, champion, GALLERY, judge, lambda *_: None, lambda _: None, approval=approval)
    decide_and_act(case, do=do)


def _approve(workspace: Workspace) -> None:
    """A decision waits, somebody accepts it, and the next update carries it out."""
    rollout = (G3, G2, "COMPATIBLE_ROLLOUT", (G2,), 0.6, RolloutConfig(approval="always"))
    update(workspace, *rollout)
    waiting = awaited(workspace.registry)
    if waiting is not None:
        answer(workspace.registry, waiting, "accepted", by="operator", reason="yes")
        update(workspace, *rollout)


def _roll_back(workspace: Workspace) -> None:
    # As an operator: 'graceful status' says whether it happened.
    if workspace.registry.serving().champion == G2:
        rollback(workspace)


def _forget(workspace: Workspace) -> None:
    delete(workspace, ["item-001-2"])
    forget(workspace.gallery, ["item-001-2"])


def _merge(workspace: Workspace) -> None:
    workspace.gallery.items_table.compact(at_least=2)
    workspace.gallery.vectors_table.compact(at_least=2)


def _collect(workspace: Workspace) -> None:
    collect(workspace.gallery, workspace.protected, dead_share=0.0)


def _release_and_collect(workspace: Workspace) -> None:
    release_previous(workspace)
    _collect(workspace)


def _publish(workspace: Workspace) -> None:
    open_view(workspace, G2)


def _judge_variant(workspace: Workspace) -> None:
    """A variant that was approved is judged again: it may read its generation's rows, and no others any more."""
    for key, readable in (("first", (G1, G2)), ("second", (G2,))):
        made = VariantJudged(
            name="edge", of=G2, approved=True, reason="approved", evaluation_set="set", readable=readable
        )
        settle(workspace.registry, "g002.edge-dddddd", made, update_key=f"variant-{key}")


ACTS: Mapping[str, Callable[[Workspace], None]] = {
    "ingest": lambda workspace: void(ingest(workspace, LATE, unit_rows=2)),
    "delete": lambda workspace: void(delete(workspace, ["item-000-1"])),
    "roll out": lambda workspace: update(workspace, G3, G2, "COMPATIBLE_ROLLOUT", (G2,), 0.6),
    "backfill": lambda workspace: update(workspace, G3, G2, "FULL_BACKFILL"),
    "approve": _approve,
    "roll back": _roll_back,
    "collect": _release_and_collect,
    "merge": _merge,
    "forget": _forget,
    "publish an index": _publish,
    "judge a variant": _judge_variant,
}


def void(_: object) -> None:
    """Drop a result."""


# The rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One gap: the act that passes it, and what stands before and after it."""

    act: str
    point: str
    between: str

    @property
    def name(self) -> str:
        return f"{self.act}: {self.point}"


ROWS = (
    Row("ingest", "table-file-written", "the file of the items, their commit"),
    Row("ingest", "table-committed", "the commit of the items, the note of the newest version"),
    Row("ingest", "items-ingested", "items, their first vector"),
    Row("ingest", "vectors-before-commit", "the file of a unit of vectors, its commit"),
    Row("ingest", "vectors-after-commit", "the commit of a unit, the next unit"),
    Row("ingest", "generation-ingested", "vectors of the champion, those of the previous generation"),
    Row("delete", "table-file-written", "the file of a tombstone, its commit"),
    Row("delete", "table-committed", "the commit of a tombstone, the note of the newest version"),
    Row("roll out", "table-file-written", "the file of a lineage event, its commit"),
    Row("roll out", "table-committed", "the commit of a lineage event, the note of the newest version"),
    Row("roll out", "after judge", "the decision, its publication"),
    Row("roll out", "after publish the decision", "publication, certificates"),
    Row("roll out", "certified", "certificates, the protection of the candidate"),
    Row("roll out", "protected", "protection, plan"),
    Row("roll out", "plan-saved", "plan, wave 0"),
    Row("roll out", "vectors-before-commit", "the file of a unit of a wave, its commit"),
    Row("roll out", "vectors-after-commit", "the commit of a unit, the next unit"),
    Row("roll out", "wave-done", "a wave, the next wave"),
    Row("roll out", "after embed before the move", "wave 0, the move of the serving state"),
    Row("roll out", "before-serving-moves", "the look at the serving state, its swap"),
    Row("roll out", "after-serving-moved", "the swap, the lineage event"),
    Row("roll out", "after move serving state", "the move, the waves after it"),
    Row("roll out", "after re-index", "the last wave, the end of the update"),
    Row("roll out", "after conclude", "the last line of the lineage, the report"),
    Row("roll out", "after publish", "the report, the exit of the command"),
    Row("backfill", "vectors-after-commit", "two units of a full backfill"),
    Row("backfill", "wave-done", "two waves of a full backfill"),
    Row("backfill", "before-serving-moves", "the look at the serving state, its swap"),
    Row("backfill", "after-serving-moved", "the swap, the next step"),
    Row("approve", "approval-asked", "the question, the end of the update that asked"),
    Row("approve", "approval-answered", "the answer, the update that carries it out"),
    Row("roll back", "before-serving-moves", "the look at the serving state, its swap"),
    Row("roll back", "after-serving-moved", "the swap, the lineage event"),
    Row("collect", "rewrite-before-commit", "files without dead rows, their commit"),
    Row("collect", "rewrite-after-commit", "the commit, the merge of small files"),
    Row("collect", "collect-before-leases", "the version noted, the look at open leases"),
    Row("collect", "collect-after-leases", "the look at open leases, the files deleted"),
    Row("merge", "merge-before-commit", "the merged file, its commit"),
    Row("merge", "table-committed", "the commit of a merge, the note of the newest version"),
    Row("forget", "table-committed", "the fence of other writers, the files without the item"),
    Row("forget", "rewrite-before-commit", "files without the item's vectors, their commit"),
    Row("forget", "rewrite-after-commit", "vectors gone, the item's rows"),
    Row("publish an index", "snapshot-after-segment", "a segment, the next file of the snapshot"),
    Row("publish an index", "snapshot-before-manifest", "the last file, the manifest that names them"),
    Row("judge a variant", "variant-certified", "certificates, the judgement that lets it answer"),
    Row("judge a variant", "variant-judged", "the judgement, the report"),
)
ELSEWHERE = {
    "look-taken": "the real command, killed there in `tests/flows/test_kill_and_resume.py`, and at every write of the "
    "ledger in `tests/flows/test_ledger.py`: the same look is found again, none is lost or counted twice",
    "evaluation-written": "the real command, killed there in `tests/flows/test_kill_and_resume.py`: an evaluation is "
    "written whole, and read back before it is decided about again",
    "decided": "the real command, killed there in `tests/flows/test_kill_and_resume.py`: the recorded decision is "
    "carried out, not made again",
    "forget-before-gallery": "the real command, killed there in `tests/flows/test_operators.py`",
    "workspace-before-marker": "a workspace that is being made, in `tests/flows/test_records.py`",
}
"""Points of a whole command, tried with the command itself."""


def points_of_the_code() -> set[str]:
    """Every crash point that the packages name; one that is made from a step's name as `after {name}`."""
    found: set[str] = set()
    for package in ("graceful", "training", "indexing", "evaluation", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            found |= set(re.findall(r'crash_point\(f?"([^"]+)"\)', file.read_text()))
    return found


# The columns ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "kill -9": "the process ends at the point, without clean-up",
    "disk full": "from the point on no byte can be written, until the act is called again",
    "torn write": "killed, and the newest file that nothing names yet lost its second half",
    "duplicate task": "the same act runs to its end in another handle at the point, then goes on here, then runs again",
    "two flows": "another flow ingests and collects at the point; a second update is refused by the claim",
    "lost Ray worker": "a worker that embeds is killed",
    "lost raylet": "a node of the cluster is lost with its workers",
}
ON_RAY = ("vectors-before-commit", "vectors-after-commit", "wave-done", "generation-ingested")
"""Points between which Ray embeds. Its workers write files of the staging area only; all else is the driver's."""
NOT_ON_RAY = "cannot happen: the driver alone writes here, no Ray process takes part"
REFUSALS = (ServingMovedError, NothingToRollBackError, TableConflictError)
"""What one of two that do the same at once may be told."""


def reason_against(row: Row, column: str) -> str | None:
    """Why a cell cannot happen; None for one that is tried."""
    if column in ("lost Ray worker", "lost raylet"):
        return None if row.point in ON_RAY and row.act == "backfill" else (
            "as in a full backfill: the same engine and the same commits" if row.point in ON_RAY else NOT_ON_RAY
        )  # fmt: skip
    return None


# What is compared -----------------------------------------------------------------------------------------------------


def end_state(workspace: Workspace, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Owners of every view, serving state, certificates, lineage; each vector checked, none stored twice.

    `without`: items that another flow brought. Vectors that a kept generation does not read are no part of the state.
    """
    registry, gallery = workspace.registry, workspace.gallery
    serving = registry.serving()
    stored: list[tuple[int, str]] = []
    snapshot = gallery.vectors_table.snapshot()
    for file in snapshot.files:
        keys = pq.read_table(snapshot.location(file), columns=["revision"], partitioning=None)
        stored += [(number, str(file.partition)) for number in keys["revision"].to_pylist()]
    assert len(set(stored)) == len(stored), "a vector was stored twice"
    views = {
        name: _owners(workspace, name, without) for name in workspace.kept() if (name, name) in registry.certificates()
    }
    if serving.champion is not None:
        assert None not in views[serving.champion].values(), "an item cannot be read"
    events = [(event.kind, event.update_key, event.generation) for event in registry.history()]
    keyed = [event for event in events if event[1]]
    assert len(set(keyed)) == len(keyed), "an event was recorded twice"
    index = Path(workspace.index_location())
    return {
        "views": views,
        "serving": serving.model_dump(exclude={"sequence"}),
        "certificates": registry.certificates(),
        # The line of a rollback stands in the history of the serving state too, which is where a kill leaves it alone.
        "events": sorted({event for event in events if event[0] != "rolled_back"}),
        "moves": [(state.champion, state.moved_by) for state in registry.serving_history() if state.left],
        "published": any(index.rglob("manifest*.json")),
    }


def _owners(workspace: Workspace, query: str, without: tuple[str, ...]) -> dict[str, str | None]:
    view = workspace.view(query)
    names = [view.readable[code] if code >= 0 else None for code in view.owner]
    sources = view.column("source", np.arange(view.num_items)).to_pylist()
    for place in np.flatnonzero(view.owner >= 0).tolist():
        expected = workspace.embed_with.generations[names[place]].encode([sources[place]])[0]  # type: ignore[attr-defined]
        np.testing.assert_allclose(view.vectors(np.array([place])), expected, atol=1e-5)
    found = {f"{item_id} {source}": name for item_id, source, name in zip(view.item_ids, sources, names, strict=True)}
    return {key: name for key, name in found.items() if key.partition(" ")[0] not in without}


# The page -------------------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/crash_table.md."""
    head = "| act | at the point | between | " + " | ".join(COLUMNS) + " |"
    lines = [
        "# The crash table",
        "",
        "Every gap between two writes, and every way to fail in it. In each cell marked *tried* a test disturbs the",
        "act there, calls the same act again, and compares the end with that of an act which nobody disturbed: who",
        "owns each item in every view that is kept, each vector against its encoder, the serving state, certificates,",
        "the lineage; nothing stored twice, nothing lost. `tests/flows/test_crash_table.py` tries it; a crash point",
        "that is not in this table fails that test. This page is made by `python -m tests.flows.crash_table`.",
        "",
        *[f"- **{name}**: {meaning}." for name, meaning in COLUMNS.items()],
        "",
        head,
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    notes: dict[str, int] = {}
    for row in ROWS:
        cells = []
        for column in COLUMNS:
            reason = reason_against(row, column)
            cells.append("tried" if reason is None else f"[{notes.setdefault(reason, len(notes) + 1)}]")
        lines.append(f"| {row.act} | `{row.point}` | {row.between} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "After a rollback that was killed behind its swap the move and its reason stand in the history of the serving",
        "state; the line of the lineage that repeats them is not written later.",
    ]
    lines += ["", *[f"[{number}] {reason[0].upper()}{reason[1:]}.\n" for reason, number in notes.items()]]
    lines += ["Points of a whole command, killed with the command itself:", ""]
    lines += [f"- `{point}`: {where}." for point, where in ELSEWHERE.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit(0)
