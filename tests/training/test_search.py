"""Parts of a super-net are measured as the networks that they would be, and limits are kept before anything is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graceful.training.architecture import Architecture, Candidate, SearchConfig, Space
from graceful.training.backbones import build_backbone
from graceful.training.encoder import open_encoder
from graceful.training.exporting import multiply_adds
from graceful.training.generation import PredecessorRef, Preprocessing
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.search import Scorer, cost_of, search
from graceful.training.supernet import supernet_recipe

SEARCH = SearchConfig(block_widths=((8, 16), (16, 32)), image_sizes=(6, 8), max_parameters=10**6, evaluations=2)


@pytest.fixture
def supernet(
    make_job: Callable[..., TrainingJob],
    write_embeddings: Callable,
    config: TrainingConfig,
    digits: LabelledImages,
    tmp_path: Path,
) -> tuple[TrainingJob, str]:
    """The job of a super-net, with a dev part of images that it was not trained on, and its folder."""
    is_dev = np.isin(digits.labels, ("7", "8", "9"))
    shown, aside = digits.take(~is_dev), digits.take(is_dev)
    cloud = f"{make_job().output_uri}/{run_training(make_job(shown)).generation_id}"
    write_manifest(str(tmp_path / "dev.parquet"), aside)

    def laid(images: LabelledImages, name: str) -> PredecessorRef:
        vectors = write_embeddings(f"vectors-{name}", open_encoder(cloud, precision="float32")(images.sources)[0])
        return PredecessorRef(generation_id=Path(cloud).name, generation_uri=cloud, embeddings_uri=vectors)

    recipe = config.model_copy(update={"start": "scratch", "interpolation": 0.0, "precision": "float32"})
    job = make_job(
        shown,
        name="supernet",
        config=supernet_recipe(recipe, SEARCH),
        ordinal=2,
        parent_uri=cloud,
        predecessors=(laid(shown, "training"),),
    )
    made = run_training(job).generation_id
    dev = DevPart(manifest_uri=str(tmp_path / "dev.parquet"), predecessors=(laid(aside, "dev"),))
    return job.model_copy(update={"dev": dev}), f"{job.output_uri}/{made}"


def recall(queries: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose nearest other image has their label."""
    scores = queries @ rows.T
    np.fill_diagonal(scores, -np.inf)
    return float((labels[scores.argmax(axis=1)] == labels).mean())


def test_the_largest_part_is_measured_as_the_stored_network_is(supernet, digits, tmp_path):
    job, uri = supernet
    aside = digits.take(np.isin(digits.labels, ("7", "8", "9")))
    vectors, theirs = (
        open_encoder(place, precision="float32")(aside.sources)[0]
        for place in (uri, job.predecessors[0].generation_uri)
    )
    scorer = Scorer(job, uri, tmp_path)
    largest = SEARCH.at(8).largest
    found = scorer.measure(largest, cost_of(job.config, largest, timed=False))
    # Batch norm is calibrated on the same images in other batches.
    assert found.self_test == pytest.approx(recall(vectors, vectors, aside.labels), abs=0.03)
    assert found.cross_test == pytest.approx(recall(vectors, theirs, aside.labels), abs=0.05)
    assert found.reward == found.self_test * found.cross_test
    smaller = largest.model_copy(update={"image_size": 6})
    assert scorer.measure(smaller, found.cost).self_test != found.self_test, "images of its own size"
    scorer.close()


def test_a_network_that_was_not_calibrated_would_be_another(supernet, tmp_path, monkeypatch):
    job, uri = supernet
    largest = SEARCH.at(8).largest
    cost = cost_of(job.config, largest, timed=False)
    calibrated = Scorer(job, uri, tmp_path).measure(largest, cost)
    monkeypatch.setattr("graceful.training.search.calibrate", lambda *_: 0)
    (tmp_path / "again").mkdir()
    without = Scorer(job, uri, tmp_path / "again").measure(largest, cost)
    assert calibrated.reward > without.reward + 0.05


def test_what_a_network_costs_is_counted_by_hand():
    preprocessing = {"image_size": 8, "channels": 1, "mean": [0.3], "std": [0.37]}
    config = TrainingConfig.model_validate({"width": 16, "preprocessing": preprocessing})
    architecture = Architecture(block_widths=(4, 8), depths=(2, 1), kernels=(3, 5), image_size=8)
    cost = cost_of(config, architecture, timed=True)
    # 8x8 pixels: 9 x 1 x 4 and 9 x 4 x 4; 4x4 pixels: 25 x 4 x 8; the projection: 8 x 16.
    assert cost.multiply_adds == 64 * (36 + 144) + 16 * 800 + 128
    assert cost.num_parameters == (36 + 8) + (144 + 8) + (800 + 16) + (128 + 16)
    assert cost.latency_ms is not None
    assert cost.latency_ms > 0


def test_what_a_network_costs_is_what_is_counted_as_it_runs():
    rng = np.random.default_rng(0)
    space = Space(block_widths=((3, 5),) * 4, depths=(1, 2, 3), kernels=(1, 3, 5), image_sizes=(5, 8, 16))
    for architecture in (space.draw(rng) for _ in range(12)):
        look = Preprocessing(image_size=architecture.image_size, channels=3, mean=(0.3,) * 3, std=(0.4,) * 3)
        network = build_backbone(architecture.backbone, 7, 3, architecture.image_size)
        assert architecture.multiply_adds(3, 7) == multiply_adds(network, look)
        assert architecture.num_parameters(3, 7) == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"max_multiply_adds": 100}, "multiply-adds .at most 100"),
        ({"max_parameters": 100}, "parameters .at most 100"),
        ({"max_latency_ms": 1e-6}, "ms for an image .at most 1e-06"),
    ],
)
def test_limits_that_nothing_of_the_space_meets_are_refused_before_anything_is_measured(supernet, limit, said):
    job, uri = supernet
    config = SearchConfig.model_validate({**SEARCH.model_dump(), "max_parameters": None, **limit})
    with pytest.raises(ValueError, match=said):
        search(job, uri, config, (), no_candidate)


def test_a_search_that_has_ended_measures_nothing(supernet):
    job, uri = supernet
    cost = cost_of(job.config, SEARCH.at(8).smallest, timed=False)
    known = Candidate(architecture=SEARCH.at(8).smallest, cost=cost, self_test=1.0, cross_test=1.0, seconds=0.0)
    assert search(job, uri, SEARCH, [known, known], no_candidate) == [known, known]


def no_candidate(candidate: Candidate) -> None:
    raise AssertionError(f"measured {candidate}")
