"""Parts of a super-net are networks of their own that share its weights; it is trained like any other network."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from graceful.training.architecture import Architecture, SearchConfig, Space
from graceful.training.backbones import build_backbone
from graceful.training.encoder import open_network
from graceful.training.generation import BackboneSpec, GenerationCard
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.loop import train_worker
from graceful.training.progress import TrailReporter
from graceful.training.supernet import MICRO_BATCHES, ElasticCnn, layers_of, supernet_recipe
from tests.training.mortal import trained_with_kills
from tests.training.ranks import on_ranks

SPACE = Space(block_widths=((2, 4), (4, 8)), depths=(1, 2), kernels=(3, 5), image_sizes=(5, 8))


@pytest.fixture
def supernet() -> ElasticCnn:
    torch.manual_seed(0)
    found = ElasticCnn(6, 1, 8, **SPACE.model_dump())
    for norms in layers_of(found):
        for _, norm in norms:  # as after a training: no channel is like another
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.5, 0.5)
    return found


def architectures() -> list[Architecture]:
    rng = np.random.default_rng(0)
    return [SPACE.smallest, SPACE.largest, *(SPACE.draw(rng) for _ in range(6))]


@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_a_part_gives_as_a_network_of_its_own_what_it_gave_in_the_supernet(supernet, architecture):
    images = torch.randn(7, 1, architecture.image_size, architecture.image_size)
    part = supernet.part(architecture)
    torch.testing.assert_close(part.train()(images), supernet.run_part(architecture, images))
    rebuilt = build_backbone(architecture.backbone, 6, 1, architecture.image_size)
    rebuilt.load_state_dict(part.state_dict(), strict=True)


def test_a_part_takes_the_first_channels_and_the_middle_of_a_kernel(supernet):
    whole, part = layers_of(supernet)[1][0][0], layers_of(supernet.part(SPACE.smallest))[1][0][0]
    assert (whole.weight.shape, part.weight.shape) == ((8, 4, 5, 5), (4, 2, 3, 3))
    torch.testing.assert_close(part.weight, whole.weight[:4, :2, 1:4, 1:4])


def test_a_part_has_a_copy_of_its_weights(supernet):
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for parameter in supernet.part(SPACE.largest).parameters():
        parameter.data.zero_()
    torch.testing.assert_close(supernet.state_dict(), before)


def test_larger_images_are_made_smaller_without_aliasing(supernet):
    images, size = torch.randn(7, 1, 8, 8), SPACE.smallest.image_size
    smaller = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    found = supernet.run_part(SPACE.smallest, images)
    torch.testing.assert_close(found, supernet.part(SPACE.smallest).train()(smaller))


def test_in_evaluation_it_is_the_largest_network(supernet):
    largest = build_backbone(SPACE.largest.backbone, 6, 1, 8)
    largest.load_state_dict(supernet.state_dict(), strict=True)
    images = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(supernet.eval()(images), largest.eval()(images))


def parts_of_a_step(monkeypatch: pytest.MonkeyPatch, network: ElasticCnn) -> list[Architecture]:
    """The networks that run in a step."""
    ran: list[Architecture] = []
    run_part = ElasticCnn.run_part
    monkeypatch.setattr(ElasticCnn, "run_part", lambda self, a, images: ran.append(a) or run_part(self, a, images))
    for _ in range(MICRO_BATCHES):
        given = network(torch.randn(7, 1, 8, 8))
    given.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters()), "several workers wait for all"
    return ran


def test_a_step_trains_random_networks_within_the_limits_and_near_them_and_the_largest(monkeypatch):
    limits = {"max_multiply_adds": 20_000, "max_parameters": 900}
    network, ran = ElasticCnn(6, 1, 8, **SPACE.model_dump(), **limits), []
    for _ in range(20):
        ran.append(parts_of_a_step(monkeypatch, network))
        monkeypatch.undo()
    assert {step[-1] for step in ran} == {SPACE.largest}
    random = [architecture for step in ran for architecture in step[:-1]]
    shares = [max(a.multiply_adds(1, 6) / 20_000, a.num_parameters(1, 6) / 900) for a in random]
    assert 0.5 <= min(shares) <= max(shares) <= 1
    assert len(set(random)) > 5


def test_without_such_a_limit_any_network_is_trained(monkeypatch):
    network, ran = ElasticCnn(6, 1, 8, **SPACE.model_dump()), set()
    for _ in range(20):
        ran |= set(parts_of_a_step(monkeypatch, network))
        monkeypatch.undo()
    assert len(ran) > 10


def test_a_supernet_is_trained_like_any_network_and_goes_on_where_it_was_killed(
    make_job: Callable[..., TrainingJob], config: TrainingConfig
):
    search = SearchConfig(block_widths=SPACE.block_widths, image_sizes=(6, 8), max_parameters=10**6)
    recipe = supernet_recipe(config.model_copy(update={"epochs": 2, "batch_size": 64}), search)
    assert (recipe.batch_size, recipe.accumulation, recipe.preprocessing.image_size) == (192, 3, 8)
    assert (recipe.backbone.kwargs["max_parameters"], recipe.backbone.kwargs["max_multiply_adds"]) == (10**6, None)
    whole = run_training(make_job(name="whole", config=recipe))
    card, _ = trained_with_kills(make_job(name="killed", config=recipe, checkpoint_minutes=0.0), 20, lives=1)
    assert card.digest == whole.digest
    network = open_network(f"{make_job().output_uri}/{whole.generation_id}", torch.device("cpu"))[1]
    assert isinstance(network, ElasticCnn)
    assert network.space == search.at(8)


def trained(rank: int, num_ranks: int, job: TrainingJob) -> GenerationCard | None:
    return train_worker(job, TrailReporter(job.storage_uri, job.name), rank, num_ranks)


def test_two_workers_train_a_supernet_together(make_job: Callable[..., TrainingJob], config: TrainingConfig):
    search = SearchConfig(block_widths=SPACE.block_widths, max_parameters=10**6)
    recipe = supernet_recipe(config.model_copy(update={"epochs": 1}), search)
    card, nothing = on_ranks(2, trained, make_job(config=recipe))
    assert (card.training["workers"], nothing) == (2, None)


@pytest.mark.parametrize("kwargs", [{"depths": [1]}, {"kernels": [3, 4]}, {"kernels": [3, 3, 3]}])
def test_a_small_cnn_whose_blocks_do_not_go_together_is_refused(kwargs):
    spec = BackboneSpec(name="small_cnn", kwargs={"block_widths": [4, 8], **kwargs})
    with pytest.raises(ValueError, match="an odd kernel for each of 2 blocks"):
        build_backbone(spec, 6, 1, 8)
