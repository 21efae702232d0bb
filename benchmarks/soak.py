"""Kill real processes at random moments, a thousand times, and compare what is left with a dictionary.

    python -m benchmarks soak --kills 1000

A history is a random sequence of what happens to a workspace: ingest, change, delete, forget, promotions of every kind,
waves, rollback and forward, release, revocation, collection, merging. Every operation runs in a forked process that
dies by SIGKILL at a random moment, up to three times, and is then run again to its end, as an operator would. The
expected state is kept by `Model`, which knows the reading rule and dictionaries, and nothing of tables. It is compared
after every kill (what was not being changed is there, readable and right; what is served is that of before or after)
and after every operation (everything). Each history ends with a collection, after which no file may be left over.

Encoders are synthetic and differ between generations, so that a vector of the wrong image or generation is seen.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import processor
from graceful.files import file_ages, set_crash_hook
from graceful.flows.commands.demo_world import SyntheticGeneration, SyntheticModels, item_row
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote
from graceful.flows.update.serving import delete, go_forward, ingest, release_previous, revoke, rollback
from graceful.indexing.maintenance import collect, forget
from graceful.indexing.reindex import embed_missing
from graceful.indexing.revisions import NUMBER_BITS, buckets_of

RESULTS = Path(__file__).parent / "results-soak.json"
ITEM_IDS = [f"item-{number}" for number in range(12)]
OPERATIONS_EACH = 30
MOST_KILLS = 3
WAIT_S = 60.0
WRONG = ("lost", "doubled", "wrong_vector", "wrong_owner", "unreadable", "wrong_serving", "errors", "orphans")
"""What may be found: items that are gone, vectors stored twice, vectors of another image or generation, an owner that
the reading rule does not give, items that the champion cannot read, another serving state, an operation that raised or
hung when it was run again, and files that a collection left."""


# What a child does ----------------------------------------------------------------------------------------------------


def perform(workspace: Workspace, act: str, given: dict[str, Any]) -> None:
    """Carry out one operation; called again after a kill, it goes on."""
    serving = workspace.registry.serving()
    if act == "ingest":
        rows = [item_row(item_id, identity(item_id), image) for item_id, image in given["images"].items()]
        ingest(workspace, pa.Table.from_pylist(rows), unit_rows=2)
    elif act == "delete":
        delete(workspace, given["item_ids"])
    elif act == "forget":
        delete(workspace, given["item_ids"])
        forget(workspace.gallery, given["item_ids"])
    elif act == "promote":
        rollout = Rollout(wave_rows=3, unit_rows=2, **given["rollout"])
        plan = prepare(workspace, rollout)
        embed_before_move(workspace, rollout, plan)
        promote(workspace, rollout, plan, champion=given["champion"])
        if given["waves_now"]:
            continue_plan(workspace, unit_rows=2)
    elif act == "waves":
        continue_plan(workspace, unit_rows=2)
    elif act == "hold":
        embed_missing(workspace.gallery, given["generation"], workspace.embed_with(given["generation"]), unit_rows=3)
    elif act == "rollback":
        if serving.champion == given["champion"]:  # else it was carried out before the kill: 'graceful status' says so
            rollback(workspace)
    elif act == "forward":
        if serving.champion == given["champion"]:
            go_forward(workspace, given["generation"], reason="soak")
    elif act == "release":
        release_previous(workspace)
    elif act == "revoke":
        if given["pair"] in workspace.registry.certificates():
            revoke(workspace, *given["pair"], reason="soak")
    elif act == "collect":
        collect(workspace.gallery, workspace.protected, dead_share=given["dead_share"])
    elif act == "merge":
        for table in (workspace.gallery.items_table, workspace.gallery.vectors_table):
            table.compact(at_least=2)
    else:
        raise AssertionError(act)


def child(
    connection: Connection, root: str, generations: Sequence[SyntheticGeneration], act: str, given: dict[str, Any]
) -> None:
    """Entry point: say that it begins, name every crash point that is passed, and end without clean-up."""
    workspace = Workspace(root, SyntheticModels(*generations), create=True)
    workspace.create()
    connection.send("begin")
    set_crash_hook(connection.send)
    try:
        perform(workspace, act, given)
    except BaseException:
        connection.send("error: " + traceback.format_exc()[-1500:])
        os._exit(1)
    connection.send("end")
    os._exit(0)


def identity(item_id: str) -> str:
    """Who is on the images of an item."""
    return f"id{int(item_id.partition('-')[2]) % 5:03d}"


# What is expected -----------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """The gallery and the serving state as dictionaries; the reading rule in four lines."""

    items: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    certificates: set[tuple[str, str]] = field(default_factory=set)
    champion: str | None = None
    previous: str | None = None
    left: str | None = None
    planned: bool = False

    def put(self, item_id: str, image: str | None) -> None:
        """A new image is a new revision; so is a delete of what is there."""
        revision, now = self.items.get(item_id, (0, None))
        if now != image:
            self.items[item_id] = (revision + 1, image)

    def live(self) -> dict[str, str]:
        """Image of every item that is not deleted."""
        return {item_id: image for item_id, (_, image) in self.items.items() if image is not None}

    def number(self, item_id: str) -> int:
        """The gallery's number of an item's latest revision: each of these items has a bucket of its own."""
        return (int(buckets_of([item_id])[0]) << NUMBER_BITS) + self.items[item_id][0]

    def owners(self, query: str, vectors: set[tuple[int, str]]) -> dict[str, str | None]:
        """Who owns each live item in the view of a query generation, given the vectors that are stored."""
        readable = sorted(held for holder, held in self.certificates if holder == query)
        found: dict[str, str | None] = {}
        for item_id in self.live():
            owning = [name for name in readable if (self.number(item_id), name) in vectors]
            found[item_id] = owning[-1] if owning else None
        return found


class History:
    """One workspace, its model, and what was found wrong with it."""

    def __init__(self, seed: int, folder: str, durations: dict[str, list[float]]) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.root = folder
        self.durations = durations
        self.model = Model()
        self.generations: dict[str, SyntheticGeneration] = {}
        self.wrong: Counter[str] = Counter()
        self.killed_after: Counter[str] = Counter()
        self.killed_in: Counter[str] = Counter()
        self.num_operations = 0
        self.details: list[str] = []
        self.reader: Workspace | None = None

    @property
    def num_kills(self) -> int:
        return sum(self.killed_after.values())

    def run(self) -> None:
        """The whole history."""
        self.do("ingest", {"images": dict.fromkeys(ITEM_IDS[:8], "a")}, set(ITEM_IDS[:8]))
        self.promote(first=True)
        for _ in range(OPERATIONS_EACH):
            self.step()
            if self.wrong:
                return
        self.end()

    def step(self) -> None:
        """One random operation that makes sense now."""
        model, chance = self.model, self.random
        live = sorted(model.live())
        some = chance.sample(ITEM_IDS, chance.randint(1, 4))
        gone = [item_id for item_id in ITEM_IDS if item_id in model.items and item_id not in live]
        acts = ["ingest"] * 5 + ["delete", "forget"] + ["promote"] * 4 + ["hold", "collect", "collect", "merge"]
        acts += ["waves"] * 2 if model.planned else []
        acts += ["rollback", "release"] if model.previous else []
        acts += ["forward"] * 2 if model.left else []
        acts += ["revoke"]
        act = chance.choice(acts)
        if act == "ingest":
            images = {item_id: chance.choice("abc") for item_id in some}
            self.do(act, {"images": images}, set(some))
        elif act == "delete" or (act == "forget" and not gone):
            self.do("delete", {"item_ids": some[:2]}, set(some[:2]))
        elif act == "forget":
            self.do(act, {"item_ids": gone[:2]}, set())
        elif act == "promote":
            self.promote()
        elif act == "hold":
            self.do(act, {"generation": self.new_generation()}, set())
        elif act == "forward":
            self.do(act, {"champion": model.champion, "generation": model.left}, set())
        elif act == "revoke":
            pair = self.superfluous()
            if pair is not None:
                self.do(act, {"pair": pair}, set())
        elif act == "collect":
            self.do(act, {"dead_share": chance.choice([0.0, 0.2])}, set())
        else:
            self.do(act, {"champion": model.champion}, set())

    def promote(self, *, first: bool = False) -> None:
        """A candidate that may read some of what the champion may, under one of the three decisions."""
        candidate = self.new_generation()
        owners = (
            [] if first else sorted({held for query, held in self.model.certificates if query == self.model.champion})
        )
        certified = [name for name in owners if self.random.random() < 0.6]
        whole = first or self.random.random() < 0.3
        given = {
            "update_key": f"update-{candidate}",
            "generation": candidate,
            "decision": f"decision-{candidate}",
            "fraction": 1.0 if whole else self.random.choice([0.0, 0.3, 0.6, 1.0]),
            "order": self.random.choice(["random", "oldest_generation"]),
            "before_move": "all" if whole else "wave_zero",
            "certificates": tuple((candidate, name) for name in (candidate, *certified)),
        }
        waves_now = self.random.random() < 0.6
        self.do("promote", {"rollout": given, "champion": self.model.champion, "waves_now": waves_now}, set())

    def new_generation(self) -> str:
        number = len(self.generations) + 1
        name = f"g{number:03d}-{number:06x}"
        self.generations[name] = SyntheticGeneration(name, noise=0.3)
        return name

    def superfluous(self) -> tuple[str, str] | None:
        """A certificate of the champion through which it reads nothing."""
        champion = self.model.champion
        assert champion is not None
        used = set(self.model.owners(champion, self.stored(self.opened())).values())
        pairs = sorted(pair for pair in self.model.certificates if pair[0] == champion and pair[1] not in used)
        pairs = [pair for pair in pairs if pair[1] != champion]
        return self.random.choice(pairs) if pairs else None

    # Doing and killing ------------------------------------------------------------------------------------------------

    def do(self, act: str, given: dict[str, Any], touched: set[str]) -> None:
        """Run an operation, killed up to three times; then the model does it, and both are compared."""
        self.num_operations += 1
        before = (self.model.champion, self.model.previous)
        kills = self.random.choice([0, 1, 1, 2, 2, MOST_KILLS])
        for _ in range(kills):
            if self.run_child(act, given, kill=True):
                break
            self.compare_after_kill(act, given, touched, before)
        else:
            self.run_child(act, given, kill=False)
        self.apply(act, given)
        self.compare(act)

    def run_child(self, act: str, given: dict[str, Any], *, kill: bool) -> bool:
        """True when the operation ran to its end."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        arguments = (self.root, tuple(self.generations.values()), act, given)
        process = context.Process(target=child, args=(theirs, *arguments))
        process.start()
        theirs.close()
        passed = [ours.recv()]
        started = time.monotonic()
        known = self.durations[act]
        if kill:
            usual = statistics.median(known[-20:]) if known else 0.3
            process.join(self.random.uniform(0, usual))
            if process.is_alive() and process.pid is not None:
                with suppress(ProcessLookupError):  # it ended at this moment
                    os.kill(process.pid, signal.SIGKILL)
        process.join(WAIT_S)
        if process.exitcode is None:
            process.kill()
            process.join(WAIT_S)
            self.found("errors", f"{act} did not end within {WAIT_S} s")
        try:
            while True:
                passed.append(ours.recv())
        except EOFError:
            ours.close()
        # What a child said counts, not its exit status, which the fork server may not have been able to hand over.
        if kill and process.exitcode != 0 and passed[-1] != "end" and not passed[-1].startswith("error"):
            self.killed_after[passed[-1]] += 1
            self.killed_in[act] += 1
            return False
        if passed[-1] != "end":
            self.found("errors", f"{act} {given}: exit code {process.exitcode}, {passed[-1]}")
        known.append(time.monotonic() - started)
        return True

    def apply(self, act: str, given: dict[str, Any]) -> None:
        """What an operation that has ended means for the model."""
        model = self.model
        if act == "ingest":
            for item_id, image in given["images"].items():
                model.put(item_id, image)
        elif act == "delete":
            for item_id in given["item_ids"]:
                if item_id in model.live():
                    model.put(item_id, None)
        elif act == "promote":
            model.certificates |= set(given["rollout"]["certificates"])
            model.champion, model.previous = given["rollout"]["generation"], model.champion
            model.left = None
            model.planned = given["rollout"]["before_move"] == "wave_zero" and not given["waves_now"]
        elif act == "waves":
            model.planned = False
        elif act == "rollback":
            model.champion, model.previous, model.left = model.previous, None, model.champion
            model.planned = False
        elif act == "forward":
            model.champion, model.previous, model.left = model.left, model.champion, None
            model.planned = False
        elif act == "release":
            model.previous = model.left = None
        elif act == "revoke":
            model.certificates.discard(given["pair"])

    # Comparing --------------------------------------------------------------------------------------------------------

    def opened(self) -> Workspace:
        """A handle: in every other history one that stays open, as a server's does, else a new one."""
        if self.reader is None or self.seed % 2:
            self.reader = Workspace(self.root, create=True)
        return self.reader

    def stored(self, workspace: Workspace) -> set[tuple[int, str]]:
        """Every vector that the newest version names: (revision, generation)."""
        found: set[tuple[int, str]] = set()
        snapshot = workspace.gallery.vectors_table.snapshot()
        for file in snapshot.files:
            keys = pq.read_table(snapshot.location(file), columns=["revision"], partitioning=None)
            rows = [(number, str(file.partition)) for number in keys["revision"].to_pylist()]
            if len(set(rows)) < len(rows) or found & set(rows):
                self.found("doubled", f"{file.path}")
            found |= set(rows)
        return found

    def seen(self, workspace: Workspace, query: str) -> tuple[dict[str, str | None], dict[str, str]]:
        """Owner and source of each item in a view; each vector that is read is compared with its encoder's."""
        view = workspace.view(query)
        sources = view.column("source", np.arange(view.num_items)).to_pylist()
        names = [view.readable[code] if code >= 0 else None for code in view.owner]
        places = np.flatnonzero(view.owner >= 0)
        if len(places):
            vectors = view.vectors(places)
            for row, place in enumerate(places.tolist()):
                expected = self.generations[str(names[place])].encode([sources[place]])[0][0]
                if not np.allclose(vectors[row], expected, atol=1e-5):
                    self.found("wrong_vector", f"{view.item_ids[place]} for {query}")
        return dict(zip(view.item_ids, names, strict=True)), dict(zip(view.item_ids, sources, strict=True))

    def compare_after_kill(
        self, act: str, given: dict[str, Any], touched: set[str], before: tuple[str | None, str | None]
    ) -> None:
        """Half-way: what was not being changed is there and can be read; who serves is that of before or of after."""
        workspace = self.opened()
        serving = workspace.registry.serving()
        after = {
            "promote": given.get("rollout", {}).get("generation"), "rollback": self.model.previous,
            "forward": self.model.left,
        }.get(act, before[0])  # fmt: skip
        if serving.champion not in (before[0], after):
            self.found("wrong_serving", f"killed {act}: {serving}")
        self.stored(workspace)
        if serving.champion is None:
            return
        owners, sources = self.seen(workspace, serving.champion)
        for item_id, image in self.model.live().items():
            if item_id in touched:
                continue
            if sources.get(item_id) != f"synthetic:{identity(item_id)}/{image}":
                self.found("lost", f"killed {act}: {item_id}")
            elif owners[item_id] is None:
                self.found("unreadable", f"killed {act}: {item_id} for {serving.champion}")

    def compare(self, act: str) -> None:
        """At the end of an operation: the serving state, and every certified generation's view."""
        workspace, model = self.opened(), self.model
        serving = workspace.registry.serving()
        if (serving.champion, serving.previous, serving.left) != (model.champion, model.previous, model.left):
            self.found("wrong_serving", f"{act}: {serving}, expected {model}")
        vectors = self.stored(workspace)
        live = {item_id: f"synthetic:{identity(item_id)}/{image}" for item_id, image in model.live().items()}
        for query in sorted(query for query, held in model.certificates if query == held):
            owners, sources = self.seen(workspace, query)
            if sources != live:
                self.found("lost", f"{act}: {sources}, expected {live}")
            elif owners != model.owners(query, vectors):
                self.found("wrong_owner", f"{act}: {owners} for {query}")
            if query in (model.champion, model.previous, model.left) and None in owners.values():
                self.found("unreadable", f"{act}: {owners} for {query}")

    def end(self) -> None:
        """Collect, and look for what is left over."""
        self.run_child("collect", {"dead_share": 0.0}, kill=False)
        self.reader = None
        workspace = Workspace(self.root)
        collect(workspace.gallery, workspace.protected, dead_share=0.0, orphan_age_s=0.0)
        for table in (workspace.gallery.items_table, workspace.gallery.vectors_table):
            left = table.orphans(older_than_s=0.0)
            if left:
                self.found("orphans", f"{left}")
        pinned = [name for name in file_ages(f"{self.root}/gallery/leases") if name.endswith(".json")]
        if pinned:
            self.found("orphans", f"leases {pinned}")
        self.compare("end")

    def found(self, kind: str, detail: str) -> None:
        self.wrong[kind] += 1
        self.details.append(f"history {self.seed}: {kind}: {detail}")


def soak(num_kills: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """Histories until so many processes have been killed, `jobs` at a time; the counts of what was found."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.soak"])
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    durations: dict[str, list[float]] = defaultdict(list)
    wrong, after, killed_in = Counter[str](), Counter[str](), Counter[str]()
    started, histories, operations, kills = time.monotonic(), 0, 0, 0

    def one(number: int) -> History:
        folder = tempfile.mkdtemp(prefix="graceful-soak-", dir=base)
        history = History(seed + number, folder, durations)
        try:
            history.run()
        except Exception:
            history.found("errors", traceback.format_exc())
        shutil.rmtree(folder, ignore_errors=True)
        return history

    with ThreadPoolExecutor(jobs) as threads:
        while kills < num_kills:
            for history in threads.map(one, range(histories, histories + jobs)):
                histories += 1
                kills += history.num_kills
                operations += history.num_operations
                wrong += history.wrong
                after += history.killed_after
                killed_in += history.killed_in
                for line in history.details:
                    print(line, file=sys.stderr, flush=True)
            said = f"{kills} kills, {histories} histories, {time.monotonic() - started:.0f} s"
            print(said, file=sys.stderr, flush=True)
    return {
        "kills": kills,
        "histories": histories,
        "operations": operations,
        **{kind: wrong[kind] for kind in WRONG},
        "killed_in": dict(sorted(killed_in.items())),
        "killed_after_point": dict(sorted(after.items())),
        "seconds": round(time.monotonic() - started),
        "seed": seed,
        "hardware": f"{os.cpu_count()} x {processor()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def main(given: Sequence[str]) -> int:
    """Run, print one line, and store the result; exit code 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="histories at a time")
    parser.add_argument("--store", default=str(RESULTS), help="where the result is written; empty: nowhere")
    chosen = parser.parse_args(given)
    result = soak(chosen.kills, chosen.seed, chosen.jobs)
    said = ", ".join(f"{result[kind]} {kind.replace('_', ' ')}" for kind in WRONG)
    print(f"{result['kills']} kills in {result['histories']} histories, {result['seconds']} s: {said}")
    if chosen.store:
        Path(chosen.store).write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    return 1 if any(result[kind] for kind in WRONG) else 0
