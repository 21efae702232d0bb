"""Writes and reads evaluations: per-query outcomes in Parquet, evidence, policy and decision in JSON.

An evaluation is complete when its decision is there; it is written last. Everything else can be computed again from
the outcomes, and `recompute` does.
"""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from graceful.errors import GracefulError, UnknownFormatError
from graceful.evaluation.changed import log_columns, log_from_columns
from graceful.evaluation.consumers import Clusterings, Consumed, ScoreSample
from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import Evidence, Question
from graceful.evaluation.gathering import gather_evidence, unmeasured_wave
from graceful.evaluation.outcomes import Outcomes, from_columns, to_columns
from graceful.evaluation.policy import RolloutPolicy
from graceful.files import exists, join, read_json, resolve, write_json

FORMAT_VERSION = 1
LOG_FILE, FLIPS_FILE = "log.parquet", "flips.parquet"
_SCORES = "score/"  # and the pair of generations

M = TypeVar("M", bound=BaseModel)


class EvaluationMissingError(GracefulError, FileNotFoundError):
    """There is no complete evaluation at this location."""


class NotMeasuredError(GracefulError, ValueError):
    """Another policy decides another wave 0, whose states nobody measured."""


FLIPS = pa.schema(
    [
        ("query", pa.string()), ("identity", pa.string()), ("state", pa.string()), ("rank_before", pa.int32()),
        ("rank_after", pa.int32()), ("right_item", pa.string()), ("right_owner", pa.string()),
        ("wrong_item", pa.string()), ("wrong_identity", pa.string()), ("wrong_owner", pa.string()),
        ("margin", pa.float32()), ("cause", pa.string()),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)  # fmt: skip
"""One negative flip a row: a search that is right now and wrong in a state. `right_item` is the best right answer now,
`wrong_item` the first wrong one then, each with the generation that owns its vector; `margin` is by how much the wrong
one scores higher then; `rank_after` is null where no right answer can be read; `cause` as in flows.update.flips."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as it is stored. `flips` only where it was just made: `read_flips` reads them."""

    outcomes: Outcomes
    policy: RolloutPolicy
    question: Question
    evidence: Evidence
    decision: Decision
    consumed: Consumed = field(default_factory=Consumed)
    flips: pa.Table | None = None


def judge(
    outcomes: Outcomes, policy: RolloutPolicy, question: Question, consumed: Consumed | None = None
) -> Evaluation:
    """Gather the evidence and decide: pure, so that stored outcomes give the stored decision again."""
    consumed = consumed or Consumed()
    evidence = gather_evidence(outcomes, policy, question, consumed)
    return Evaluation(outcomes, policy, question, evidence, decide(evidence, policy), consumed)


def write_evaluation(location: str, evaluation: Evaluation) -> None:
    """Store an evaluation, the decision last."""
    filesystem, path = resolve(location)
    filesystem.create_dir(path, recursive=True)
    outcomes = {name: pa.array(values) for name, values in to_columns(evaluation.outcomes).items()}
    _write_table(location, "outcomes.parquet", pa.table(outcomes))
    if evaluation.consumed.clusterings is not None:
        _write_clusterings(location, evaluation.consumed.clusterings)
    if (log := evaluation.outcomes.log) is not None:
        columns = {name: pa.array(values) for name, values in log_columns(log).items()}
        _write_table(location, LOG_FILE, pa.table(columns))
    if evaluation.consumed.scores is not None:
        _write_scores(location, evaluation.consumed.scores)
    if evaluation.flips is not None:
        pq.write_table(evaluation.flips, f"{path}/{FLIPS_FILE}", filesystem=filesystem)
    write_json(join(location, "question.json"), evaluation.question.model_dump(mode="json"))
    write_json(join(location, "policy.json"), evaluation.policy.model_dump(mode="json"))
    write_json(join(location, "evidence.json"), evaluation.evidence.model_dump(mode="json"))
    write_json(join(location, "decision.json"), evaluation.decision.model_dump(mode="json"))


def read_outcomes(location: str) -> Outcomes:
    """Read the per-query outcomes of an evaluation."""
    outcomes = from_columns(_read_columns(location, "outcomes.parquet"))
    if not exists(join(location, LOG_FILE)):
        return outcomes
    return replace(outcomes, log=log_from_columns(_read_columns(location, LOG_FILE)))


def _read_columns(location: str, name: str) -> dict[str, NDArray[Any]]:
    table = _read_table(location, name)
    columns = {column: table[column].to_numpy(zero_copy_only=False) for column in table.schema.names}
    return {column: values.astype(np.str_) if values.dtype == object else values for column, values in columns.items()}


def _read_table(location: str, name: str) -> pa.Table:
    filesystem, path = resolve(join(location, name))
    try:
        table = pq.read_table(path, filesystem=filesystem)
    except FileNotFoundError:
        raise EvaluationMissingError(
            f"reading an evaluation: expected {name}, found none (in {location}); name a folder below evaluations/ of "
            "a workspace"
        ) from None
    found = (table.schema.metadata or {}).get(b"format_version", b"none").decode()
    if found != str(FORMAT_VERSION):
        raise UnknownFormatError(
            f"reading {name}: expected format version {FORMAT_VERSION}, found {found} (in {location})"
        )
    return table


def read_flips(location: str) -> pa.Table:
    """Read every negative flip of an evaluation, as `FLIPS`; none where it was made before they were written down."""
    filesystem, path = resolve(join(location, FLIPS_FILE))
    try:
        return pq.read_table(path, filesystem=filesystem).select(FLIPS.names).cast(FLIPS)
    except FileNotFoundError:
        return FLIPS.empty_table()


def worst_first(flips: pa.Table) -> pa.Table:
    """Order flips: not found at all, then by rank, then by the margin of the wrong answer, then by name."""
    rank = pc.fill_null(flips["rank_after"], 2**31 - 1)
    margin = pc.fill_null(flips["margin"], float("inf"))
    keys = pa.table({"rank": rank, "margin": margin, "query": flips["query"], "state": flips["state"]})
    order = [("rank", "descending"), ("margin", "descending"), ("query", "ascending"), ("state", "ascending")]
    return flips.take(pc.sort_indices(keys, sort_keys=order))


def read_evaluation(location: str) -> Evaluation:
    """Read an evaluation as it was stored. Raises EvaluationMissingError."""
    outcomes = read_outcomes(location)
    if not exists(join(location, "decision.json")):
        raise EvaluationMissingError(f"reading an evaluation: expected decision.json, found none (in {location})")
    return Evaluation(
        outcomes,
        _read_record(location, "policy.json", RolloutPolicy),
        _read_record(location, "question.json", Question),
        _read_record(location, "evidence.json", Evidence),
        _read_record(location, "decision.json", Decision),
        read_consumed(location),
    )


def read_consumed(location: str) -> Consumed:
    """Read what was measured for consumers; empty where nothing was."""
    clusterings = scores = None
    if exists(join(location, "clusterings.parquet")):
        columns = _texts(_read_table(location, "clusterings.parquet"))
        clusterings = Clusterings(columns.pop("item_id"), columns.pop("identity"), columns)
    if exists(join(location, "scores.parquet")):
        table, owners = _read_table(location, "scores.parquet"), _read_table(location, "score_owners.parquet")
        pairs = [name for name in table.schema.names if name.startswith(_SCORES)]
        scores = ScoreSample(
            **{name: table[name].to_numpy() for name in ("genuine", "query_groups", "row_groups", "rows")},
            scores={_pair(name): table[name].to_numpy() for name in pairs},
            owners=_texts(owners),
        )
    return Consumed(clusterings, scores)


def _pair(column: str) -> tuple[str, str]:
    query, _, gallery = column.removeprefix(_SCORES).partition("/")
    return query, gallery


def _texts(table: pa.Table) -> dict[str, NDArray[np.str_]]:
    return {name: np.array(table[name].to_pylist(), np.str_) for name in table.schema.names}


def _write_scores(location: str, sample: ScoreSample) -> None:
    """One row per pair, one column per pair of generations; and the owner of every row in each mixed state."""
    columns = {name: getattr(sample, name) for name in ("genuine", "query_groups", "row_groups", "rows")}
    columns |= {f"{_SCORES}{query}/{gallery}": values for (query, gallery), values in sample.scores.items()}
    owners = {state: pa.array(values.tolist()) for state, values in sample.owners.items()}
    _write_table(location, "score_owners.parquet", pa.table(owners))
    _write_table(location, "scores.parquet", pa.table({name: pa.array(values) for name, values in columns.items()}))


def _write_clusterings(location: str, clusterings: Clusterings) -> None:
    """One row per item, one column per state."""
    columns = {"item_id": clusterings.item_ids, "identity": clusterings.identities, **clusterings.labels}
    _write_table(location, "clusterings.parquet", pa.table({n: pa.array(v.tolist()) for n, v in columns.items()}))


def _write_table(location: str, name: str, table: pa.Table) -> None:
    filesystem, path = resolve(join(location, name))
    table = table.replace_schema_metadata({"format_version": str(FORMAT_VERSION)})
    pq.write_table(table, path, filesystem=filesystem)


def recompute(location: str, policy: RolloutPolicy | None = None) -> tuple[Evaluation, Evaluation]:
    """Read an evaluation and judge its outcomes again (under another policy if one is given): (stored, recomputed).

    Raises: NotMeasuredError, where that policy certifies other owners, and what would then be served was not measured.
    """
    stored = read_evaluation(location)
    question, policy = stored.question, policy or stored.policy
    if question.wave_zero is None and stored.evidence.states:
        question = question.model_copy(update={"wave_zero": stored.evidence.wave_zero_generations})
    unmeasured = unmeasured_wave(stored.outcomes, policy, question)
    if unmeasured is not None:
        before, after = (", ".join(names) or "nothing" for names in (question.wave_zero or (), unmeasured))
        raise NotMeasuredError(
            f"judging again: expected the states in which {after} is re-embedded before the move, as this policy would "
            f"have it, found those after {before} (in {location}); write the policy into the workspace's configuration "
            "and run 'graceful update', which measures them"
        )
    return stored, judge(stored.outcomes, policy, question, stored.consumed)


def _read_record(location: str, name: str, model: type[M]) -> M:
    """Read one JSON record strictly. Raises UnknownFormatError, naming file, key and place."""
    place = join(location, name)
    try:
        return model.model_validate(read_json(place))
    except FileNotFoundError:
        raise EvaluationMissingError(f"reading an evaluation: expected {name}, found none (in {location})") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the document"
        found = f"{key}: {problem['msg'].lower()}"
    except ValueError as error:
        found = f"no JSON ({error})"
    raise UnknownFormatError(
        f"reading an evaluation: expected the record that this program writes, found {found} (in {place}); restore the "
        "file, or use the program version that wrote it"
    )
