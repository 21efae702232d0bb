"""Recipes that cannot work with their predecessors are refused before data are read; wider ones keep their parent."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.nn.functional import normalize

from graceful.errors import UsageError
from graceful.files import join
from graceful.training import loop
from graceful.training.combinations import IncompatibleParentError
from graceful.training.encoder import adopt, embed, open_encoder, read_classifier
from graceful.training.generation import BackboneSpec, GenerationCard, PredecessorRef, Preprocessing
from graceful.training.job import ConstraintConfig, HeadConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages
from graceful.training.material import Material, load_material
from graceful.training.objective import Draw, Objective, term_names
from graceful.training.progress import TrailReporter
from graceful.training.simplex import simplex_vertices
from graceful.training.starting import Parent, Trainee, build_trainee, check_start, load_parent
from graceful.training.step import Run, Stepper, steps_per_epoch

CPU = torch.device("cpu")

MakeJob = Callable[..., TrainingJob]
Chain = Callable[..., tuple[TrainingJob, GenerationCard]]


@pytest.fixture
def chain(
    make_job: MakeJob,
    write_embeddings: Callable[[str, NDArray[Any]], str],
    digits: LabelledImages,
    config: TrainingConfig,
) -> Chain:
    """Return a function that makes a job after those that it ran before, and by default runs it."""
    uris: list[str] = []

    def add(run: bool = True, images: LabelledImages = digits, **changes: Any) -> tuple[TrainingJob, Any]:
        references = []
        for uri in uris:
            name = uri.rpartition("/")[2]
            vectors, _ = open_encoder(uri)(images.sources)
            cache = write_embeddings(f"{name}-{len(images)}", vectors)
            references.append(PredecessorRef(generation_id=name, generation_uri=uri, embeddings_uri=cache))
        job = make_job(
            images=images,
            name=f"run-{len(uris)}-{run}",
            config=config.model_copy(update={"epochs": 1, **changes}),
            parent_uri=uris[-1] if uris else None,
            predecessors=tuple(references),
            ordinal=len(uris) + 1,
        )
        if not run:
            return job, None
        card = run_training(job)
        uris.append(join(job.output_uri, card.generation_id))
        return job, card

    return add


def refusal(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a worker refuses before it reads any image."""

    def no_data(*_: Any) -> None:
        raise AssertionError("data were read before the recipe was refused")

    monkeypatch.setattr(loop, "load_material", no_data)
    with pytest.raises((IncompatibleParentError, UsageError)) as raised:
        loop.train_worker(job, TrailReporter(job.storage_uri, job.name))
    return str(raised.value)


def test_what_a_chain_does_not_allow_is_refused_with_what_can_be_done(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain()
    scratch = {"start": "scratch", "interpolation": 0.0}
    other = BackboneSpec(name="small_cnn", kwargs={"block_widths": [8, 16]})
    mixbct = (ConstraintConfig(name="mixbct"),)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"width": 8}, "widths may grow but not shrink", "raise width"),
        ({"width": 8, **scratch, "rows_from_parent": False}, "widths may grow but not shrink", "re-embed the gallery"),
        ({"backbone": other}, "is interpolated with its weights", "the constraints hold across architectures"),
        ({"backbone": other, "interpolation": 0.0}, "the network starts from its weights", "start = 'scratch'"),
        ({"head": HeadConfig(name="simplex")}, "the fixed simplex from the first generation on", "use another head"),
        ({"head": HeadConfig(name="simplex"), **scratch}, "without it", "start a chain of its own"),
        ({"width": 24, "constraints": mixbct}, "width 24 for mixbct", "use bct or oca"),
    ]
    for changes, reason, remedy in cases:
        found = refusal(chain(run=False, **changes)[0], monkeypatch)
        assert reason in found, found
        assert remedy in found, found


def test_constraints_are_looked_up_before_data_are_read(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    for entry, expected in (
        (ConstraintConfig(name="factories:Missing"), "an importable factories:Missing"),
        (ConstraintConfig(name="factories:Absolute", parameters={"scale": 1.0}), "its own parameters"),
        (ConstraintConfig(name="factories:Absolute", uncertainty=True), "a parameter weights for uncertainty"),
    ):
        assert expected in refusal(chain(run=False, constraints=(entry,))[0], monkeypatch)


def test_contradictions_of_a_recipe_are_refused(preprocessing: Preprocessing) -> None:
    with pytest.raises(ValidationError, match="mixture to be said with constraints = "):
        TrainingConfig(preprocessing=preprocessing, constraints=())
    for mixture in (0.0, 0.5):
        control = TrainingConfig(preprocessing=preprocessing, constraints=(), mixture=mixture)
        assert TrainingConfig.model_validate_json(control.model_dump_json()) == control
    with pytest.raises(ValidationError, match="mixbct once"):
        TrainingConfig(preprocessing=preprocessing, constraints=(ConstraintConfig(name="mixbct"),) * 2)
    for wrong, expected in (
        ({"name": "mixbct", "uncertainty": True}, "no loss of its own"),
        ({"name": "mixbct", "weight": 2.0}, "no loss of its own"),
        ({"name": "mixbct", "focus": 5.0}, "no loss of its own"),
        ({"name": "focal_kl", "focus": 5.0}, "no focus beside its own weights"),
        ({"name": "l2", "against": "ensemble"}, "only logits of several spaces have a mean"),
        ({"name": "ldi", "against": "ensemble", "uncertainty": True}, "without uncertainty"),
        ({"name": "ract", "parameters": {"hardest": 0.5}}, "hardest to be a whole number"),
        ({"name": ":Absolute"}, "package.module:Class"),
    ):
        with pytest.raises(ValidationError, match=expected):
            ConstraintConfig.model_validate(wrong)


def test_the_paragon_is_tied_by_no_head_either(config: TrainingConfig) -> None:
    tied = config.model_copy(update={"head": HeadConfig(name="simplex", new_class_margin=2.0, scale=7.0)})
    assert tied.without_constraints().head == HeadConfig(name="cosine_softmax", scale=7.0)


# Focal distillation


def adopted(place: Path, preprocessing: Preprocessing, ordinal: int) -> PredecessorRef:
    """An encoder from elsewhere, which has no classifier."""
    card = adopt(
        "factories:flat",
        preprocessing=preprocessing,
        out_uri=str(place),
        ordinal=ordinal,
        kwargs={"features": 16},
    )
    uri = join(str(place), card.generation_id)
    return PredecessorRef(generation_id=card.generation_id, generation_uri=uri, embeddings_uri=uri)


def test_logits_need_a_classifier_on_either_side(
    chain: Chain, preprocessing: Preprocessing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    chain()
    job, _ = chain(run=False)
    for name in ("focal_kl", "focal_logits", "ldi"):
        for ordinal, against, is_refused in (
            (0, "all", True),
            (9, "all", True),
            (9, "latest", True),
            (0, "latest", False),
        ):
            known = (*job.predecessors, adopted(tmp_path, preprocessing, ordinal))
            entry = ConstraintConfig(name=name, against=against)
            config = job.config.model_copy(update={"constraints": (entry,)})
            tried = job.model_copy(update={"config": config, "predecessors": known})
            if is_refused:
                found = refusal(tried, monkeypatch)
                assert f"a classifier in every predecessor for {name}" in found
                assert "use l2 with focus = 5" in found
            else:
                check_start(tried)


def test_logits_without_a_shared_class_are_refused(chain: Chain, digits: LabelledImages, tmp_path: Path) -> None:
    odd, even = (
        digits.take([i for i, label in enumerate(digits.labels) if label in these]) for these in ("135", "024")
    )
    chain(images=odd)
    job, _ = chain(run=False, images=even, constraints=(ConstraintConfig(name="focal_kl"),))
    with pytest.raises(UsageError, match=r"expected classes that g001-.* has classifier rows for .* found none"):
        Objective(job.config, load_material(job, CPU, tmp_path), CPU)


def test_logits_of_predecessors_are_those_of_their_classifiers(
    chain: Chain, digits: LabelledImages, tmp_path: Path
) -> None:
    """Cached vectors and stored rows against the predecessor's own network, and the mean of both predecessors."""
    few = digits.take([i for i, label in enumerate(digits.labels) if label in "13579"])
    chain(images=few)
    chain()
    entries = (
        ConstraintConfig(name="focal_logits", parameters={"alpha": 1.0, "beta": 5.0}),
        ConstraintConfig(name="ldi", against="ensemble", parameters={"xi": 0.1}),
        ConstraintConfig(name="l2", focus=5.0),
    )
    job, _ = chain(run=False, constraints=entries)
    material, _, trainee = starting_point(job, tmp_path)
    batch = next(material.batches(0, 0, 12, 0, 1))
    embeddings = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    terms = Objective(job.config, material, CPU).terms(
        embeddings, batch.labels, batch, torch.Generator(), Draw(), trainee.head
    )
    fresh = 20 * (normalize(embeddings, dim=1) @ normalize(trainee.head.rows.detach(), dim=1).t())
    stale, focal, tied = [], 0.0, 0.0
    for reference in job.predecessors:
        encoder, classifier = open_encoder(reference.generation_uri), read_classifier(reference.generation_uri)
        assert classifier is not None
        vectors = torch.from_numpy(encoder.encode_pixels(batch.pixels.numpy()))
        known = [material.classes.index(name) for name in classifier[0].classes]
        logits = torch.full((50, 10), -torch.inf)
        logits[:, known] = 20 * (vectors @ classifier[1].t())
        own = (fresh[:, known] - logits[:, known]).square().mean(dim=1)
        focal += float(((1 + 5 * (logits.argmax(dim=1) == batch.labels).float()) * 0.5 * own).mean())
        stale.append(logits)
        means = material.predecessors.class_means_of(reference.generation_id)
        assert means is not None
        is_right = (vectors @ means.t()).argmax(dim=1) == batch.labels
        distance = (normalize(embeddings, dim=1) - vectors).square().sum(dim=1)
        tied += float(((1 + 5 * is_right.float()) * distance).mean())
    assert float(terms["focal_logits"].detach()) == pytest.approx(focal, rel=1e-3)
    assert float(terms["l2"].detach()) == pytest.approx(tied, rel=1e-3)
    both = torch.stack(stale)
    mean = torch.where(both[0].isinf(), both[1], both.mean(dim=0))
    expected = ((fresh - mean).abs() - 0.1).clamp(min=0).square().mean()
    assert float(terms["ldi"].detach()) == pytest.approx(float(expected), rel=1e-3)


# Chains under the published methods


def test_a_simplex_keeps_its_corners_over_generations(chain: Chain, digits: LabelledImages) -> None:
    few = digits.take([i for i, label in enumerate(digits.labels) if label in "13579"])
    simplex = HeadConfig(name="simplex", weight=0.1)
    hoc = (ConstraintConfig(name="hoc", weight=0.9, against="latest"),)
    job, first = chain(images=few, head=simplex, constraints=hoc)
    _, second = chain(head=simplex, constraints=hoc)
    assert first.training["corners"] == list("13579")
    assert second.training["corners"] == list("1357902468")
    corners = simplex_vertices(16)
    for card in (first, second):
        stored = read_classifier(join(job.output_uri, card.generation_id))
        assert stored is not None
        places = [card.training["corners"].index(name) for name in card.classes]
        torch.testing.assert_close(stored[1], corners[places], atol=1e-6, rtol=0)
    lines = TrailReporter(job.storage_uri, "run-1-True").metrics()
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["task"] + lines[-1]["hoc"], rel=1e-5)


def starting_point(job: TrainingJob, scratch: Path) -> tuple[Material, Parent, Trainee]:
    material = load_material(job, CPU, scratch)
    torch.manual_seed(job.config.seed)
    parent = load_parent(job, material, CPU, None)
    assert parent is not None
    return material, parent, build_trainee(job.config, len(material.classes), parent)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_the_prefix_of_a_wider_generation_is_its_parents_vector_before_training(
    chain: Chain, digits: LabelledImages, config: TrainingConfig, tmp_path: Path, name: str
) -> None:
    few = digits.take(range(0, len(digits), 4))
    backbone = config.backbone if name == "small_cnn" else BackboneSpec(name=name, kwargs={"small_stem": True})
    job, first = chain(images=few, backbone=backbone)
    stored, _ = open_encoder(join(job.output_uri, first.generation_id), precision="float32")(few.sources)
    material, parent, trainee = starting_point(chain(False, few, backbone=backbone, width=24)[0], tmp_path)
    trainee.network.eval()
    vectors = embed(
        trainee.network, next(material.clean(0, 1, len(few))).pixels, config.preprocessing, CPU, None
    ).clone()
    assert vectors.shape[1] == 24
    prefix = torch.nn.functional.normalize(vectors[:, :16], dim=1)
    torch.testing.assert_close(prefix, torch.from_numpy(stored), atol=1e-5, rtol=0)
    assert 0 < float(vectors[:, 16:].norm(dim=1).max()) < 0.5  # small beside the rest, and alive
    assert parent.class_means.shape == parent.rows.shape == (10, 24)
    assert not bool(parent.class_means[:, 16:].any())
    torch.testing.assert_close(trainee.head.rows.detach(), 1.1 * parent.class_means)


def test_a_wider_generation_is_trained_from_its_parent(chain: Chain) -> None:
    first = chain()[1]
    second = chain(width=24)[1]
    assert (second.parent, second.width, second.prefix_widths) == (first.generation_id, 24, (16,))
    assert second.training["interpolation"] == 0.4


def test_a_network_whose_inner_layers_grow_with_the_width_is_refused(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    backbone = BackboneSpec(name="factories:twice")
    chain(backbone=backbone)
    with pytest.raises(IncompatibleParentError, match=r"last layer alone grows with the width, found last\.weight"):
        starting_point(chain(run=False, backbone=backbone, width=24)[0], tmp_path)


@pytest.mark.parametrize(
    ("head", "constraints"),
    [
        (HeadConfig(), (ConstraintConfig(name="mixbct", parameters={"share": 0.5}),)),
        (
            HeadConfig(rotation=True, label_smoothing=0.1, weight=5.0),
            (ConstraintConfig(name="oca", against="latest"), ConstraintConfig(name="oca", weight=0.5)),
        ),
        (
            HeadConfig(weight=0.1),
            (
                ConstraintConfig(name="focal_kl", weight=0.9),
                ConstraintConfig(name="focal_logits", against="latest", uncertainty=True),
                ConstraintConfig(name="ldi", against="ensemble"),
                ConstraintConfig(name="l2", focus=5.0),
            ),
        ),
        (
            HeadConfig(new_class_margin=2.0),
            (
                ConstraintConfig(name="repulsion", uncertainty=True),
                ConstraintConfig(name="l2", uncertainty=True, reduction="mean"),
                ConstraintConfig(name="factories:Absolute", weight=0.1),
            ),
        ),
    ],
)
@pytest.mark.parametrize("sampled_classes", [0, 7])
def test_what_is_logged_is_what_is_optimised(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: HeadConfig,
    constraints: tuple[ConstraintConfig, ...],
    sampled_classes: int,
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    if not sampled_classes:
        chain()
    chain()
    changes = {"head": head, "constraints": constraints, "batch_size": 6 if sampled_classes else 32}
    job, _ = chain(run=False, sampled_classes=sampled_classes, **changes)
    material, _, trainee = starting_point(job, tmp_path)
    stepper = Stepper(Run(job, TrailReporter(job.storage_uri, job.name), 0, 1, CPU, None, material), trainee, 1e-3, 9)
    batch = next(material.batches(0, 0, steps_per_epoch(stepper._run), 0, 1))
    found = stepper.take(batch, 0, 0)
    names = [] if constraints[0].name == "mixbct" else term_names(constraints)
    assert list(found) == ["loss", "task", *names]
    torch.testing.assert_close(found["loss"], torch.stack([found[name] for name in ["task", *names]]).sum())
    assert all(float(value) > 0 for value in found.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainee.parameters())


def test_mixed_features_are_what_the_task_sees(chain: Chain, tmp_path: Path) -> None:
    chain()
    job, _ = chain(run=False, constraints=(ConstraintConfig(name="mixbct"),), batch_size=50)
    material, _, trainee = starting_point(job, tmp_path)
    objective = Objective(job.config, material, CPU)
    batch = next(material.batches(0, 0, 12, 0, 1))
    draw = objective.draw(batch.labels, batch, torch.Generator().manual_seed(3))
    assert draw.stand_ins is not None
    replaced = draw.stand_ins.is_replaced
    assert int(replaced.sum()) == 15
    embeddings = torch.randn(50, 16)
    mixed = draw.mix(embeddings)
    stored = material.predecessors.of_batch(batch.rows)[0][0]
    assert torch.equal(mixed, torch.where(replaced[:, None], stored, embeddings))
    images = torch.randn(50, 1, 8, 8)
    seen, task = trainee(images, batch.labels, None, draw)
    torch.testing.assert_close(task, trainee.head(draw.mix(seen), batch.labels))
    assert abs(float(task.detach() - trainee.head(seen, batch.labels).detach())) > 1e-3
