"""What can happen to a lineage: one small model per kind of event, told apart by `kind`.

The lineage is the append-only record of generations and of what was decided about them, and by whom. A record of an
unknown kind, or with fields that its kind does not have, is refused by name and place.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from graceful.errors import UnknownFormatError
from graceful.evaluation.spending import Look


class _Happened(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UpdateStarted(_Happened):
    """The inputs of an update, frozen: what a resumed update reads instead of looking again."""

    kind: Literal["update_started"] = "update_started"
    update_key: str
    material_key: str
    training_key: str
    ordinal: int
    champion: str | None
    predecessors: tuple[str, ...]
    weights: tuple[float, ...] = ()
    generations: tuple[str, ...]
    num_training_images: int
    num_classes: int
    num_unreadable: int
    num_dropped: int = 0
    num_dev_images: int = 0
    num_forgotten: int = 0
    evaluation_set: str
    adopted: str | None = None


class Trained(_Happened):
    """The candidate of an update is there: trained for it, found trained before, or adopted."""

    kind: Literal["trained"] = "trained"
    training_key: str = ""
    summary: dict[str, Any] = {}


class Adopted(_Happened):
    """An encoder from elsewhere is a generation."""

    kind: Literal["adopted"] = "adopted"
    name: str
    factory: str


class Withdrawn(_Happened):
    """Images may not be trained on any more, by their content hashes."""

    kind: Literal["withdrawn"] = "withdrawn"
    content_sha256: tuple[str, ...]
    reason: str
    by: str = ""


class Looked(_Happened):
    """A candidate is judged on an evaluation set, and uses a part of its error level. `outcomes`: their digest."""

    kind: Literal["looked"] = "looked"
    outcomes: str
    look: Look


class Decided(_Happened):
    """A decision was made and recorded, before it is acted on."""

    kind: Literal["decided"] = "decided"
    evaluation: str
    outcome: str
    summary: str
    paragon: str | None = None


class Promoted(_Happened):
    """The serving state moved to a generation."""

    kind: Literal["promoted"] = "promoted"


class Held(_Happened):
    """The decision was to hold."""

    kind: Literal["held"] = "held"


class Pending(_Happened):
    """The decision was inconclusive: the candidate waits for evidence, or for the operator's word."""

    kind: Literal["pending"] = "pending"


class Overridden(_Happened):
    """The operator ordered what was not decided."""

    kind: Literal["overridden"] = "overridden"
    decided: str
    ordered: str
    reason: str
    by: str = ""


class Rejected(_Happened):
    """The operator turned a candidate down."""

    kind: Literal["rejected"] = "rejected"
    reason: str
    by: str = ""


class ApprovalAsked(_Happened):
    """A decision waits for a person, so many hours at most; `champion` served when it was made."""

    kind: Literal["approval_asked"] = "approval_asked"
    evaluation: str
    outcome: str
    champion: str | None
    hours: float


class ApprovalAnswered(_Happened):
    """A person accepted or rejected a decision, or nobody did in time."""

    kind: Literal["approval_answered"] = "approval_answered"
    evaluation: str
    answer: Literal["accepted", "rejected", "expired"]
    reason: str = ""
    by: str = ""


class RolledBack(_Happened):
    """The serving state went back."""

    kind: Literal["rolled_back"] = "rolled_back"
    to: str
    reason: str
    by: str = ""


class Forwarded(_Happened):
    """The serving state went forward again to a generation that had served before."""

    kind: Literal["forwarded"] = "forwarded"
    reason: str
    by: str = ""


class CanaryStarted(_Happened):
    """A generation is watched beside `reference`: it answers a share of the queries, or only beside (`shadow`).

    `readable`: what it may read for that time without certificates; empty where it has its own. `is_champion`: it
    serves already, and the reference is what it took the place of. `measured`: the share of changed first answers that
    its evaluation found. `max_nfr`: share of the labelled queries that may flip negatively; None limits nothing.
    """

    kind: Literal["canary_started"] = "canary_started"
    number: int
    reference: str
    readable: tuple[str, ...] = ()
    is_champion: bool = False
    shadow: bool
    share: float
    hours: float
    max_changed: float
    max_failed: float
    max_answer_s: float
    max_nfr: float | None = None
    alpha: float
    measured: float | None = None
    by: str = ""


class CanaryEnded(_Happened):
    """A generation is watched no longer, why, and what was seen. `move`: what became of the serving state, in words."""

    kind: Literal["canary_ended"] = "canary_ended"
    number: int
    outcome: Literal["changed", "failing", "flipping", "time", "stopped", "moved"]
    reason: str
    move: str = ""
    compared: int
    changed: int
    attempted: int
    failed: int
    labelled: int = 0
    negative_flips: int = 0
    by: str = ""


class CertificateRevoked(_Happened):
    """The operator revoked a certificate: the generation may be scored against those rows no longer."""

    kind: Literal["certificate_revoked"] = "certificate_revoked"
    gallery_generation: str
    reason: str
    by: str = ""


class ThresholdsSet(_Happened):
    """Thresholds that a decision serves: (consumer, query generation, generation of the hit's vector, threshold)."""

    kind: Literal["thresholds_set"] = "thresholds_set"
    thresholds: tuple[tuple[str, str, str, float], ...]


class PlanCompleted(_Happened):
    """A re-index reached its end."""

    kind: Literal["plan_completed"] = "plan_completed"
    plan: str


class PreviousReleased(_Happened):
    """The probation of the previous generation ended."""

    kind: Literal["previous_released"] = "previous_released"


class Retired(_Happened):
    """A generation takes no further part: it owns no readable row, or the operator said so (`reason`)."""

    kind: Literal["retired"] = "retired"
    reason: str = ""
    by: str = ""


class VariantTrained(_Happened):
    """A variant of a generation is there: another encoder, which only queries.

    `factory`: what a text tower comes from, which is not trained here; None of a network that was.
    """

    kind: Literal["variant_trained"] = "variant_trained"
    name: str
    of: str
    training_key: str
    summary: dict[str, Any] = {}
    factory: str | None = None


class VariantJudged(_Happened):
    """A variant was judged. `row`: its metric on a gallery of each generation's vectors, its own included where it has
    one: a text tower (`takes` "text") has none, and was judged by labelled texts.
    """

    kind: Literal["variant_judged"] = "variant_judged"
    name: str
    of: str
    approved: bool
    reason: str
    evaluation_set: str
    readable: tuple[str, ...] = ()
    row: dict[str, float] = {}
    of_self_test: float | None = None
    takes: Literal["image", "text"] = "image"


class UpdateCompleted(_Happened):
    """An update has nothing left to do. `compute_s`: seconds that its stages say they computed."""

    kind: Literal["update_completed"] = "update_completed"
    compute_s: float


Happened = Annotated[
    UpdateStarted | Trained | Adopted | Withdrawn | Looked | Decided | Promoted | Held | Pending | Overridden | Rejected
    | ApprovalAsked | ApprovalAnswered | RolledBack | Forwarded | CanaryStarted | CanaryEnded | CertificateRevoked
    | ThresholdsSet | PlanCompleted | PreviousReleased | Retired | VariantTrained | VariantJudged | UpdateCompleted,
    Field(discriminator="kind"),
]  # fmt: skip
KINDS = tuple(model.model_fields["kind"].default for model in get_args(get_args(Happened)[0]))
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Happened)

H = TypeVar("H", bound=_Happened)


@dataclass(frozen=True)
class Event(Generic[H]):
    """One thing that happened. `sequence` rises with every commit of the lineage; `at` is what a clock said."""

    event_id: str
    update_key: str
    generation: str
    at: float
    payload: H
    sequence: int = 0

    @property
    def kind(self) -> str:
        """Kind of what happened."""
        return str(getattr(self.payload, "kind"))  # noqa: B009


def to_text(happened: _Happened) -> str:
    """JSON of what happened; its kind stands in a column of its own."""
    return happened.model_dump_json(exclude={"kind"})


def from_row(row: dict[str, Any], location: str) -> Event[Any]:
    """Read one row of the lineage table. Raises UnknownFormatError, naming kind and place."""
    try:
        payload = _ADAPTER.validate_python({**json.loads(row["payload"]), "kind": row["kind"]})
    except (ValidationError, ValueError) as error:
        found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UnknownFormatError(
            f"reading the lineage: expected one of {', '.join(KINDS)} in its known form, found {row['kind']!r} "
            f"({found}; event {row['event_id']} in {location}); use the program version that wrote it"
        ) from None
    return Event(row["event_id"], row["update_key"], row["generation"], row["at"], payload, row["sequence"])
