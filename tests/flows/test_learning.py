"""What a training shows: a line per epoch in words, its curve in the flow UI and in the report, and trackers."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from graceful.flows.runtime.progress import Artifact, SilentProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.update import learning, order
from graceful.flows.update.learning import LearningCurve, epoch_text

LINE = {
    "epoch": 2, "epochs": 8, "step": 40, "steps": 40, "loss": 0.4321, "task": 0.3, "ract": 0.1321, "seconds": 2.0,
    "images_per_s": 1234.5, "eta_s": 90.0, "workers": 2,
}  # fmt: skip


class Recorder(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[int, str]] = []
        self.artifacts: list[Artifact] = []

    def show(self, make: Callable[[], Sequence[Artifact]]) -> None:
        self.artifacts += make()

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda count, note="": self.notes.append((count, f"{label}: {note}"))


def test_an_epoch_in_words() -> None:
    assert epoch_text(LINE) == "epoch 3, loss 0.432 (task 0.300, ract 0.132), 1,234 images/s, about 1.5 min left"
    within = epoch_text({**LINE, "step": 7, "eta_s": 0.0, "workers_before": 3})
    assert within == (
        "epoch 3, step 7 of 40, loss 0.432 (task 0.300, ract 0.132), 1,234 images/s, 2 workers instead of 3"
    )


def test_the_curve_is_shown_now_and_then_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, now = Recorder(), [0.0]
    monkeypatch.setattr(learning.time, "monotonic", lambda: now[0])
    curve = LearningCurve(recorder, "faces-learning-curve", "from_scratch")
    curve.show()
    for epoch, seconds in enumerate((1.0, 61.0, 100.0)):
        now[0] = seconds
        curve.add({**LINE, "epoch": epoch})
    assert len(recorder.artifacts) == 1
    curve.show()
    curve.show()
    assert [shown.key for shown in recorder.artifacts] == ["faces-learning-curve-from-scratch"] * 2
    assert "data:image/png;base64," in recorder.artifacts[-1].markdown
    assert (
        "in 3 of 8 epochs; at the end task 0.3, ract 0.132; 1,234 images per second" in recorder.artifacts[-1].markdown
    )


def test_an_update_shows_its_curve_everywhere(bootstrapped: Path, tmp_path: Path) -> None:
    root = shutil.copytree(bootstrapped, tmp_path / "workspace")
    config = load_workspace_config(str(root), {"trackers.tensorboard": str(tmp_path / "boards")})
    recorder = Recorder()
    with open_session(str(root), config, recorder) as session:
        result = order.update(session)
    said = [note for count, note in recorder.notes if "training g002 (candidate)" in note and count]
    assert len(said) == 4  # two, and two for the mixture
    assert all(" (task " in note and "images/s" in note for note in said)
    (curve,) = [shown for shown in recorder.artifacts if shown.key == "tiny-learning-curve"]
    assert "in 4 of 4 epochs" in curve.markdown
    page = Path(result.report).read_text()
    assert learning.TITLE in page
    assert page.count('aria-label="Learning curve"') == 1
    (board,) = (tmp_path / "boards").iterdir()
    assert board.name.startswith("g002-candidate-")
    assert list(board.iterdir())


def test_a_tracker_changes_no_key(bootstrapped: Path) -> None:
    plain = load_workspace_config(str(bootstrapped))
    tracked = load_workspace_config(str(bootstrapped), {"trackers.mlflow": "http://mlflow:5000"})
    assert tracked.trackers.mlflow == "http://mlflow:5000"
    assert tracked.digest() == plain.digest()
