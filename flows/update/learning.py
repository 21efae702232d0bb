"""What a training shows while it runs and afterwards: a line per epoch, and its learning curve."""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

from graceful.evaluation.captions import duration
from graceful.evaluation.learning import DEV, learning_caption, learning_figure, term_names
from graceful.evaluation.plots import png, svg
from graceful.evaluation.report import Section
from graceful.files import join
from graceful.flows.runtime.progress import Artifact, Progress
from graceful.flows.store.events import Trained
from graceful.flows.store.workspace import Workspace
from graceful.training.progress import TrailReporter

_SECONDS_BETWEEN_CURVES = 60.0
TITLE = "How the candidate learned"
CHOSEN = "What was chosen on the dev part"


class LearningCurve:
    """The learning curve of a training that runs, as an artifact of the flow UI: now and then, and at the end."""

    def __init__(self, progress: Progress, key: str, role: str) -> None:
        self._progress, self._role = progress, role
        self._key = key if role == "candidate" else f"{key}-{role}".replace("_", "-").lower()
        self._lines: list[dict[str, Any]] = []
        self._num_shown = 0
        self._shown_at = time.monotonic()

    def add(self, line: dict[str, Any]) -> None:
        """Take an epoch's line."""
        self._lines.append(line)
        if time.monotonic() - self._shown_at > _SECONDS_BETWEEN_CURVES:
            self.show()

    def show(self) -> None:
        """Show the curve, if there is anything that has not been shown."""
        if len(self._lines) > self._num_shown:
            self._num_shown, self._shown_at = len(self._lines), time.monotonic()
            self._progress.show(self._artifact)

    def _artifact(self) -> list[Artifact]:
        picture = base64.b64encode(png(learning_figure(self._lines), 90)).decode()
        text = f"{learning_caption(self._lines)}\n\n![learning curve](data:image/png;base64,{picture})"
        return [Artifact(key=self._key, description=f"Loss of the {self._role} by epoch", markdown=text)]


def epoch_text(line: Mapping[str, Any]) -> str:
    """What an epoch came to, or has come to so far: losses, speed, time left, and a change of the workers."""
    within = f", step {line['step']:,} of {line['steps']:,}" if line["step"] < line["steps"] else ""
    terms = ", ".join(f"{name} {line[name]:.3f}" for name in term_names([line]))
    parts = [
        f"epoch {line['epoch'] + 1}{within}",
        f"loss {line['loss']:.3f}" + (f" ({terms})" if terms else ""),
        f"{line['images_per_s']:,.0f} images/s",
    ]
    if DEV in line:
        parts.insert(2, f"recall@1 on dev {100 * line[DEV]:.1f} %")
    if line["eta_s"]:
        parts.append(f"about {duration(line['eta_s'] / 3600)} left")
    if "workers_before" in line:
        parts.append(f"{line['workers']} workers instead of {line['workers_before']}")
    return ", ".join(parts)


def learning_sections(workspace: Workspace, generation: str) -> list[Section]:
    """The sections of a report about the training of a generation; none for one that was not trained here."""
    trained = [event.payload.summary for event in workspace.registry.events(Trained) if event.generation == generation]
    chosen = [summary["interpolation_on_dev"] for summary in trained if "interpolation_on_dev" in summary][:1]
    return [*_curve(workspace, trained), *(_chosen_section(told) for told in chosen)]


def _chosen_section(told: Mapping[str, Any]) -> Section:
    """What was tried on the dev part, and what was taken."""
    limit = told["max_flips"]
    limited = "none" if limit is None else f"{100 * limit:.2f} %"
    text = (
        f"The share of the champion's weights in the candidate's is {100 * told['chosen']:.0f} %: {told['rule']} "
        f"(limit: {limited}). The dev part is neither trained on nor reported "
        "elsewhere; flips are the larger of those with everything re-embedded and with nothing re-embedded."
    )
    rows = [
        {
            "share": f"{100 * option['value']:.0f} %",
            "self-test on dev": f"{100 * option['self_test']:.2f} %",
            "flips on dev": f"{100 * option['flips']:.2f} %",
            "": "taken" if option["value"] == told["chosen"] else "",
        }
        for option in told["options"]
    ]
    return Section(CHOSEN, text, rows=rows)


def _curve(workspace: Workspace, trained: Sequence[Mapping[str, Any]]) -> list[Section]:
    names = [str(summary["name"]) for summary in trained if "name" in summary]
    lines = TrailReporter(join(workspace.root, "runs"), names[0]).metrics() if names else []
    if not lines:
        return []
    return [Section(TITLE, learning_caption(lines), figure=svg(learning_figure(lines), "Learning curve"))]
