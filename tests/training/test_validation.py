"""The dev part of a training: exact recall, no trace in the weights, early stopping, the share that the rule takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from graceful.errors import UsageError
from graceful.files import join
from graceful.training import loop, validation
from graceful.training.choosing import Option, choose
from graceful.training.encoder import open_encoder
from graceful.training.generation import GenerationCard, PredecessorRef
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.progress import TrailReporter
from graceful.training.validation import SHARES, best_epoch, has_stalled, right_at_1

MakeJob = Callable[..., TrainingJob]


def slow_right(queries: np.ndarray, gallery: np.ndarray, identities: list[int]) -> list[bool]:
    """One query at a time, from the definition."""
    found = []
    for row, own in enumerate(identities):
        if identities.count(own) < 2:
            continue
        query = queries[row][: gallery.shape[1]]
        query = query / max(float(np.linalg.norm(query)), 1e-12)
        scores = {other: float(query @ gallery[other]) for other in range(len(gallery)) if other != row}
        best = max(score for other, score in scores.items() if identities[other] == own)
        found.append(all(best > score for other, score in scores.items() if identities[other] != own))
    return found


@pytest.mark.parametrize("width", [6, 4])
def test_right_at_1_is_that_of_a_slow_loop(width):
    generator = torch.Generator().manual_seed(3)
    identities = torch.arange(41) // 2  # the last has one image: searched, but does not search
    centres = torch.randn(21, 6, generator=generator)
    queries = normalize(centres[identities] + 0.5 * torch.randn(41, 6, generator=generator), dim=1)
    gallery = normalize(queries[:, :width] + 0.2 * torch.randn(41, width, generator=generator), dim=1)
    found = right_at_1(queries, gallery, identities, block=16).tolist()
    assert found == slow_right(queries.numpy(), gallery.numpy(), identities.tolist())
    assert 0 < sum(found) < len(found) == 40


def test_a_collapsed_network_is_wrong_everywhere():
    same = torch.ones(6, 4) / 2
    assert not right_at_1(same, same, torch.tensor([0, 0, 1, 1, 2, 2])).any()
    assert not right_at_1(torch.zeros(4, 4), torch.zeros(4, 4), torch.tensor([0, 0, 1, 1])).any()


def test_patience_counts_epochs_since_the_best_one_and_waits_for_min_epochs(config):
    recipe = config.model_copy(update={"patience": 2, "min_epochs": 4})
    assert not has_stalled([0.5, 0.4, 0.3], recipe)
    assert has_stalled([0.5, 0.4, 0.3, 0.2], recipe)
    assert not has_stalled([0.1, 0.5, 0.4, 0.6, 0.5], recipe)
    assert has_stalled([0.1, 0.5, 0.5, 0.5], recipe), "as good is not better"
    assert not has_stalled([0.5, 0.4, 0.3, 0.2], config), "no patience, no stop"
    assert best_epoch([0.1, 0.5, 0.5]) == 1


def dev_part(
    tmp_path: Path, digits: LabelledImages, write_embeddings: Callable[..., str], *uris: str, limit: float | None = None
) -> tuple[LabelledImages, DevPart]:
    """The training images that are left, and a dev part of every fifth image with the predecessors' vectors."""
    aside = np.arange(len(digits)) % 5 == 0
    dev = digits.take(aside)
    manifest = str(tmp_path / "dev.parquet")
    write_manifest(manifest, dev)
    references = [
        PredecessorRef(
            generation_id=uri.rpartition("/")[2],
            generation_uri=uri,
            embeddings_uri=write_embeddings(f"dev-{number}", open_encoder(uri)(dev.sources)[0]),
        )
        for number, uri in enumerate(uris)
    ]
    return digits.take(~aside), DevPart(manifest_uri=manifest, predecessors=tuple(references), max_flips=limit)


def folder(job: TrainingJob, card: GenerationCard) -> str:
    return join(job.output_uri, card.generation_id)


def test_the_curve_is_in_the_lines_and_leaves_no_trace_in_the_weights(make_job, write_embeddings, digits, tmp_path):
    images, dev = dev_part(tmp_path, digits, write_embeddings)
    blind = run_training(make_job(images, name="blind"))
    first = make_job(images, name="first", dev=dev)
    card = run_training(first)
    assert card.digest == blind.digest
    lines = TrailReporter(first.storage_uri, "first").metrics()
    own = open_encoder(folder(first, card))(np.array(digits.sources)[::5].tolist())[0]
    labels = np.unique(digits.labels[::5], return_inverse=True)[1].tolist()
    expected = float(np.mean(slow_right(own, own, labels)))
    assert lines[-1]["dev"] == pytest.approx(expected, abs=0.02), "calibrated, as the stored network is"
    _, dev = dev_part(tmp_path, digits, write_embeddings, folder(first, card))
    second = make_job(images, name="second", dev=dev, parent_uri=folder(first, card), ordinal=2)
    run_training(second)
    line = TrailReporter(second.storage_uri, "second").metrics()[0]
    assert {"dev", f"dev on {card.generation_id}"} <= line.keys()


def test_the_best_epoch_is_kept_also_by_a_training_that_was_killed(
    make_job, write_embeddings, digits, tmp_path, monkeypatch, config
):
    images, dev = dev_part(tmp_path, digits, write_embeddings)
    recipe = config.model_copy(update={"patience": 2, "epochs": 6})
    curve = iter([0.5, 0.9, 0.6, 0.7, 0.8, 0.9])

    def told(self: Any, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
        right = torch.zeros(100, dtype=torch.bool)
        right[: round(100 * next(curve))] = True
        return right

    monkeypatch.setattr(validation.Dev, "right", told)
    job = make_job(images, name="stops", dev=dev, config=recipe)
    card = run_training(job)
    assert (card.training["epochs"], card.training["best_epoch"]) == (4, 2)

    curve = iter([0.5, 0.9, 0.6, 0.7, 0.8, 0.9])
    killed = make_job(images, name="killed", dev=dev, config=recipe)
    report = TrailReporter.report

    def dies(self: TrailReporter, metrics: dict[str, Any], state: Any) -> None:
        report(self, metrics, state)
        if metrics["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrailReporter, "report", dies)
    with pytest.raises(KeyboardInterrupt):
        run_training(killed)
    monkeypatch.setattr(TrailReporter, "report", report)
    assert run_training(killed).digest == card.digest

    curve = iter([0.5, 0.6, 0.7, 0.8, 0.85, 0.9])
    last = run_training(make_job(images, name="rises", dev=dev, config=recipe))
    assert last.training["epochs"] == 6
    assert last.digest != card.digest


@pytest.mark.parametrize("limit", [None, 0.06, 1e-6])
def test_the_share_is_the_one_that_the_rule_takes_on_dev(make_job, write_embeddings, digits, tmp_path, config, limit):
    few = digits.take(np.isin(digits.labels, list("0123")) & (np.arange(len(digits)) % 5 != 0))
    first = make_job(few, name="first")
    uri = folder(first, run_training(first))
    images, dev = dev_part(tmp_path, digits, write_embeddings, uri, limit=limit)
    chooses = config.model_copy(update={"interpolation": "dev", "constraints": (), "max_lr": 1e-2})
    fields: dict[str, Any] = {"dev": dev, "parent_uri": uri, "ordinal": 2}
    card = run_training(make_job(images, name="chooses", config=chooses, **fields))
    told = card.training["interpolation_on_dev"]
    tried = [Option(**option) for option in told["options"]]
    assert tuple(option.value for option in tried) == SHARES
    assert card.training["interpolation"] == told["chosen"] == choose(tried, limit).value
    fixed = config.model_copy(update={"interpolation": told["chosen"], "constraints": (), "max_lr": 1e-2})
    job = make_job(images, name="fixed", config=fixed, **fields)
    same = run_training(job)
    assert same.digest == card.digest
    # what it says of the share that it took is true of the stored generation
    sources = np.array(digits.sources)[::5].tolist()
    labels = np.unique(digits.labels[::5], return_inverse=True)[1].tolist()
    new, old = (open_encoder(place)(sources)[0] for place in (folder(job, same), uri))
    before, full, none = (np.array(slow_right(*pair, labels)) for pair in ((old, old), (new, new), (new, old)))
    taken = next(option for option in tried if option.value == told["chosen"])
    assert taken.self_test == pytest.approx(full.mean(), abs=0.01)
    assert taken.flips == pytest.approx(max((before & ~full).mean(), (before & ~none).mean()), abs=0.01)


def test_choosing_without_a_dev_part_is_refused_before_training(make_job, config, digits, write_embeddings, tmp_path):
    for changes in ({"interpolation": "dev"}, {"patience": 1}):
        with pytest.raises(ValueError, match=r"give evaluation\.dev"):
            make_job(config=config.model_copy(update=changes))
    _, dev = dev_part(tmp_path, digits, write_embeddings)
    recipe = config.model_copy(update={"interpolation": "dev"})
    with pytest.raises(ValueError, match="expected the parent g001-abc among the dev part"):
        make_job(config=recipe, dev=dev, parent_uri="/generations/g001-abc")
    one = str(tmp_path / "one.parquet")
    write_manifest(one, digits.take(digits.labels == "3"))
    with pytest.raises(UsageError, match="expected dev images of two identities"):
        loop.train_worker(make_job(dev=DevPart(manifest_uri=one)), TrailReporter(str(tmp_path), "none"))
    record = json.loads(config.model_dump_json())
    with pytest.raises(ValueError, match="interpolation"):
        TrainingConfig.model_validate({**record, "interpolation": 1.0})
    with pytest.raises(ValueError, match="scratch"):
        TrainingConfig.model_validate({**record, "interpolation": "dev", "start": "scratch"})
