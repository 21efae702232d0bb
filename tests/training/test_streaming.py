"""Images that are decoded while the network runs: the same training as from memory, and nothing left behind."""

import contextlib
import dataclasses
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from graceful.errors import GracefulError
from graceful.files import join
from graceful.processes import process_start
from graceful.training import launch
from graceful.training import pixels as pixels_module
from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef, Preprocessing
from graceful.training.images import UnreadableImageError
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.loop import train_worker
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.material import Material, load_material, open_images
from graceful.training.pace import Meetings
from graceful.training.pixels import OF_ONE_RANK, DecodingStoppedError, Held, Look, Streamed
from graceful.training.progress import TrailReporter
from graceful.training.records import ChangedImagesError, Records, ScratchFullError, write_records

sys.path.insert(0, str(Path(__file__).parent))

from batches import batches_of_rank, digest_of
from ranks import on_ranks

pytestmark = pytest.mark.timeout(300)  # cold imports of torch take minutes on a busy machine

MakeJob = Callable[..., TrainingJob]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def soon_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do not answer fail a test, they do not hang it."""
    monkeypatch.setattr(pixels_module, "STALL_S", 100.0)


@pytest.fixture
def photos(tmp_path: Path) -> LabelledImages:
    """150 small pictures of three classes in files of their own."""
    drawn = np.random.default_rng(0)
    sources, digests = [], []
    for number in range(150):
        path = tmp_path / f"photo-{number:03d}.png"
        Image.fromarray(drawn.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
        sources.append(str(path))
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return LabelledImages(sources, np.array([f"c{number % 3}" for number in range(150)]), digests)


def streamed(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return config.model_copy(update={"pixel_memory_mib": 0, **changes})


def opened(job: TrainingJob, tmp_path: Path, name: str) -> Material:
    folder = tmp_path / name
    folder.mkdir()
    return load_material(job.model_copy(update={"decoding_processes": 2}), CPU, folder)


@pytest.mark.parametrize("where", ["parquet", "files"])
def test_streamed_batches_are_those_of_memory_from_any_step(
    make_job: MakeJob,
    config: TrainingConfig,
    digits: LabelledImages,
    photos: LabelledImages,
    tmp_path: Path,
    where: str,
) -> None:
    images = digits if where == "parquet" else photos
    held = opened(make_job(images=images), tmp_path, "held")
    live = opened(make_job(images=images, config=streamed(config)), tmp_path, "live")
    assert isinstance(held.images, Held)
    assert isinstance(live.images, Streamed)
    try:
        for epoch in (0, 1):
            assert digest_of(live.batches(3, epoch, 2, 0, 1)) == digest_of(held.batches(3, epoch, 2, 0, 1))
        next(live.batches(3, 2, 2, 0, 1))  # left in its midst
        assert digest_of(live.batches(3, 2, 5, 1, 2, first_step=3)) == digest_of(held.batches(3, 2, 5, 1, 2))[3:]
        assert digest_of(live.clean(1, 2)) == digest_of(held.clean(1, 2))
        assert digest_of(live.sample(70, 1, block=40)) == digest_of(held.sample(70, 1, block=40))
    finally:
        live.close()


class Killed(BaseException):
    """Stands for a kill."""


class KilledReporter(TrailReporter):
    """Dies after the first checkpoint within an epoch."""

    def glance(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        super().glance(metrics, state)
        if state is not None and metrics["epoch"] == 1:
            raise Killed


def test_a_streamed_training_ends_with_the_weights_of_one_from_memory_also_after_a_kill_in_an_epoch(
    make_job: MakeJob,
    write_embeddings: Callable[..., str],
    digits: LabelledImages,
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Meetings, "is_due", lambda self: True)
    images = digits.take(range(0, 600, 2))
    short = config.model_copy(update={"epochs": 2, "patience": 2})
    dev = str(tmp_path / "dev.parquet")
    write_manifest(dev, digits.take(range(1, 600, 6)))
    first = make_job(images=images, name="first", config=config.model_copy(update={"epochs": 1}))
    uri = join(first.output_uri, run_training(first).generation_id)
    name = uri.rpartition("/")[2]
    encoder = open_encoder(uri)
    reference = PredecessorRef(
        generation_id=name, generation_uri=uri, embeddings_uri=write_embeddings("cache", encoder(images.sources)[0])
    )
    fields = {
        "images": images,
        "ordinal": 2,
        "parent_uri": uri,
        "predecessors": (reference,),
        "dev": DevPart(manifest_uri=dev),
        "decoding_processes": 1,
    }
    whole = run_training(make_job(name="whole", config=short, **fields))
    job = make_job(name="killed", config=streamed(short), checkpoint_minutes=0, **fields)
    with pytest.raises(Killed):
        train_worker(job, KilledReporter(job.storage_uri, job.name))
    state = TrailReporter(job.storage_uri, job.name).latest()
    assert (state["epoch"], state["step"]) == (1, 1)
    assert run_training(job).digest == whole.digest


def test_the_ranks_of_a_machine_share_what_is_laid_in_files(
    make_job: MakeJob,
    config: TrainingConfig,
    digits: LabelledImages,
    write_embeddings: Callable[..., str],
    tmp_path: Path,
) -> None:
    first = make_job(name="first", config=config.model_copy(update={"epochs": 1}))
    uri = join(first.output_uri, run_training(first).generation_id)
    cache = write_embeddings("cache", np.random.default_rng(0).normal(size=(len(digits), 16)).astype("<f4"))
    reference = PredecessorRef(generation_id=uri.rpartition("/")[2], generation_uri=uri, embeddings_uri=cache)
    fields = {"predecessors": (reference,), "parent_uri": uri, "ordinal": 2, "decoding_processes": 1}
    held = opened(make_job(**fields), tmp_path, "held")
    (digests, files), (others, none) = on_ranks(
        2, batches_of_rank, make_job(config=streamed(config), **fields), str(tmp_path)
    )
    assert files == ["predecessors-16.f32", "records.bin", "starts.i64"]
    assert none == []
    for rank, found in enumerate((digests, others)):
        assert found == digest_of(held.batches(0, 0, 3, rank, 2))


# Refusals


def refusal_of_a_pass(job: TrainingJob, tmp_path: Path, name: str) -> GracefulError:
    with pytest.raises(GracefulError) as raised, contextlib.closing(opened(job, tmp_path, name)) as material:
        digest_of(material.batches(0, 0, 2, 0, 1))
    return raised.value


@pytest.mark.parametrize("where", ["parquet", "files"])
@pytest.mark.parametrize("what", ["changed", "damaged"])
def test_a_damaged_image_is_refused_in_the_words_of_memory(
    make_job: MakeJob,
    config: TrainingConfig,
    digits: LabelledImages,
    photos: LabelledImages,
    tmp_path: Path,
    where: str,
    what: str,
) -> None:
    images = digits if where == "parquet" else photos
    digests = list(images.content_sha256)
    sources = list(images.sources)
    if what == "changed":
        digests[77] = "0" * 64
    else:
        sources[77] = str(tmp_path / "bad.png")
        Path(sources[77]).write_bytes(b"text")
        digests[77] = hashlib.sha256(b"text").hexdigest()
    broken = dataclasses.replace(images, sources=sources, content_sha256=digests)
    held = refusal_of_a_pass(make_job(images=broken), tmp_path, "held")
    live = refusal_of_a_pass(make_job(images=broken, config=streamed(config)), tmp_path, "live")
    assert type(live) is type(held) is (ChangedImagesError if what == "changed" else UnreadableImageError)
    assert str(live) == str(held)
    is_copied = where == "parquet" and what == "changed"  # and met before the first step
    assert hasattr(live, OF_ONE_RANK) == (not is_copied)
    assert not hasattr(held, OF_ONE_RANK)
    assert sources[77] in str(live)


@pytest.mark.parametrize(("num_workers", "is_raised"), [(1, False), (2, True)])
def test_a_refusal_of_one_rank_fails_the_group_and_does_not_leave_the_others_waiting(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, num_workers: int, is_raised: bool
) -> None:
    refusal = ChangedImagesError("one image")
    setattr(refusal, OF_ONE_RANK, True)

    def refuse(*_: Any, **__: Any) -> None:
        raise refusal

    place = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: num_workers)
    monkeypatch.setattr(launch.ray.train, "get_context", lambda: place)
    monkeypatch.setattr(launch.ray.train.torch, "get_device", lambda: CPU)
    monkeypatch.setattr(launch, "train_worker", refuse)
    config = {"job": make_job(num_workers=num_workers).model_dump(mode="json"), "deadline": None}
    if not is_raised:
        assert launch._train_on_ray(config) is refusal
        return
    with pytest.raises(ChangedImagesError):
        launch._train_on_ray(config)


def test_a_scratch_folder_without_room_is_refused_with_what_to_do(
    make_job: MakeJob, config: TrainingConfig, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "records.bin").symlink_to("/dev/full")
    with pytest.raises(ScratchFullError, match="set TMPDIR to a folder with more room"):
        load_material(make_job(config=streamed(config)), CPU, tmp_path / "scratch")


def test_a_decoding_process_that_dies_ends_the_training_with_what_to_do(
    photos: LabelledImages, preprocessing: Preprocessing, tmp_path: Path
) -> None:
    live = stream(photos, preprocessing, tmp_path)
    blocks = live.blocks([torch.arange(150)] * 200)
    next(blocks)
    for process in live._loader._iterator._workers:  # what the system does when memory is short
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DecodingStoppedError, match=r"lower cluster\.decoding_processes"):
        for _ in blocks:
            pass
    live.close()


# What is held, and what is left


def stream(images: LabelledImages, preprocessing: Preprocessing, folder: Path, processes: int = 2) -> Streamed:
    manifest = str(folder / "manifest.parquet")
    write_manifest(manifest, images)
    write_records(manifest, str(folder))
    return Streamed(Records(str(folder), manifest), Look.of(preprocessing), processes, ahead=64)


def test_a_set_is_streamed_where_it_is_larger_than_the_limit(
    make_job: MakeJob, config: TrainingConfig, photos: LabelledImages, tmp_path: Path
) -> None:
    for side, expected in ((83, Held), (84, Streamed)):  # 150 x 83 x 83 bytes are below 1 MiB, 150 x 84 x 84 above
        look = Look.of(config.preprocessing.model_copy(update={"image_size": side}))
        job = make_job(images=photos, config=config.model_copy(update={"pixel_memory_mib": 1}))
        assert isinstance(open_images(job, job.manifest_uri, look, CPU, tmp_path), expected)


def test_what_a_decoding_process_is_given_does_not_grow_with_the_set(photos: LabelledImages, tmp_path: Path) -> None:
    manifest = str(tmp_path / "manifest.parquet")
    write_manifest(manifest, photos)
    write_records(manifest, str(tmp_path))
    records = Records(str(tmp_path), manifest)
    records.read([0, 149])
    assert len(pickle.dumps(records)) < 1000
    records.close()


SCRIPT = """
import os, sys, torch
from pathlib import Path
from graceful.training.generation import Preprocessing
from graceful.training.pixels import Look, Streamed
from graceful.training.records import Records
folder = sys.argv[1]
look = Look.of(Preprocessing(image_size=8, channels=1, mean=(0.3,), std=(0.37,)))
live = Streamed(Records(folder, folder + "/manifest.parquet"), look, 2, ahead=64)
blocks = live.blocks([torch.arange(150)] * 10**6)
next(blocks)
print(*(process.pid for process in live._loader._iterator._workers), flush=True)
for _ in blocks:
    pass
"""


def test_no_decoding_process_outlives_a_killed_training_nor_runs_a_script_again(
    photos: LabelledImages, preprocessing: Preprocessing, tmp_path: Path
) -> None:
    stream(photos, preprocessing, tmp_path).close()
    script = tmp_path / "unguarded.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True) as training:
        try:
            assert training.stdout is not None
            workers = [int(pid) for pid in training.stdout.readline().split()]
            assert len(workers) == 2
            assert all(process_start(pid) for pid in workers)
            server = Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1]
            workers.append(int(server))  # that forked them
        finally:
            training.kill()
    until = time.monotonic() + 30
    while any(process_start(pid) for pid in workers):
        assert time.monotonic() < until, "a decoding process has outlived its training by 30 s"
        time.sleep(0.1)
