"""What the pipeline remembers beside the gallery: lineage, certificates, plans and the serving state.

Four versioned tables below `registry/`, all append-only; the newest row of `serving` is the serving state, and its
rows are the promotion history. The serving state moves only by compare-and-swap and always names the decision (or the
operator) that moved it. `readable` turns certificates into the list that the gallery's reading rule takes.

Order is the order of commits, in the column `sequence`; `at` is what some host's clock said, and decides nothing.
"""

import hashlib
import random
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from graceful.errors import GracefulError
from graceful.files import crash_point, join, read_bytes, write_bytes
from graceful.flows.store.events import (
    Adopted,
    Decided,
    Event,
    H,
    Promoted,
    Rejected,
    Retired,
    ThresholdsSet,
    Trained,
    VariantTrained,
    from_row,
    to_text,
)
from graceful.indexing.planner import PLAN_ITEMS_SCHEMA
from graceful.indexing.tables import TableConflictError, VersionedTable, in_use
from graceful.training.generation import ordinal_of, variant_in

LINEAGE_SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("sequence", pa.int64()),
        ("kind", pa.string()),
        ("update_key", pa.string()),
        ("generation", pa.string()),
        ("at", pa.float64()),
        ("payload", pa.string()),
    ]
)
CERTIFICATES_SCHEMA = pa.schema(
    [
        ("query_generation", pa.string()),
        ("gallery_generation", pa.string()),
        ("sequence", pa.int64()),
        ("in_force", pa.bool_()),
        ("reason", pa.string()),
        ("at", pa.float64()),
    ]
)
PLANS_SCHEMA = pa.schema([("plan_id", pa.string()), ("plan", pa.string()), ("items_sha256", pa.string())])
SERVING_SCHEMA = pa.schema([("sequence", pa.int64()), ("at", pa.float64()), ("state", pa.string())])
_ATTEMPTS = 40
_BACK_OFF_S = 0.02


class UncertifiedGenerationError(GracefulError):
    """A query of this generation may not be answered: the generation has no certificate for itself."""


class UnknownGenerationError(GracefulError):
    """No generation has this id."""


class ServingMovedError(GracefulError):
    """Another update moved the serving state first; nothing was changed."""


class DamagedPlanError(GracefulError):
    """The items of a plan are not those that were stored."""


class ServingState(BaseModel):
    """Who answers queries now, and whose vectors are kept. `sequence` numbers the moves; 0 is the empty workspace.

    `prepared`: the generation of a plan that is prepared and has not moved yet. `left`: the one that the last rollback
    left, to which it is possible to go forward again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int = 0
    champion: str | None = None
    previous: str | None = None
    active_plan: str | None = None
    prepared: str | None = None
    left: str | None = None
    moved_by: str = ""


class Plan(BaseModel):
    """An ordered list of items to re-embed with one generation; its items stand in a file of their own.

    `decision` names the evaluation that it carries out; `ordered`: by the operator, against what was decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_id: str
    generation: str
    order: str
    seed: int
    fraction: float
    num_items: int
    num_wave_zero: int
    num_waves: int
    before_move: Literal["all", "wave_zero"]
    decision: str
    ordered: bool = False


def read_by(query_generation: str, certificates: Iterable[tuple[str, str]]) -> list[str]:
    """Generations whose rows a query generation has certificates for, oldest first; variants have no rows."""
    found = {gallery for query, gallery in certificates if query == query_generation and variant_in(gallery) is None}
    return sorted(found, key=ordinal_of)


class Registry:
    """A handle on the registry below one location."""

    def __init__(self, location: str, *, create: bool = False) -> None:
        """Open the registry; with `create` it is made empty where there is none."""
        self.location = location
        create = create and not in_use(location, ("lineage", "certificates", "plans", "serving"))
        self._lineage = VersionedTable(join(location, "lineage"), LINEAGE_SCHEMA, create=create)
        self._certificates = VersionedTable(join(location, "certificates"), CERTIFICATES_SCHEMA, create=create)
        self._plans = VersionedTable(join(location, "plans"), PLANS_SCHEMA, create=create)
        self._serving = VersionedTable(join(location, "serving"), SERVING_SCHEMA, create=create)

    # Lineage ----------------------------------------------------------------------------------------------------------

    def record(self, happened: H, *, update_key: str = "", generation: str = "", occurrence: int = 1) -> bool:
        """Append an event. Within an update each kind happens once per generation: a repetition writes nothing."""
        kind = type(happened).model_fields["kind"].default
        event_id = f"{update_key}/{kind}/{generation}/{occurrence}" if update_key else uuid.uuid4().hex
        row = {
            "event_id": event_id,
            "kind": kind,
            "update_key": update_key,
            "generation": generation,
            "at": time.time(),
            "payload": to_text(happened),
        }
        return _append_in_order(self._lineage, [row], unit=event_id)

    def record_once(
        self, kind: type[H], key: str, generation: str, make: Callable[[list[Event[H]]], H], *, update_key: str = ""
    ) -> H:
        """Append an event that is made from those of its kind before it, unless one of this key is there; returns it.

        `make` is asked again where another event was recorded in between, so that no two count the same ones before.
        """
        name = kind.model_fields["kind"].default
        event_id = f"{name}/{key}"
        for attempt in range(_ATTEMPTS):
            version = self._lineage.version()
            rows = self._lineage.snapshot(version).records
            before: list[Event[H]] = [from_row(row, self.location) for row in rows if row["kind"] == name]
            known = [event.payload for event in before if event.event_id == event_id]
            if known:
                return known[0]
            happened = make(before)
            row = {
                "event_id": event_id,
                "sequence": version + 1,
                "kind": name,
                "update_key": update_key,
                "generation": generation,
                "at": time.time(),
                "payload": to_text(happened),
            }
            try:
                _append(self._lineage, [row], unit=event_id, expected_version=version)
            except TableConflictError:
                _back_off(attempt)
                continue
            self._lineage.compact()
            return happened
        raise TableConflictError(f"recording {name} {key}: others wrote first {_ATTEMPTS} times; try again")

    def events(self, kind: type[H], update_key: str | None = None) -> list[Event[H]]:
        """Events of one kind in the order in which they were recorded, of one update or of all.

        Raises:
            UnknownFormatError: a record of a form that this program does not know.
        """
        wanted = kind.model_fields["kind"].default
        return [
            from_row(row, self.location)
            for row in self._lineage.snapshot().records
            if row["kind"] == wanted and (update_key is None or row["update_key"] == update_key)
        ]

    def lineage_version(self) -> int:
        """A number that rises with every event."""
        return self._lineage.version()

    def history(self) -> list[Event[Any]]:
        """Everything that happened, in order. Raises UnknownFormatError, also for a kind that is not known."""
        return [from_row(row, self.location) for row in self._lineage.snapshot().records]

    def generations(self) -> list[str]:
        """Every generation ever trained or adopted, by ordinal."""
        ids = {event.generation for kind in (Trained, Adopted) for event in self.events(kind)}
        return sorted(ids, key=ordinal_of)

    def variants(self) -> dict[str, str]:
        """Every variant ever trained, in that order, with the generation that it is a variant of."""
        return {event.generation: event.payload.of for event in self.events(VariantTrained)}

    def resolve(self, name: str) -> str:
        """The full id of a generation or variant that is called by its id or by what stands before the dash (`g002`).

        Raises:
            UnknownGenerationError: there is none, or the ordinal is that of several.
        """
        known = [*self.generations(), *self.variants()]
        found = [generation for generation in known if name in (generation, generation.partition("-")[0])]
        if len(found) != 1:
            raise UnknownGenerationError(
                f"finding generation {name}: expected one of {', '.join(known) or 'none yet'}, found "
                f"{', '.join(found) or 'no such'}; give one of these ids"
            )
        return found[0]

    def pending_generation(self) -> str | None:
        """The candidate that waits for more evidence or for the operator's word; the next candidate supersedes it."""
        newest = self.generations()[-1:]
        open_key = None
        for event in self.history():
            happened = event.payload
            if event.generation not in newest:
                continue
            if isinstance(happened, Decided):
                open_key = event.update_key if happened.outcome == "INCONCLUSIVE" else None
            elif isinstance(happened, Rejected | Retired) or (
                isinstance(happened, Promoted) and event.update_key == open_key
            ):
                open_key = None
        return newest[0] if open_key is not None else None

    def served_generations(self) -> list[str]:
        """Every generation that has ever been champion, by ordinal: the predecessors of the next one."""
        ids = {state.champion for state in self.serving_history() if state.champion}
        return sorted(ids, key=ordinal_of)

    # Certificates -----------------------------------------------------------------------------------------------------

    def certify(self, pairs: Sequence[tuple[str, str]], *, reason: str) -> None:
        """Issue certificates (query generation, gallery generation); those in force already are left alone."""
        current = self.certificates()
        new = [pair for pair in pairs if pair not in current]
        self._write_certificates(new, in_force=True, reason=reason)

    def revoke(self, pairs: Sequence[tuple[str, str]], *, reason: str) -> None:
        """Revoke certificates; rows read through them become unreadable for that query generation."""
        self._write_certificates(pairs, in_force=False, reason=reason)

    def certificates(self) -> set[tuple[str, str]]:
        """Pairs (query generation, gallery generation) in force."""
        latest = {
            (row["query_generation"], row["gallery_generation"]): row["in_force"]
            for row in self._certificates.snapshot().records
        }
        return {pair for pair, in_force in latest.items() if in_force}

    def readable(self, query_generation: str) -> list[str]:
        """Generations whose vectors a query generation may be scored against, oldest first; a variant has none itself.

        Raises:
            UncertifiedGenerationError: the generation has no certificate for itself.
        """
        pairs = self.certificates()
        if (query_generation, query_generation) not in pairs:
            allowed = sorted({query for query, gallery in pairs if query == gallery}, key=ordinal_of)
            raise UncertifiedGenerationError(
                f"reading the gallery as {query_generation}: expected a certificate for itself, found none; "
                f"generations that may query: {', '.join(allowed) or 'none yet'}"
            )
        return read_by(query_generation, pairs)

    def _write_certificates(self, pairs: Sequence[tuple[str, str]], *, in_force: bool, reason: str) -> None:
        at = time.time()
        rows = [
            {"query_generation": query, "gallery_generation": gallery, "in_force": in_force, "reason": reason, "at": at}
            for query, gallery in pairs
        ]
        if rows:
            _append_in_order(self._certificates, rows)

    # Thresholds -------------------------------------------------------------------------------------------------------

    def set_thresholds(
        self, thresholds: Sequence[tuple[str, str, str, float]], *, decision: str, generation: str
    ) -> None:
        """Record the thresholds that a decision serves; recorded before, they are left alone."""
        if thresholds:
            self.record(ThresholdsSet(thresholds=tuple(thresholds)), update_key=decision, generation=generation)

    def thresholds(self) -> dict[tuple[str, str, str], float]:
        """The newest threshold of every (consumer, query generation, generation of the hit's vector)."""
        events = self.events(ThresholdsSet)
        return {(who, query, owner): value for e in events for who, query, owner, value in e.payload.thresholds}

    # Plans ------------------------------------------------------------------------------------------------------------

    def save_plan(self, plan: Plan, items: pa.Table) -> None:
        """Store a plan and its items (PLAN_ITEMS_SCHEMA); a plan saved before is left alone.

        The items lie in one file that is named by its content and never changed; it is written before the plan that
        names it.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(items.cast(PLAN_ITEMS_SCHEMA), sink)
        content = sink.getvalue().to_pybytes()
        digest = hashlib.sha256(content).hexdigest()
        write_bytes(self._plan_items_uri(digest), content)
        row = {"plan_id": plan.plan_id, "plan": plan.model_dump_json(), "items_sha256": digest}
        _append(self._plans, [row], unit=plan.plan_id)

    def plan(self, plan_id: str) -> tuple[Plan, pa.Table]:
        """Read a plan and its items in plan order.

        Raises:
            DamagedPlanError: the items are missing, or are not those that were stored.
        """
        row = self._plan_row(plan_id)
        location, found = self._plan_items_uri(row["items_sha256"]), "no file"
        try:
            content = read_bytes(location)
            found = f"other content, {len(content)} bytes"
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != row["items_sha256"]:
            raise DamagedPlanError(
                f"reading plan {plan_id}: expected the items that were stored, found {found} ({location}); restore "
                "the file, or judge the candidate again with 'graceful update --again'"
            )
        return Plan.model_validate_json(row["plan"]), pq.read_table(pa.BufferReader(content)).cast(PLAN_ITEMS_SCHEMA)

    def plan_head(self, plan_id: str) -> Plan:
        """Read a plan without its items."""
        return Plan.model_validate_json(self._plan_row(plan_id)["plan"])

    def plan_generation(self, plan_id: str) -> str:
        """Whose vectors a plan writes; reads no items."""
        return self.plan_head(plan_id).generation

    def _plan_row(self, plan_id: str) -> dict[str, Any]:
        rows = self._plans.snapshot().rows()
        rows = rows.filter(pc.equal(rows["plan_id"], plan_id)).to_pylist()
        if not rows:
            raise KeyError(f"reading plan {plan_id}: it is not in the registry")
        row: dict[str, Any] = rows[0]
        return row

    def _plan_items_uri(self, digest: str) -> str:
        return join(self.location, "plan_items", f"{digest}.parquet")

    # Serving ----------------------------------------------------------------------------------------------------------

    def serving(self) -> ServingState:
        """The serving state now."""
        records = self._serving.snapshot().records
        return ServingState.model_validate_json(records[-1]["state"]) if records else ServingState()

    def serving_history(self) -> list[ServingState]:
        """Every serving state there has been, oldest first."""
        return self._serving_history_at(None)

    def serving_periods(self) -> list[tuple[str, float, float | None]]:
        """Who served from when to when (seconds since the epoch), oldest first; the last one has no end."""
        periods: list[tuple[str, float, float | None]] = []
        for row in self._serving.snapshot().records:
            champion = ServingState.model_validate_json(row["state"]).champion
            if champion is None or (periods and periods[-1][0] == champion):
                continue
            if periods:
                periods[-1] = (*periods[-1][:2], row["at"])
            periods.append((champion, row["at"], None))
        return periods

    def retired(self) -> dict[str, str]:
        """Generations that the operator has taken out, with the reason."""
        return {event.generation: event.payload.reason for event in self.events(Retired) if event.payload.reason}

    def move_serving(self, expected: ServingState, **changes: Any) -> ServingState:
        """Compare-and-swap: apply `changes` if the serving state is still `expected`.

        Raises:
            ServingMovedError: it is not; nothing was changed.
        """
        version = self._serving.version()
        history = self._serving_history_at(version)
        found = history[-1] if history else ServingState()
        if found != expected:
            raise _moved(expected, found)
        state = expected.model_copy(update={**changes, "sequence": expected.sequence + 1})
        crash_point("before-serving-moves")
        row = {"sequence": state.sequence, "at": time.time(), "state": state.model_dump_json()}
        try:
            _append(self._serving, [row], expected_version=version)
        except TableConflictError as error:
            raise _moved(expected, self.serving()) from error
        crash_point("after-serving-moved")
        return state

    def change_serving(self, change: Callable[[ServingState], dict[str, Any] | None]) -> ServingState:
        """Apply a change to whatever the serving state is then, again and again while other moves come first.

        For bookkeeping and for moves that hold whatever else has moved: `change` looks at the state and gives the
        fields to set, or None to give way.

        Raises:
            ServingMovedError: others moved it first again and again.
        """
        for attempt in range(_ATTEMPTS):
            serving = self.serving()
            changes = change(serving)
            if changes is None:
                return serving
            try:
                return self.move_serving(serving, **changes)
            except ServingMovedError:
                if attempt == _ATTEMPTS - 1:
                    raise
                _back_off(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _serving_history_at(self, version: int | None) -> list[ServingState]:
        return [ServingState.model_validate_json(row["state"]) for row in self._serving.snapshot(version).records]


def _append(
    table: VersionedTable, rows: list[dict[str, Any]], *, unit: str | None = None, expected_version: int | None = None
) -> bool:
    written = table.append(
        pa.Table.from_pylist(rows, schema=table.schema), unit=unit, expected_version=expected_version
    )
    if expected_version is None:
        table.compact()
    return written


def _append_in_order(table: VersionedTable, rows: list[dict[str, Any]], *, unit: str | None = None) -> bool:
    """Append rows numbered after every row that has committed: a commit that comes between is seen, and tried again."""
    for attempt in range(_ATTEMPTS):
        version = table.version()
        # The version that this commit will be, or one before it if a compaction comes between: rising either way.
        numbered = [{**row, "sequence": version + 1} for row in rows]
        try:
            written = _append(table, numbered, unit=unit, expected_version=version)
        except TableConflictError:
            if attempt == _ATTEMPTS - 1:
                raise
            _back_off(attempt)
            continue
        table.compact()
        return written
    raise AssertionError("the last attempt returns or raises")


def _back_off(attempt: int) -> None:
    time.sleep(random.uniform(0, _BACK_OFF_S * min(attempt + 1, 10)))


def _moved(expected: ServingState, found: ServingState) -> ServingMovedError:
    return ServingMovedError(
        f"moving the serving state refused: expected move {expected.sequence}, found {found.sequence} "
        f"(champion {found.champion}; another update finished first); run 'graceful update' again"
    )
