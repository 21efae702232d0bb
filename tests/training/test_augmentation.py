"""Transforms of torchvision and of one's own: the same stream from memory, from processes, and after a resume."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from graceful.errors import UsageError
from graceful.training.augmentation import Transforms, source_look
from graceful.training.generation import Preprocessing
from graceful.training.images import decode, read_payloads
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages
from graceful.training.material import load_material
from graceful.training.starting import check_start

sys.path.insert(0, str(Path(__file__).parent))

from batches import digest_of

MakeJob = Callable[..., TrainingJob]
CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(300)


def augmentation(*entries: dict[str, Any], **fields: Any) -> AugmentationConfig:
    return AugmentationConfig.model_validate({"kind": "transforms", "transforms": entries, **fields})


CROP = {"name": "RandomResizedCrop", "parameters": {"scale": [0.5, 1.0]}}
FLIP = {"name": "RandomHorizontalFlip"}


def noisy() -> Callable[[Tensor], Tensor]:
    """A transform of one's own that draws from every generator there is."""

    def change(image: Tensor) -> Tensor:
        shift = random.randrange(8) + int(np.random.randint(8)) + int(torch.randint(8, ()))
        return image.roll(shift, dims=-1)

    return change


def grey_only() -> Callable[[Tensor], Tensor]:
    """A transform whose result has another shape where an image is coloured."""
    return lambda image: image.float().mean(dim=0, keepdim=True).to(torch.uint8)


def test_an_image_changes_by_seed_epoch_and_row_and_by_nothing_else(preprocessing: Preprocessing) -> None:
    config = augmentation(CROP, FLIP, {"name": "RandAugment"}, {"name": "test_augmentation:noisy"})
    change = Transforms(config, preprocessing)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    rows = list(range(40))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    whole = change(pixels, rows, 3, 1)
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(now[0], state[0])
    assert now[1:] == state[1:]
    torch.manual_seed(99)
    parts = torch.cat([change(pixels[start : start + 7], rows[start : start + 7], 3, 1) for start in range(0, 40, 7)])
    assert torch.equal(parts, whole)
    for seed, epoch, shift in ((4, 1, 0), (3, 2, 0), (3, 1, 1)):
        assert not torch.equal(change(pixels, [row + shift for row in rows], seed, epoch), whole)
    assert len({image.numpy().tobytes() for image in change(pixels[:1].expand(40, -1, -1, -1), rows, 3, 1)}) > 20


def test_a_size_that_is_not_given_is_the_networks_and_crops_cut_from_the_source_size(
    preprocessing: Preprocessing, digits: LabelledImages
) -> None:
    config = augmentation({"name": "CenterCrop"}, source_size=16)
    larger = source_look(config, preprocessing)
    assert (larger.image_size, larger.resized) == (16, 16)
    payload = read_payloads(digits.sources[:1])[0]
    big = torch.from_numpy(decode(payload, larger))
    found = Transforms(config, preprocessing)(big[None], [0], 0, 0)
    assert torch.equal(found[0], big[:, 4:12, 4:12])
    share = preprocessing.model_copy(update={"resize_size": 10})
    assert source_look(config, share).resized == 20


@pytest.mark.parametrize("source_size", [None, 12])
def test_transformed_batches_are_the_same_from_memory_and_from_processes_and_clean_ones_stay_clean(
    make_job: MakeJob, config: TrainingConfig, tmp_path: Path, source_size: int | None
) -> None:
    recipe = config.model_copy(update={"augmentation": augmentation(CROP, FLIP, source_size=source_size)})
    plain = load_material(make_job(), CPU, tmp_path)
    held = load_material(make_job(config=recipe), CPU, tmp_path)
    live_job = make_job(config=recipe.model_copy(update={"pixel_memory_mib": 0}), decoding_processes=1)
    live = load_material(live_job, CPU, tmp_path)
    try:
        first = digest_of(held.batches(0, 0, 4, 0, 1))
        assert digest_of(live.batches(0, 0, 4, 0, 1)) == first
        assert digest_of(live.batches(0, 0, 4, 0, 1, first_step=2)) == first[2:]
        assert digest_of(plain.batches(0, 0, 4, 0, 1)) != first
        for material in (held, live):
            assert digest_of(material.clean(0, 1)) == digest_of(plain.clean(0, 1))
    finally:
        live.close()


def test_a_training_with_transforms_learns(make_job: MakeJob, config: TrainingConfig) -> None:
    turned = augmentation({"name": "RandomRotation", "parameters": {"degrees": 10}})
    lines: list[dict[str, Any]] = []
    card = run_training(make_job(config=config.model_copy(update={"augmentation": turned})), lines.append)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert card.training["epochs"] == 4


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([{"name": "RandomResizeCrop"}], "did you mean RandomResizedCrop"),
        ([{"name": "functional"}], "a name of torchvision.transforms.v2, found 'functional'"),
        ([{"name": "RandomRotation"}], "RandomRotation: expected its own parameters, found {}"),
        ([{"name": "RandomHorizontalFlip", "parameters": {"chance": 1}}], "found {'chance': 1}"),
        (
            [{"name": "Resize", "parameters": {"size": [9, 9]}}],
            "expected a tensor (1, 8, 8) of torch.uint8, found (1, 9",
        ),
        ([{"name": "ToDtype", "parameters": {"dtype": "float"}}], "expected"),
        (
            [{"name": "MixUp", "parameters": {"num_classes": 10}}],
            "expected to change an image of 1 x 8 x 8 bytes",
        ),
        ([{"name": "nowhere:factory"}], "expected an importable nowhere:factory"),
        ([{"name": "test_augmentation:CROP"}], "expected"),
    ],
)
def test_what_cannot_work_is_refused_before_data_are_read(
    make_job: MakeJob, config: TrainingConfig, entries: list[dict[str, Any]], reason: str
) -> None:
    job = make_job(config=config.model_copy(update={"augmentation": augmentation(*entries)}))
    with pytest.raises(UsageError) as refused:
        check_start(job)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_result_of_another_shape_is_refused(preprocessing: Preprocessing) -> None:
    coloured = Preprocessing(image_size=8, channels=3, mean=(0.3,) * 3, std=(0.37,) * 3)
    grey = augmentation({"name": "test_augmentation:grey_only"})
    Transforms(grey, preprocessing)
    with pytest.raises(UsageError, match=r"found \(1, 8, 8\) of torch\.uint8"):
        Transforms(grey, coloured)


def test_transforms_go_with_their_own_kind_alone_and_leave_older_digests_as_they_were() -> None:
    with pytest.raises(ValidationError, match='set kind = "transforms" or leave them out'):
        AugmentationConfig.model_validate({"kind": "affine", "transforms": [FLIP]})
    with pytest.raises(ValidationError, match="name some, or set another kind"):
        AugmentationConfig(kind="transforms")
    assert set(AugmentationConfig(kind="affine").model_dump()) == {
        "kind", "rotation_degrees", "shift", "scale", "padding", "flip",
    }  # fmt: skip
    whole = augmentation(CROP, source_size=12)
    assert AugmentationConfig.model_validate(whole.model_dump(mode="json")) == whole
