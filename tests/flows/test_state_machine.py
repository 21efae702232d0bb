"""The gallery and the serving state against a dictionary: any order of events, any crash, the same view."""

import shutil
import tempfile
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
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote
from graceful.flows.update.serving import (
    NothingToRollBackError,
    delete,
    generations_to_write,
    go_forward,
    ingest,
    release_previous,
    rollback,
)
from graceful.indexing import gallery as gallery_module
from graceful.indexing import items as items_module
from graceful.indexing.maintenance import collect
from graceful.indexing.revisions import NUMBER_BITS, buckets_of
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row

GALLERY = GalleryConfig(order="oldest_generation", wave_rows=2, unit_rows=2)
ITEM_IDS = [f"item-{number}" for number in range(6)]
CRASH_POINTS = [
    "table-file-written", "table-committed", "items-ingested", "vectors-before-commit", "vectors-after-commit",
    "generation-ingested", "certified", "protected", "plan-saved", "before-serving-moves", "after-serving-moved",
    "wave-done",
]  # fmt: skip


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
        self.champion: str | None = None
        self.previous: str | None = None
        self.reopen()
        # Most examples start from a served gallery: what follows a promotion is where mistakes hide.
        if served:
            self.do_ingest(dict.fromkeys(ITEM_IDS[:4], "a"), None)
            self.do_promote(self.new_candidate(), 1.0, True, set(), True, None)

    def teardown(self) -> None:
        set_crash_hook(None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def reopen(self) -> None:
        self.workspace = Workspace(self.folder, self.models, create=True)

    def run(self, operation, crash_at: tuple[str, int] | None):
        """Run an operation that may crash between two writes; then reopen and run it again to its end."""
        if crash_at is not None:
            countdown = [crash_at[1]]

            def hook(name: str) -> None:
                if name == crash_at[0]:
                    countdown[0] -= 1
                    if countdown[0] < 0:
                        raise SimulatedCrash(name)

            set_crash_hook(hook)
            try:
                result = operation()
            except SimulatedCrash:
                set_crash_hook(None)
                self.reopen()
            else:
                return result
            finally:
                set_crash_hook(None)
        return operation()

    crash = st.one_of(st.none(), st.tuples(st.sampled_from(CRASH_POINTS), st.integers(0, 3)))

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
        self.models.add(SyntheticGeneration(generation))
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

    @rule(candidate=consumes(candidates), crash_at=crash)
    @precondition(lambda self: self.champion is not None)
    def hold_after_a_wave(self, candidate, crash_at):
        """Vectors of a generation that never serves are seen by nobody."""
        before = self.seen(self.champion)
        from graceful.indexing.reindex import embed_missing

        self.run(
            lambda: embed_missing(self.workspace.gallery, candidate, self.models(candidate), unit_rows=2), crash_at
        )
        assert self.seen(self.champion) == before

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

    @rule()
    @precondition(lambda self: self.champion is not None)
    def collect_garbage(self):
        protected = self.workspace.protected()
        serving = self.workspace.registry.serving()
        names = [name for name in (serving.champion, serving.previous, serving.left) if name]
        before = [self.seen(name) for name in names]
        collect(self.workspace.gallery, lambda: protected, dead_share=0.0)
        self.reopen()
        assert [self.seen(name) for name in names] == before

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
        readable = (view.owner >= 0).nonzero()[0]
        for position in readable:
            owner = self.models.generations[view.readable[view.owner[position]]]
            expected = owner.encode([view.column("source", np.array([position]))[0].as_py()])[0]
            assert abs(view.vectors(readable[readable == position]) - expected).max() < 1e-5


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
