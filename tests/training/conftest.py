"""Small training sets, jobs and one Ray cluster for the tests of training."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.job import AugmentationConfig, ConstraintConfig, TrainingConfig, TrainingJob
from graceful.training.manifest import LabelledImages, write_manifest

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for one another make tiny batches slower, on a busy machine many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """60 images of each digit."""
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    config = DatasetConfig(source="digits", path=str(path), where={"instance": {"max": 59}}, attributes=("instance",))
    return load_images(config)


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return Preprocessing(image_size=8, channels=1, mean=(0.3,), std=(0.37,))


@pytest.fixture
def config(preprocessing: Preprocessing) -> TrainingConfig:
    """A recipe that trains the digits in about a second."""
    return TrainingConfig(
        backbone=BackboneSpec(name="small_cnn", kwargs={"block_widths": [16, 32]}),
        width=16,
        constraints=(
            ConstraintConfig(name="cross_contrast", reduction="sum"),
            ConstraintConfig(name="ract", reduction="mean"),
        ),
        interpolation=0.4,
        mixture=0.0,
        preprocessing=preprocessing,
        augmentation=AugmentationConfig(kind="affine"),
        epochs=4,
        batch_size=64,
        first_max_lr=1e-2,
        max_lr=5e-3,
    )


@pytest.fixture
def make_job(tmp_path: Path, digits: LabelledImages, config: TrainingConfig) -> Callable[..., TrainingJob]:
    """Return a function that makes a job on the digits; keyword arguments replace fields of the job."""

    def make(images: LabelledImages = digits, **fields: Any) -> TrainingJob:
        name = fields.pop("name", "run")
        manifest = str(tmp_path / f"manifest-{len(images)}-{len(set(images.labels.tolist()))}.parquet")
        write_manifest(manifest, images)
        defaults: dict[str, Any] = {
            "config": config,
            "name": name,
            "manifest_uri": manifest,
            "output_uri": str(tmp_path / "generations"),
            "ordinal": 1,
            "storage_uri": str(tmp_path / "runs"),
        }
        return TrainingJob(**{**defaults, **fields})

    return make


@pytest.fixture
def write_embeddings(tmp_path: Path) -> Callable[[str, NDArray[Any]], str]:
    """Return a function that stores embeddings (N, d) as the embedding engine does."""

    def write(name: str, vectors: NDArray[Any]) -> str:
        contiguous = np.ascontiguousarray(vectors)
        kind = pa.binary(contiguous.dtype.itemsize * contiguous.shape[1])
        column = pa.FixedSizeBinaryArray.from_buffers(kind, len(contiguous), [None, pa.py_buffer(contiguous)])
        path = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"embedding": column}), path, use_dictionary=False, compression="none")
        return path

    return write


@pytest.fixture(scope="session")
def ray_environment() -> dict[str, str]:
    return RAY_ENVIRONMENT


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=150 * 2**20, log_to_driver=False)
        yield
        ray.shutdown()
