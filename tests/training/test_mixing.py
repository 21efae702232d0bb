"""The mixture of two generations in one encoder: what is drawn to what, resumed anywhere, chosen on dev, refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graceful.training.choosing import Option, choose
from graceful.training.combinations import IncompatibleParentError
from graceful.training.encoder import open_encoder, open_network, read_classifier
from graceful.training.generation import GenerationCard, PredecessorRef
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.material import load_material
from graceful.training.mixing import Mixture
from graceful.training.progress import TrailReporter
from graceful.training.starting import build_trainee
from graceful.training.step import Run
from graceful.training.validation import SHARES
from tests.training.mortal import trained_with_kills

MakeJob = Callable[..., TrainingJob]
CPU = torch.device("cpu")


@pytest.fixture
def second(
    make_job: MakeJob, write_embeddings: Callable[..., str], digits: LabelledImages, config: TrainingConfig
) -> Callable[..., TrainingJob]:
    """Return a function that makes the job of a second generation, its parent trained on four digits."""
    few = digits.take(np.isin(digits.labels, list("0123")))
    first = make_job(few, name="first", config=config.model_copy(update={"epochs": 2}))
    card = run_training(first)
    uri = f"{first.output_uri}/{card.generation_id}"
    cache = write_embeddings("cache", open_encoder(uri)(digits.sources)[0])
    reference = PredecessorRef(generation_id=card.generation_id, generation_uri=uri, embeddings_uri=cache)

    def make(name: str, **fields: Any) -> TrainingJob:
        dev = fields.pop("dev", None)
        recipe = TrainingConfig.model_validate({**config.model_dump(), "interpolation": 0.0, "epochs": 2, **fields})
        return make_job(
            name=name, config=recipe, parent_uri=uri, predecessors=(reference,), ordinal=2, dev=dev,
            checkpoint_minutes=0.0,
        )  # fmt: skip

    return make


def vectors(job: TrainingJob, card: GenerationCard, sources: list[str]) -> np.ndarray:
    return np.asarray(open_encoder(f"{job.output_uri}/{card.generation_id}")(sources)[0], np.float64)


def test_the_term_is_the_distance_to_the_mixture(second: MakeJob, tmp_path: Path) -> None:
    job = second("term", mixture=0.3, mixture_weight=7.0)
    material = load_material(job, CPU, tmp_path)
    run = Run(job, TrailReporter(job.storage_uri, job.name), 0, 1, CPU, None, material)
    torch.manual_seed(1)
    trainee = build_trainee(job.config, len(material.classes), None)
    parent = job.predecessors[0].generation_id
    mixture = Mixture(run, trainee, parent, 0.3)
    images, rows = torch.rand(5, 1, 8, 8), torch.tensor([0, 7, 100, 3, 599])
    with torch.no_grad():
        own = trainee.network.eval()(images).double().numpy()
        for parameter in trainee.network.parameters():
            parameter.mul_(1.5)  # the teacher does not follow
    embeddings = torch.randn(5, 16, requires_grad=True)
    found = mixture.term(images, embeddings, rows)
    stored = material.predecessors.of_batch(rows)[0][0].double().numpy()
    slow = 0.0
    for place in range(5):
        teacher = own[place] / np.linalg.norm(own[place])
        target = 0.7 * teacher + 0.3 * stored[place]
        target /= np.linalg.norm(target)
        mine = embeddings[place].detach().double().numpy()
        slow += 7.0 * float(((mine / np.linalg.norm(mine) - target) ** 2).sum()) / 5
    assert float(found) == pytest.approx(slow, rel=1e-5)
    found.backward()
    assert embeddings.grad is not None
    assert all(parameter.grad is None for parameter in trainee.parameters())


def test_a_mixture_lies_between_its_members_and_stands_on_the_card(second: MakeJob, digits: LabelledImages) -> None:
    jobs = {share: second(f"mixed-{share}", mixture=share) for share in (0.0, 0.5, 0.9)}
    cards = {share: run_training(job) for share, job in jobs.items()}
    made = {share: vectors(jobs[share], card, digits.sources) for share, card in cards.items()}
    old = np.asarray(open_encoder(str(jobs[0.0].parent_uri))(digits.sources)[0], np.float64)
    to_parent = [float((made[share] * old).sum(axis=1).mean()) for share in (0.0, 0.5, 0.9)]
    assert to_parent == sorted(to_parent)
    target = made[0.0] + old
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    close = [float((made[share] * target).sum(axis=1).mean()) for share in (0.5, 0.0)]
    assert close[0] > close[1]
    assert "mixture" not in cards[0.0].training
    assert cards[0.5].training["mixture"] == 0.5
    assert (cards[0.5].training["epochs"], cards[0.5].parent) == (4, jobs[0.5].predecessors[0].generation_id)
    lines = TrailReporter(jobs[0.5].storage_uri, "mixed-0.5").metrics()
    assert [line["epochs"] for line in lines] == [4, 4, 4, 4]
    assert ["mixture" in line for line in lines] == [False, False, True, True]


@pytest.mark.parametrize("before", [False, True])
def test_killed_at_every_checkpoint_it_ends_with_the_same_weights(second: MakeJob, before: bool) -> None:
    whole = run_training(second("whole", mixture=0.5, batch_size=200))
    job = second("killed", mixture=0.5, batch_size=200)
    card, left = trained_with_kills(job, 40, lives=1, before=before)
    places = [(state["mixing_from"], state["epoch"]) for state in left]
    assert card.digest == whole.digest
    assert {epoch for since, epoch in places if since is None} == {0, 1}
    assert {epoch for since, epoch in places if since == 2} >= {2}


def test_early_stopping_takes_the_best_epoch_and_then_mixes(
    second: MakeJob, digits: LabelledImages, tmp_path: Path, write_embeddings: Callable[..., str]
) -> None:
    job = second("parts")
    shown = digits.take(np.arange(len(digits)) % 5 == 0)
    manifest = str(tmp_path / "dev-manifest.parquet")
    write_manifest(manifest, shown)
    parent = job.predecessors[0]
    stored = write_embeddings("dev-vectors", open_encoder(parent.generation_uri)(shown.sources)[0])
    dev = DevPart(
        manifest_uri=manifest,
        predecessors=(parent.model_copy(update={"embeddings_uri": stored}),),
        max_flips=0.05,
    )
    job = second("chosen", mixture="dev", epochs=6, patience=1, dev=dev)
    card = run_training(job)
    told = card.training["mixture_on_dev"]
    tried = [Option(**option) for option in told["options"]]
    assert tuple(option.value for option in tried) == SHARES
    assert card.training["mixture"] == told["chosen"] == choose(tried, 0.05).value
    lines = TrailReporter(job.storage_uri, "chosen").metrics()
    stopped = sum("mixture" not in line for line in lines)
    assert [("mixture" in line, "dev" in line) for line in lines[stopped:]] == [(True, True)] * 2
    assert card.training["epochs"] == stopped + 2
    assert card.training["best_epoch"] <= stopped


def test_without_constraints_the_parent_alone_is_looked_at(second: MakeJob) -> None:
    job = second("free", mixture=0.5, constraints=())
    card = run_training(job)
    assert (card.training["mixture"], card.training["constraints"], card.predecessors) == (0.5, [], ())
    network = open_network(f"{job.output_uri}/{card.generation_id}", CPU)[1]
    assert read_classifier(f"{job.output_uri}/{card.generation_id}") is not None
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_what_cannot_be_mixed_is_refused_before_training(second: MakeJob) -> None:
    job = second("alone", mixture=0.5)
    with pytest.raises(IncompatibleParentError, match=r"among the predecessors.*set mixture = 0"):
        run_training(job.model_copy(update={"predecessors": ()}))
    job = second("apart", mixture=0.5, constraints=(), start="scratch")
    with pytest.raises(IncompatibleParentError, match=r"in the space of g001-.*set mixture = 0, or take constraints"):
        run_training(job)
    record = job.config.model_dump()
    with pytest.raises(ValueError, match="mixture"):
        TrainingConfig.model_validate({**record, "mixture": 1.0})
