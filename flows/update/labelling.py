"""What to label next, written beside an evaluation, and labels taken back from the file that was written.

The list holds exactly the changed queries of the log that stand between what is settled and what a decision needs, in
the log's order: a query without a label stops the beginning that is judged, so they are labelled from the top.
"""

import base64
import csv
import io
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from graceful.errors import GracefulError, UsageError
from graceful.evaluation.changed import (
    RIGHT,
    LogAnswers,
    Pair,
    beginning,
    changed,
    in_any,
    labels_needed,
    next_to_label,
    unsettled,
)
from graceful.evaluation.label_page import LABEL_COLUMNS, ToLabel, label_csv, label_page
from graceful.evaluation.outcomes import SERVED, live_state
from graceful.files import exists, join, write_bytes
from graceful.flows.store.evaluation_set import evaluation_set_uri, sources_in_set
from graceful.flows.store.evaluations import Evaluation, read_evaluation
from graceful.flows.store.events import Decided, UpdateStarted
from graceful.flows.store.labels import PAGE_FILE, VERDICT_OF, AnswerLabel, AnswerLabels, add_labels, read_labels
from graceful.flows.store.workspace import Workspace
from graceful.training.images import UnreadableImageError, read_payloads, thumbnail

CSV_FILE = "label-next.csv"
MAX_ROWS = 200


class NoLogError(GracefulError):
    """There is no query log whose changed answers could be labelled."""


class LabelFileError(GracefulError, ValueError):
    """A file of labels that cannot be taken."""


@dataclass(frozen=True)
class LogStanding:
    """How far the labels of a log go, for what one decision asks.

    Of what the option asks that could be decided next: `num_settled` queries from the top count for it, and
    `num_changed` of the whole log change in one of its states.
    """

    evaluation: str
    num_queries: int
    num_changed: int
    num_labelled: int
    num_settled: int
    changed_at_most: float
    num_wanted: int


def pairs_of(evaluation: Evaluation) -> list[Pair]:
    """The pairs of states whose difference the decision reads and that the log was asked about."""
    log, question = evaluation.outcomes.log, evaluation.question
    states = (*evaluation.evidence.states, *evaluation.evidence.hoped_states)
    pairs = [(SERVED, state.state) for state in states]
    pairs += [
        (live_state(str(question.champion), owner), live_state(question.candidate, owner))
        for owner in question.live_owners
    ]
    return [pair for pair in dict.fromkeys(pairs) if log is not None and log.has(pair)]


def wanted_pairs(evaluation: Evaluation) -> list[Pair]:
    """Those of them that the guards ask about which left a decision open; all of them where none did.

    They belong to the cheapest option that could still pass, which is served by fewer states than all others together.
    """
    decision, pairs = evaluation.decision, pairs_of(evaluation)
    if decision.outcome != "INCONCLUSIVE":
        return pairs
    open_guards = decision.reasons[: decision.num_decisive]
    states = {reason.state for reason in open_guards}
    certificates = any(reason.guard == "wave zero" for reason in open_guards)
    wanted = [pair for pair in pairs if pair[1] in states or (certificates and pair[0] != SERVED)]
    return wanted or pairs


def with_labels(log: LogAnswers, labels: AnswerLabels) -> LogAnswers:
    """The same answers with what is known about them by now."""
    known = labels.identities
    verdicts = {
        state: np.array(
            [
                labels.verdict(query, answer, known)
                for query, answer in zip(log.query_ids.tolist(), shown.tolist(), strict=True)
            ],
            np.int8,
        )
        for state, shown in log.answers.items()
    }
    return replace(log, verdicts=verdicts)


def standing(workspace: Workspace, name: str, evaluation: Evaluation) -> LogStanding:
    """How far the labels that were given by now go. Raises NoLogError."""
    log, pairs = _log_of(workspace, name, evaluation)
    moved, waiting = in_any(log, pairs, changed), in_any(log, pairs, unsettled)
    settled = beginning(log, pairs)
    needed = evaluation.decision.queries_needed
    bounds = labels_needed(log, pairs, max(len(log), 1))
    return LogStanding(
        evaluation=name,
        num_queries=len(log),
        num_changed=int(moved.sum()),
        num_labelled=int((moved & ~waiting).sum()),
        num_settled=settled,
        changed_at_most=bounds.at_most / max(len(log), 1),
        num_wanted=len(log) if needed is None else min(len(log), settled + needed),
    )


def write_label_list(
    workspace: Workspace, name: str, evaluation: Evaluation, *, limit: int = MAX_ROWS, into: str | None = None
) -> list[ToLabel]:
    """Write what to label next as a CSV file and a page, by default beside the evaluation; returns the questions.

    Raises: NoLogError.
    """
    log, pairs = _log_of(workspace, name, evaluation)
    wanted = next_to_label(log, pairs, standing(workspace, name, evaluation).num_wanted)[:limit]
    sources = sources_in_set(evaluation_set_uri(workspace.root, _set_of(workspace, name)))
    questions = [_question(name, log, pairs, sources, *row) for row in wanted]
    folder = into or workspace.evaluation_uri(name)
    shown = list(dict.fromkeys(d for q in questions for d in (q.query, *q.before_items, *q.after_items)))
    page = label_page(
        questions,
        _pictures({digest: sources[digest] for digest in shown if digest in sources}),
        title=f"{len(questions)} answers to label",
        file_name=CSV_FILE,
    )
    write_bytes(join(folder, CSV_FILE), label_csv(questions).encode())
    write_bytes(join(folder, PAGE_FILE), page.encode())
    return questions


def read_label_file(workspace: Workspace, text: str, place: str) -> tuple[list[AnswerLabel], int]:
    """Labels of a CSV file, and how many of its rows have none yet.

    Raises: LabelFileError, naming row and remedy.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    needed = LABEL_COLUMNS[:5]
    missing = [name for name in needed if name not in (reader.fieldnames or [])]
    if missing:
        raise LabelFileError(
            f"taking labels: expected the columns {', '.join(needed)}, found none of the name {', '.join(missing)} (in "
            f"{place}); use the file that 'graceful evalset label --next' writes"
        )
    labels: list[AnswerLabel] = []
    asked: dict[str, set[tuple[str, str]]] = {}
    num_blank = 0
    for number, row in enumerate(reader, 2):
        word = (row["label"] or "").strip().lower()
        if not word:
            num_blank += 1
            continue
        if word not in VERDICT_OF:
            raise LabelFileError(
                f"taking labels: expected a label of {', '.join(VERDICT_OF)} or none, found {row['label']!r} (row "
                f"{number} of {place}); correct it, nothing was taken"
            )
        name = row["evaluation"] or ""
        if name not in asked:
            asked[name] = _asked_in(workspace, name, place)
        for answer, verdict in zip((row["before"], row["after"]), VERDICT_OF[word], strict=True):
            if (row["query"], answer) not in asked[name]:
                raise LabelFileError(
                    f"taking labels: expected a query and its two answers as evaluation {name} has them, found query "
                    f"{str(row['query'])[:12]!r} with answer {answer!r} (row {number} of {place}); only the column "
                    "label is to be filled in, nothing was taken"
                )
            if not answer and verdict == RIGHT:
                raise LabelFileError(
                    f"taking labels: expected no {word!r} where nothing is shown, found it (row {number} of {place}); "
                    "correct it, nothing was taken"
                )
            if answer:
                labels.append(AnswerLabel(row["query"], answer, verdict))
    return labels, num_blank


def take_labels(workspace: Workspace, text: str, place: str, *, correct: bool = False) -> dict[str, int]:
    """Take the labels of a CSV file into the workspace; the same file again changes nothing.

    Raises: LabelFileError, ContradictoryLabelsError. Nothing is taken then.
    """
    labels, num_blank = read_label_file(workspace, text, place)
    if not labels:
        raise LabelFileError(
            f"taking labels: expected a row with a label, found {num_blank} without (in {place}); fill in the column "
            "label, or save the file from the page"
        )
    new, corrected = add_labels(workspace.root, labels, correct=correct)
    return {"labels": len(labels), "new": new, "corrected": corrected, "rows_without_label": num_blank}


def newest_with_log(workspace: Workspace) -> tuple[str, Evaluation]:
    """The newest evaluation that asked a log. Raises NoLogError."""
    for event in reversed(workspace.registry.events(Decided)):
        name = event.payload.evaluation
        if exists(join(workspace.evaluation_uri(name), "log.parquet")):
            return name, read_evaluation(workspace.evaluation_uri(name))
    raise NoLogError(
        "looking for answers to label: expected an evaluation of a query log, found none; name pictures that people "
        "searched with in evaluation.log, or make a set with 'graceful evalset create', and run 'graceful update'"
    )


def _asked_in(workspace: Workspace, name: str, place: str) -> set[tuple[str, str]]:
    known = {event.payload.evaluation for event in workspace.registry.events(Decided)}
    if name not in known or not exists(join(workspace.evaluation_uri(name), "log.parquet")):
        raise LabelFileError(
            f"taking labels: expected the name of an evaluation of this workspace, found {name!r} (in {place}); use "
            "the file that 'graceful evalset label --next' writes here"
        )
    log = read_evaluation(workspace.evaluation_uri(name)).outcomes.log
    assert log is not None
    return {
        (query, answer)
        for shown in log.answers.values()
        for query, answer in zip(log.query_ids.tolist(), shown.tolist(), strict=True)
    }


def _log_of(workspace: Workspace, name: str, evaluation: Evaluation) -> tuple[LogAnswers, list[Pair]]:
    log, pairs = evaluation.outcomes.log, wanted_pairs(evaluation)
    if log is None or not pairs:
        raise NoLogError(
            f"looking for answers to label: expected an evaluation that compares answers to a query log, found {name}, "
            "which does not"
        )
    return with_labels(log, read_labels(workspace.root)), pairs


def _set_of(workspace: Workspace, name: str) -> str:
    keys = [e.update_key for e in workspace.registry.events(Decided) if e.payload.evaluation == name]
    started = [event.payload for key in keys for event in workspace.registry.events(UpdateStarted, key)]
    if not started:
        raise UsageError(f"looking for answers to label: expected the update of evaluation {name}, found none")
    return started[-1].evaluation_set


def _question(
    name: str, log: LogAnswers, pairs: list[Pair], sources: dict[str, str], row: int, before: str, after: str
) -> ToLabel:
    pair = next(p for p in pairs if (log.answers[p[0]][row], log.answers[p[1]][row]) == (before, after))
    items = [tuple(str(log.items[state][row]).split()) for state in pair]
    query = str(log.query_ids[row])
    return ToLabel(
        evaluation=name,
        query=query,
        before=before,
        after=after,
        query_source=sources.get(query, ""),
        before_items=items[0],
        after_items=items[1],
        before_source=" ".join(sources.get(item, "") for item in items[0]),
        after_source=" ".join(sources.get(item, "") for item in items[1]),
    )


def _pictures(sources: dict[str, str]) -> dict[str, str]:
    """Thumbnails as data URIs; without those that cannot be read any more."""
    failures: dict[int, str] = {}
    payloads = read_payloads(list(sources.values()), failures)
    found = {}
    for place, (digest, payload) in enumerate(zip(sources, payloads, strict=True)):
        if place not in failures:
            with suppress(UnreadableImageError):
                found[digest] = f"data:image/jpeg;base64,{base64.b64encode(thumbnail(payload)).decode()}"
    return found
