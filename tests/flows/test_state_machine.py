"""The gallery and the serving state against a dictionary: any order of events, any crash, the same view."""

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from graceful.evaluation.decision import CertificateToIssue, Decision
from graceful.files import set_crash_hook
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.store.registry import Registry, ServingMovedError, ServingState
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import gate
from graceful.flows.update.gate import MoveRefusedError
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote
from graceful.flows.update.serving import (
    NothingToRollBackError,
    abandon,
    delete,
    generations_to_write,
    go_forward,
    ingest,
    release_previous,
    revoke,
    rollback,
)
from graceful.indexing import gallery as gallery_module
from graceful.indexing import items as items_module
from graceful.indexing import maintenance
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.maintenance import LeasedError, collect, forget
from graceful.indexing.revisions import NUM_BUCKETS, NUMBER_BITS, buckets_of
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row

GALLERY = GalleryConfig(order="oldest_generation", wave_rows=2, unit_rows=2)
ITEM_IDS = [f"item-{number}" for number in range(6)]
CRASH_POINTS = [
    "table-file-written", "table-committed", "items-ingested", "vectors-before-commit", "vectors-after-commit",
    "generation-ingested", "certified", "protected", "plan-saved", "before-serving-moves", "after-serving-moved",
    "wave-done", "rewrite-before-commit", "rewrite-after-commit", "merge-before-commit", "collect-before-leases",
    "collect-after-leases",
]  # fmt: skip
COLLECT = "collect"
INGEST, DELETE, RELEASE = "ingest", "delete", "release"
NOISE = 0.3
"""Generations differ, so that a vector of the wrong one is seen."""
OTHERS = ["other-0", "other-1"]
"""Items that only a second handle writes, so that the model knows what becomes of them."""


class SimulatedCrash(BaseException):
    """Ends an operation between two writes, as a kill would."""


class Model:
    """The reading rule over dictionaries."""

    def __init__(self) -> None:
        self.items: dict[str, tuple[int, str | None]] = {}
        self.certificates: set[tuple[str, str]] = set()

    def put(self, item_id: str, image: str) -> None:
        revision, current = self.items.get(item_id, (0, None))
        if current != image:
            self.items[item_id] = (revision + 1, image)

    def delete(self, item_id: str) -> None:
        revision, current = self.items.get(item_id, (0, None))
        if current is not None:
            self.items[item_id] = (revision + 1, None)

    def number(self, item_id: str) -> int:
        """The gallery's number of the latest revision (every item of these has a bucket of its own)."""
        return int(buckets_of([item_id])[0] << NUMBER_BITS) + self.items[item_id][0]

    def view(self, query: str, vectors: set[tuple[int, str]]) -> dict[str, str | None]:
        readable = sorted(gallery for q, gallery in self.certificates if q == query)
        seen: dict[str, str | None] = {}
        for item_id, (_, image) in self.items.items():
            if image is not None:
                owners = [g for g in readable if (self.number(item_id), g) in vectors]
                seen[item_id] = owners[-1] if owners else None
        return seen


def merge(workspace: Workspace) -> None:
    """Merge whatever there is to merge, as after many small commits."""
    workspace.gallery.items_table.compact(at_least=2)
    workspace.gallery.vectors_table.compact(at_least=2)


class UpdateMachine(RuleBasedStateMachine):
    """Ingest, change, delete, candidate, promote, wave, hold, rollback, collect, crash and reopen."""

    candidates = Bundle("candidates")

    @initialize(served=st.sampled_from([True, True, True, False]))
    def open(self, served: bool) -> None:
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = tempfile.mkdtemp(prefix="graceful-machine-", dir=base)
        self.models = SyntheticModels()
        self.model = Model()
        self.num_generations = 0
        self.num_batches = 0
        self.pinned: list[tuple] = []
        self.clock_s = 0.0
        self.patch = pytest.MonkeyPatch()
        real = time.time
        self.patch.setattr(time, "time", lambda: real() + self.clock_s)
        self.champion: str | None = None
        self.previous: str | None = None
        self.reopen()
        # Most examples start from a served gallery: what follows a promotion is where mistakes hide.
        if served:
            self.do_ingest(dict.fromkeys(ITEM_IDS[:4], "a"), None)
            self.do_promote(self.new_candidate(), 1.0, True, set(), True, None)

    def teardown(self) -> None:
        set_crash_hook(None)
        for lease, *_ in self.pinned:
            lease.release()
        self.patch.undo()
        shutil.rmtree(self.folder, ignore_errors=True)

    def reopen(self) -> None:
        self.workspace = Workspace(self.folder, self.models, create=True)

    def run(self, operation, crash_at: tuple[str, int, str] | None):
        """Run an operation; between two of its writes another handle acts, or it dies and is run again to its end."""
        if crash_at is None:
            return operation()
        point, countdown, meanwhile = crash_at

        def hook(name: str) -> None:
            nonlocal countdown
            if name == point or point == "any":
                countdown -= 1
                if countdown < 0:
                    set_crash_hook(None)
                    if meanwhile == "crash":
                        raise SimulatedCrash(name)
                    self.act_meanwhile(meanwhile)

        set_crash_hook(hook)
        try:
            return operation()
        except SimulatedCrash:
            self.reopen()
            return operation()
        finally:
            set_crash_hook(None)

    def act_meanwhile(self, what: str) -> None:
        """Another handle, as of another process, acts and ends between two writes of this one."""
        other = Workspace(self.folder, self.models, create=True)
        if what == COLLECT:
            if other.kept():
                collect(other.gallery, other.protected, dead_share=0.0)
        elif what == INGEST:
            rows = [item_row(item_id, "id1", f"{self.num_batches}") for item_id in OTHERS]
            ingest(other, pa.Table.from_pylist(rows), unit_rows=2)
            for item_id in OTHERS:
                self.model.put(item_id, f"{self.num_batches}")
        elif what == DELETE:
            delete(other, OTHERS)
            for item_id in OTHERS:
                self.model.delete(item_id)
        elif what == "merge":
            merge(other)
        else:
            raise AssertionError(what)

    crash = st.one_of(
        st.none(),
        st.tuples(
            st.sampled_from(CRASH_POINTS),
            st.integers(0, 3),
            st.sampled_from(["crash", "crash", COLLECT, INGEST, DELETE]),
        ),
        st.tuples(st.just("any"), st.integers(0, 12), st.sampled_from(["crash", COLLECT, COLLECT, INGEST, "merge"])),
    )

    @rule(
        changes=st.dictionaries(st.sampled_from(ITEM_IDS), st.sampled_from("abc"), min_size=1, max_size=4),
        crash_at=crash,
    )
    def ingest_or_change(self, changes, crash_at):
        self.do_ingest(changes, crash_at)

    def do_ingest(self, changes, crash_at):
        self.num_batches += 1
        rows = pa.Table.from_pylist([item_row(item_id, "id0", image) for item_id, image in changes.items()])
        self.run(lambda: ingest(self.workspace, rows, unit_rows=2), crash_at)
        for item_id, image in changes.items():
            self.model.put(item_id, image)
        for generation in generations_to_write(self.workspace):
            missing = set(self.workspace.gallery.missing_vectors(generation).tolist())
            assert not missing & {self.model.number(item_id) for item_id in changes}

    @rule(chosen=st.sets(st.sampled_from(ITEM_IDS), min_size=1, max_size=3), crash_at=crash)
    def delete_items(self, chosen, crash_at):
        self.run(lambda: delete(self.workspace, sorted(chosen)), crash_at)
        for item_id in chosen:
            self.model.delete(item_id)

    @rule(target=candidates)
    def train_candidate(self):
        return self.new_candidate()

    def new_candidate(self):
        self.num_generations += 1
        generation = f"g{self.num_generations:03d}-{self.num_generations:06x}"
        self.models.add(SyntheticGeneration(generation, noise=NOISE))
        return generation

    @rule(
        candidate=consumes(candidates),
        fraction=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        full=st.booleans(),
        refuse=st.sets(st.integers(0, 3)),
        waves_now=st.booleans(),
        crash_at=crash,
    )
    def promote_candidate(self, candidate, fraction, full, refuse, waves_now, crash_at):
        self.do_promote(candidate, fraction, full, refuse, waves_now, crash_at)

    def do_promote(self, candidate, fraction, full, refuse, waves_now, crash_at):
        operation, pairs, champion, full = self.promotion(candidate, fraction, full, refuse, waves_now)
        self.run(operation, crash_at)
        self.model.certificates |= set(pairs)
        self.champion, self.previous = candidate, champion
        seen = self.seen(candidate)
        assert None not in seen.values()
        if full:
            assert set(seen.values()) <= {candidate}
        elif waves_now:
            done = sum(owner == candidate for owner in seen.values())
            assert done >= fraction * len(seen) - 1e-9

    def promotion(self, candidate, fraction, full, refuse, waves_now):
        """What an update does after its decision: to be called, and called again."""
        champion = self.workspace.registry.serving().champion
        full = full or champion is None
        owners = [] if champion is None else self.workspace.registry.readable(champion)
        certified = [owner for place, owner in enumerate(owners) if place not in refuse]
        pairs = ((candidate, candidate), *((candidate, owner) for owner in certified))
        decision = Decision(
            outcome="BOOTSTRAP" if champion is None else "FULL_BACKFILL" if full else "COMPATIBLE_ROLLOUT",
            summary="",
            candidate=candidate,
            champion=champion,
            fraction=fraction,
            order=GALLERY.order,
            certificates=tuple(CertificateToIssue(query_generation=q, gallery_generation=g) for q, g in pairs),
            reasons=(),
        )
        rollout = Rollout.of(decision, update_key=f"u-{candidate}", evaluation=f"d-{candidate}", gallery=GALLERY)
        assert rollout is not None

        def operation():
            plan = prepare(self.workspace, rollout)
            embed_before_move(self.workspace, rollout, plan)
            promote(self.workspace, rollout, plan, champion=champion)
            if waves_now:
                continue_plan(self.workspace, unit_rows=2)

        return operation, pairs, champion, full

    @rule(
        candidate=consumes(candidates),
        full=st.booleans(),
        refuse=st.sets(st.integers(0, 3)),
        failing=st.one_of(st.just("abc"), st.sets(st.sampled_from("abc"), min_size=1, max_size=2)),
        heals=st.booleans(),
        crash_at=crash,
    )
    @precondition(lambda self: self.champion is not None)
    def promote_candidate_that_cannot_embed(self, candidate, full, refuse, failing, heals, crash_at):
        """It is refused, or serves all that could be read; refused, it goes on when its images are there again."""
        unreadable = frozenset(f"synthetic:id0/{image}" for image in failing)
        self.models.add(SyntheticGeneration(candidate, noise=NOISE, unreadable=unreadable))
        readable_before = {item for item, owner in self.seen(self.champion).items() if owner is not None}
        operation, pairs, champion, full = self.promotion(candidate, 1.0, full, refuse, True)
        try:
            self.run(operation, crash_at)
        except MoveRefusedError:
            set_crash_hook(None)
            self.model.certificates |= set(pairs)
            self.serving_state_is_the_models()
            seen = self.seen(self.champion)
            assert all(seen[item] is not None for item in readable_before & set(seen))
            self.models.add(SyntheticGeneration(candidate, noise=NOISE))
            if not heals:
                abandon(self.workspace)
                return
            operation()
        self.models.add(SyntheticGeneration(candidate, noise=NOISE))
        self.model.certificates |= set(pairs)
        self.champion, self.previous = candidate, champion
        seen = self.seen(candidate)
        assert all(seen[item] is not None for item in readable_before & set(seen))

    @rule(candidate=consumes(candidates), crash_at=crash)
    @precondition(lambda self: self.champion is not None)
    def hold_after_a_wave(self, candidate, crash_at):
        """Vectors of a generation that never serves are seen by nobody."""
        from graceful.indexing.reindex import embed_missing

        def seen():  # another handle may have written the others meanwhile
            return {item: owner for item, owner in self.seen(self.champion).items() if item not in OTHERS}

        before = seen()
        self.run(
            lambda: embed_missing(self.workspace.gallery, candidate, self.models(candidate), unit_rows=2), crash_at
        )
        assert seen() == before

    @rule(crash_at=crash)
    def finish_waves(self, crash_at):
        self.run(lambda: continue_plan(self.workspace, unit_rows=2), crash_at)
        assert self.workspace.registry.serving().active_plan is None

    @rule()
    def roll_back(self):
        if self.previous is None:
            with pytest.raises(NothingToRollBackError):
                rollback(self.workspace)
            return
        data = self.workspace.gallery.version()
        rollback(self.workspace)
        assert self.workspace.gallery.version() == data
        self.champion, self.previous = self.previous, None
        assert None not in self.seen(self.champion).values()

    @rule()
    @precondition(lambda self: self.workspace.registry.serving().left is not None)
    def go_forward_again(self):
        """What a rollback left is complete: nothing is hidden by going back to it, whatever happened since."""
        left = self.workspace.registry.serving().left
        assert None not in self.seen(left).values()
        go_forward(self.workspace, left, reason="test")
        self.champion, self.previous = left, self.champion

    @rule()
    def release(self):
        release_previous(self.workspace)
        self.previous = None

    @rule(crash_at=crash)
    @precondition(lambda self: self.champion is not None)
    def collect_garbage(self, crash_at):
        serving = self.workspace.registry.serving()
        names = [name for name in (serving.champion, serving.previous, serving.left) if name]
        before = [self.seen(name) for name in names]
        others = [*self.model.items] if crash_at and crash_at[2] in (INGEST, DELETE) else []

        def operation():
            collect(self.workspace.gallery, self.workspace.protected, dead_share=0.0)

        self.run(operation, crash_at)
        self.reopen()
        if not others:
            assert [self.seen(name) for name in names] == before

    @rule(
        chosen=st.sets(st.sampled_from(ITEM_IDS), min_size=1, max_size=2), images=st.sampled_from("abc"), crash_at=crash
    )
    def forget_and_perhaps_bring_back(self, chosen, images, crash_at):
        """Numbers are never given twice: a vector of the forgotten image is not read as that of the new one."""

        def operation():
            delete(self.workspace, sorted(chosen))
            forget(self.workspace.gallery, sorted(chosen))

        if self.pinned:
            delete(self.workspace, sorted(chosen))
            with pytest.raises(LeasedError):
                operation()
        else:
            self.run(operation, crash_at)
        for item_id in chosen:
            self.model.delete(item_id)
        if images != "c":
            self.do_ingest(dict.fromkeys(chosen, images), None)

    @rule(crash_at=crash)
    def merge_small_files(self, crash_at):
        self.run(lambda: merge(self.workspace), crash_at)

    @rule(step_s=st.sampled_from([-7200.0, -5.0, 3600.0, 90_000.0]))
    def clock_steps(self, step_s):
        self.clock_s += step_s

    @rule()
    @precondition(lambda self: self.champion is not None and len(self.pinned) < 2)
    def pin_a_view(self):
        lease = self.workspace.gallery.take_lease()
        view = self.workspace.view(self.champion, lease.version)
        readable = np.flatnonzero(view.owner >= 0)
        expected = self.expected(view, readable)
        self.pinned.append((lease, view, readable, expected))

    @rule()
    @precondition(lambda self: bool(self.pinned))
    def give_the_pinned_view_back(self):
        lease, view, readable, expected = self.pinned.pop()
        if len(readable):
            np.testing.assert_allclose(view.vectors(readable), expected, atol=1e-5)
        lease.check()
        lease.release()

    @rule(place=st.integers(0, 3))
    @precondition(lambda self: self.champion is not None)
    def revoke_a_certificate(self, place):
        """Refused where it would hide something; what is revoked is not read through any more."""
        others = sorted(pair for pair in self.model.certificates if pair[0] == self.champion != pair[1])
        if not others:
            return
        pair = others[place % len(others)]
        through = [item for item, owner in self.seen(self.champion).items() if owner == pair[1]]
        try:
            hidden = revoke(self.workspace, *pair, reason="test")
        except MoveRefusedError:
            assert through
            return
        assert hidden == 0
        self.model.certificates.discard(pair)

    @rule()
    def reopen_elsewhere(self):
        self.reopen()

    def seen(self, query: str) -> dict[str, str | None]:
        view = self.workspace.view(query)
        names = [view.readable[code] if code >= 0 else None for code in view.owner]
        return dict(zip(view.item_ids, names, strict=True))

    @invariant()
    def serving_state_is_the_models(self):
        serving = self.workspace.registry.serving()
        assert (serving.champion, serving.previous) == (self.champion, self.previous)

    @invariant()
    def every_certified_generation_sees_what_the_model_sees(self):
        gallery = self.workspace.gallery
        snapshot = gallery.vectors_table.snapshot()
        vectors = set()
        for file in snapshot.files:
            keys = pq.read_table(snapshot.location(file), columns=["revision"], partitioning=None)
            rows = [(number, file.partition) for number in keys["revision"].to_pylist()]
            assert len(set(rows)) == len(rows), "a vector was written twice"
            assert not vectors & set(rows), "a vector was written twice"
            vectors |= set(rows)
        for query in {query for query, gallery in self.model.certificates if query == gallery}:
            assert self.seen(query) == self.model.view(query, vectors)

    @invariant()
    def vectors_are_those_of_the_latest_image(self):
        if self.champion is None:
            return
        view = self.workspace.view(self.champion)
        readable = np.flatnonzero(view.owner >= 0)
        if len(readable):
            np.testing.assert_allclose(view.vectors(readable), self.expected(view, readable), atol=1e-5)

    def expected(self, view, positions):
        """Vectors of the images that the items have in a view, by the encoders of their owners."""
        sources = view.column("source", positions).to_pylist()
        rows = []
        for position, source in zip(positions.tolist(), sources, strict=True):
            generation = self.models.generations[view.readable[view.owner[position]]]
            rows.append(SyntheticGeneration(generation.generation_id, noise=NOISE).encode([source])[0][0])
        return np.array(rows)

    @invariant()
    def pinned_views_stay_readable(self):
        for _, view, readable, expected in self.pinned:
            if len(readable):
                np.testing.assert_allclose(view.vectors(readable), expected, atol=1e-5)


TestUpdateMachine = UpdateMachine.TestCase
TestUpdateMachine.settings = settings(
    max_examples=40,
    stateful_step_count=16,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestUpdateMachine.pytestmark = [pytest.mark.timeout(400)]

SEARCH_ONLY = settings(
    TestUpdateMachine.settings,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate],
    derandomize=True,
    max_examples=200,
)


@pytest.mark.timeout(400)
def test_state_machine_catches_a_committer_that_serves_revisions_it_should_not(monkeypatch):
    """A machine that cannot fail proves nothing: items that ignore what was replaced must be found out."""
    monkeypatch.setattr(items_module, "_without", lambda ordered, gone: ordered)
    with pytest.raises((AssertionError, ExceptionGroup, KeyError)):
        run_state_machine_as_test(UpdateMachine, settings=SEARCH_ONLY)


@pytest.mark.timeout(400)
def test_state_machine_catches_a_committer_that_writes_twice(monkeypatch):
    """Without the check for stored rows a killed and repeated unit would commit again."""
    nothing = lambda self, generation, revisions, snapshot: np.zeros(len(revisions), bool)  # noqa: E731
    monkeypatch.setattr(gallery_module.Gallery, "_stored", nothing)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(UpdateMachine, settings=SEARCH_ONLY)


BROKEN = settings(SEARCH_ONLY, max_examples=300)
CAUGHT = (AssertionError, ExceptionGroup, KeyError, DamagedFileError, MoveRefusedError, pytest.fail.Exception)


def play(story):
    """One history of the machine, told step by step: where a search would take long to find it."""
    machine = UpdateMachine()
    try:
        machine.open(served=True)
        story(machine)
        machine.serving_state_is_the_models()
        machine.every_certified_generation_sees_what_the_model_sees()
        machine.vectors_are_those_of_the_latest_image()
    finally:
        machine.teardown()


def run_until_it_fails():
    with pytest.raises(CAUGHT):
        run_state_machine_as_test(UpdateMachine, settings=BROKEN)


@pytest.mark.timeout(400)
def test_state_machine_catches_a_committer_that_does_not_look_whether_the_image_has_changed(monkeypatch):
    """A vector of the image that was replaced, stored under the number of the one that took its place."""
    real = gallery_module.Gallery.missing_vectors

    def newest_number_only(self, generation, revisions=None, version=None):
        # Whoever has had any revision embedded is taken to have a vector of the latest.
        found = real(self, generation, revisions, version)
        stored = self.vectors_table.snapshot().by_partition.get(generation, ())
        buckets = {file.lowest >> NUMBER_BITS for file in stored} | {file.highest >> NUMBER_BITS for file in stored}
        return found[~np.isin(found >> NUMBER_BITS, list(buckets))]

    monkeypatch.setattr(gallery_module.Gallery, "missing_vectors", newest_number_only)
    run_until_it_fails()


@pytest.mark.timeout(400)
def test_state_machine_catches_a_move_gate_that_always_passes(monkeypatch):
    def story(machine):
        machine.promote_candidate_that_cannot_embed(machine.new_candidate(), True, {0}, {"a"}, False, None)

    play(story)
    real = gate.compare

    def nothing_hidden(*given):
        found = real(*given)
        return replace(found, hidden=found.hidden[:0], num_readable_then=found.then.num_items)

    monkeypatch.setattr(gate, "compare", nothing_hidden)
    with pytest.raises(CAUGHT):
        play(story)


@pytest.mark.timeout(400)
def test_state_machine_catches_a_collector_that_protects_the_champion_only(monkeypatch):
    def story(machine):
        machine.do_promote(machine.new_candidate(), 1.0, True, set(), True, None)
        machine.collect_garbage(crash_at=None)

    play(story)
    real = maintenance.needed_vectors
    monkeypatch.setattr(
        maintenance, "needed_vectors", lambda gallery, lists, version: real(gallery, lists[:1], version)
    )
    with pytest.raises(CAUGHT):
        play(story)


@pytest.mark.timeout(400)
def test_state_machine_catches_a_collector_that_deletes_what_leases_pin(monkeypatch):
    monkeypatch.setattr(gallery_module.Gallery, "leased_versions", lambda self: [])
    run_until_it_fails()


@pytest.mark.timeout(400)
def test_state_machine_catches_numbers_that_are_given_again_after_an_item_was_forgotten(monkeypatch):
    """Counted from what is there, and not from what was given."""

    def story(machine):
        machine.do_ingest(dict.fromkeys(ITEM_IDS, "c"), None)
        machine.forget_and_perhaps_bring_back({ITEM_IDS[0]}, "b", None)

    play(story)

    def counted(self, touched):
        counters = np.zeros(NUM_BUCKETS, np.int64)
        revisions = self.table.snapshot().rows(["revision"])["revision"].to_numpy()
        np.maximum.at(counters, revisions >> NUMBER_BITS, revisions & ((1 << NUMBER_BITS) - 1))
        return counters

    monkeypatch.setattr(items_module.Items, "_counters", counted)
    with pytest.raises(CAUGHT):
        play(story)


@pytest.mark.timeout(400)
def test_state_machine_catches_a_registry_that_goes_by_the_clock(monkeypatch):
    def by_the_clock(self):
        rows = self._certificates.snapshot().rows().sort_by("at").to_pylist()
        latest = {(row["query_generation"], row["gallery_generation"]): row["in_force"] for row in rows}
        return {pair for pair, in_force in latest.items() if in_force}

    def history_by_the_clock(self, version):
        rows = self._serving.snapshot(version).rows().sort_by("at").to_pylist()
        return [ServingState.model_validate_json(row["state"]) for row in rows]

    def story(machine):
        machine.clock_s -= 7200.0
        machine.do_promote(machine.new_candidate(), 0.5, False, set(), True, None)

    play(story)
    monkeypatch.setattr(Registry, "certificates", by_the_clock)
    monkeypatch.setattr(Registry, "_serving_history_at", history_by_the_clock)
    with pytest.raises((*CAUGHT, ServingMovedError)):
        play(story)
