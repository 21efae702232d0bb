"""Publishes an evaluation: the report beside it, the same as JSON, and artifacts where there is a flow UI.

Idempotent: it is called as soon as a decision is recorded, and once more when everything is done. Artifact keys are
stable (`<pipeline>-decision`, ...), so that the UI shows their history from update to update.
"""

import base64
from collections.abc import Sequence
from typing import Any

from graceful.evaluation.captions import matrix_markdown
from graceful.evaluation.headline import decision_markdown, headline
from graceful.evaluation.matrix import CompatibilityMatrix
from graceful.evaluation.report import Section, decision_pngs, matrix_png, render_report, report_document
from graceful.evaluation.ways import lived_states
from graceful.files import exists, is_remote, join, read_json, write_bytes, write_json
from graceful.flows.runtime.progress import Artifact, Progress
from graceful.flows.settings.config import ReportConfig
from graceful.flows.store.evaluations import FLIPS_FILE, Evaluation, read_evaluation, read_flips
from graceful.flows.store.events import Decided
from graceful.flows.store.registry import Registry
from graceful.flows.store.reports import REPORT_FILE, REPORT_JSON, report_address
from graceful.flows.store.variants import judged
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.consumer_sections import consumer_sections
from graceful.flows.update.diagnosis import diagnosis, flips_against_owners, lineage_rows, matrices
from graceful.flows.update.explorer import explore
from graceful.flows.update.labelling import write_label_list
from graceful.flows.update.learning import learning_sections

_BESIDE = (REPORT_JSON, FLIPS_FILE, "decision.json", "evidence.json", "policy.json", "outcomes.parquet")

_AGAINST = (
    "The decision compares with what is served now. Here is what the worst state loses of the answers that each "
    "generation which still owns rows gave on a gallery of its own."
)


def publish(
    workspace: Workspace,
    decided: Decided,
    evaluation: Evaluation,
    *,
    shows: ReportConfig = ReportConfig(),
    name: str = "graceful",
    progress: Progress | None = None,
) -> str:
    """Write report.html and report.json into the evaluation's folder; returns the location of the page.

    `shows` says how many lost searches are shown, and whether with pictures. With `progress` the artifacts of the
    pipeline of this name are shown as well.
    """
    registry = workspace.registry
    evidence, policy = evaluation.evidence, evaluation.policy
    matrix, nfr = matrices(registry, evaluation.outcomes, evidence.candidate, policy.k, policy.metric)
    location = workspace.evaluation_uri(decided.evaluation)
    worst = lived_states(evidence, evaluation.decision, policy).worst
    explorer = None if worst is None else explore(read_flips(location), worst.state, shows)
    asked = (evidence, evaluation.decision, policy)
    against = flips_against_owners(evaluation)
    document = report_document(*asked, evaluation.outcomes, explorer)
    page = render_report(
        *asked,
        matrix=matrix,
        nfr=nfr,
        outcomes=evaluation.outcomes,
        lineage=lineage_rows(registry),
        explorer=explorer,
        files=[file for file in _BESIDE if file == REPORT_JSON or exists(join(location, file))],
        sections=consumer_sections(evidence),
        appendix=[
            *learning_sections(workspace, evidence.candidate),
            *_history(workspace, decided, document),
            *_variants(registry, matrix.generations),
            Section("What the lineage has become", rows=diagnosis(registry, evaluation, matrix)),
            *([Section("Against what older generations answered", _AGAINST, rows=against)] if against else []),
        ],
    )
    report = join(location, REPORT_FILE)
    write_json(join(location, REPORT_JSON), document)
    write_bytes(report, page.encode())
    if evaluation.decision.outcome == "INCONCLUSIVE" and evaluation.outcomes.log is not None:
        write_label_list(workspace, decided.evaluation, evaluation)
    if progress is not None:
        link = report_address(shows.url, decided.evaluation) or (report if is_remote(report) else f"file://{report}")
        progress.show(lambda: _artifacts(name, evaluation, matrix, link))
    return report


def publish_newest(
    workspace: Workspace, generation: str, shows: ReportConfig, name: str, progress: Progress
) -> str | None:
    """Publish the newest decision about a generation once more, with what has come since; None where there is none."""
    decided = [event.payload for event in workspace.registry.events(Decided) if event.generation == generation]
    if not decided:
        return None
    evaluation = read_evaluation(workspace.evaluation_uri(decided[-1].evaluation))
    return publish(workspace, decided[-1], evaluation, shows=shows, name=name, progress=progress)


def question(evaluation: Evaluation, said: str) -> str:
    """What a person is asked who is to accept a decision: the evidence in plain words, and how to answer (Markdown)."""
    asked = (evaluation.evidence, evaluation.decision, evaluation.policy, evaluation.outcomes)
    candidate = evaluation.decision.candidate
    lines = [
        f"**AWAITING APPROVAL**: it {said}, and is held then. Nothing has been moved yet.",
        "",
        f"Accept: `graceful accept {candidate} --reason '...'`  ",
        f"Reject: `graceful reject {candidate} --reason '...'`",
        "",
        decision_markdown(headline(*asked), evaluation.decision, evaluation.evidence),
    ]
    return "\n".join(lines)


def _history(workspace: Workspace, decided: Decided, document: dict[str, Any]) -> list[Section]:
    """What was decided up to this one, update by update, from the reports that lie beside the evaluations."""
    rows = []
    for event in workspace.registry.events(Decided):
        this = event.payload.evaluation == decided.evaluation
        beside = join(workspace.evaluation_uri(event.payload.evaluation), REPORT_JSON)
        known = document if this else read_json(beside) if exists(beside) else None
        if known is not None:
            worst = next(iter(known["per_10000_searches"]), None)
            last = known["per_10000_searches"][-1] if worst else None
            rows.append(
                {
                    "candidate": event.generation,
                    "outcome": known["outcome"],
                    "served then": "" if last is None else f"{100 * last['baseline']:.1f} %",
                    "would be": "" if last is None else f"{100 * last['value']:.1f} %",
                    "lost of 10,000, at worst": "" if worst is None else f"{worst['lost']:,}",
                    "won of 10,000, in the end": "" if last is None else f"{last['won']:,}",
                }
            )
        if this:
            break
    text = "One row for every decision about this gallery so far; the evaluation sets may differ from row to row."
    return [Section("Update by update", text, rows=rows)] if len(rows) > 1 else []


def _variants(registry: Registry, generations: Sequence[str]) -> list[Section]:
    """A row of the compatibility matrix for every variant: its queries on the vectors of each generation."""
    rows = [
        {
            "queries": variant,
            **{gallery: _share(verdict.row.get(gallery)) for gallery in generations},
            "its own": _share(verdict.row.get(variant)),
            "may read": ", ".join(verdict.readable) or "nothing",
            "judged": verdict.reason,
        }
        for variant, verdict in judged(registry).items()
        if verdict.of in generations
    ]
    text = "Encoders that only query. A row as in the matrix: its queries on the vectors of each generation."
    return [Section("Variants", text, rows=rows)] if rows else []


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _artifacts(name: str, evaluation: Evaluation, matrix: CompatibilityMatrix, link: str) -> list[Artifact]:
    asked = (evaluation.evidence, evaluation.decision, evaluation.policy, evaluation.outcomes)
    figures = "\n\n".join(f"{title}\n\n{_picture(title, one)}" for title, one in decision_pngs(*asked, dpi=90).items())
    text = decision_markdown(headline(*asked), evaluation.decision, evaluation.evidence)
    return [
        Artifact(
            key=f"{name}-compatibility-matrix",
            description="Queries by the row's generation on the gallery of the column's",
            markdown=f"{matrix_markdown(matrix)}\n\n{_picture('matrix', matrix_png(matrix, dpi=90))}",
        ),
        Artifact(
            key=f"{name}-decision",
            description=evaluation.decision.outcome,
            markdown=f"{text}\n\n{figures}",
        ),
        Artifact(
            key=f"{name}-report",
            description="The whole report, one offline page",
            link=link,
        ),
    ]


def _picture(label: str, png: bytes) -> str:
    return f"![{label}](data:image/png;base64,{base64.b64encode(png).decode()})"
