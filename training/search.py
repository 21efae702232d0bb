"""The search for an architecture on Ray Tune: one super-net, whose parts are measured on the dev part one by one.

What is measured is a network of its own: it has a copy of its part of the weights, batch norm calibrated on clean
training images, and images decoded at its own size. Trials are processes that open the super-net once. Every measured
candidate is handed out as it comes, and a search that is given them goes on after them: Ray's own record of the
experiment is not read.
"""

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from ray.tune.search import Searcher

from graceful.errors import GracefulError, UsageError
from graceful.training.architecture import Architecture, Candidate, Cost, SearchConfig, Space, propose
from graceful.training.backbones import build_backbone
from graceful.training.encoder import arithmetic, embed, open_network
from graceful.training.exporting import latency_ms
from graceful.training.finishing import calibrate
from graceful.training.generation import Preprocessing, ordinal_of
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.manifest import read_manifest
from graceful.training.material import Batch
from graceful.training.pixels import decode_all
from graceful.training.supernet import ElasticCnn
from graceful.training.validation import CALIBRATED_AT_EPOCHS, Dev, load_dev

_QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
_CANDIDATE = "candidate"


class ArchitectureSearchError(GracefulError):
    """A network could not be measured."""


def search(
    job: TrainingJob,
    supernet_uri: str,
    config: SearchConfig,
    measured: Sequence[Candidate],
    on_candidate: Callable[[Candidate], None],
) -> list[Candidate]:
    """Measure networks until there are `config.evaluations`, those of before counted; return all, in order.

    `job` is the one that trained the super-net, with the dev part that is measured on; its latest dev predecessor is
    the generation whose vectors are searched. Fewer are measured where the space has no more within the limits. Ray is
    started or joined by the caller.

    Raises: UsageError where nothing in the space is within the limits, ArchitectureSearchError.
    """
    space = _space_of(supernet_uri)
    costs = functools.cache(functools.partial(cost_of, job.config, timed=config.max_latency_ms is not None))
    excess = config.excess(costs(space.smallest))
    if excess:
        raise UsageError(
            f"searching an architecture: expected a network of the space within the limits, found that the smallest "
            f"has {excess}; raise the limit, or add smaller block_widths, depths, kernels or image_sizes"
        )
    proposals = _Proposals(space, config, list(measured), costs, job.config.seed, on_candidate)
    remaining = config.evaluations - len(measured)
    if remaining <= 0:
        return proposals.measured
    os.environ.update(_QUIET)
    folder = tempfile.mkdtemp(prefix="graceful-search-")
    trial = tune.with_parameters(_Trial, job=job.model_dump(mode="json"), supernet_uri=supernet_uri)
    resources = {"CPU": float(job.cpus_per_worker), **({"GPU": 1.0} if job.use_gpu else {}), **job.resources}
    try:
        grid = tune.Tuner(
            tune.with_resources(trial, resources),
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                num_samples=remaining,
                max_concurrent_trials=max(1, job.num_workers),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="search",
                verbose=0,
                failure_config=tune.FailureConfig(fail_fast=True),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if grid.errors:
        lines = [line for line in str(grid.errors[0]).splitlines() if line.strip()]
        raise ArchitectureSearchError(
            f"searching an architecture: expected every network to be measured, found {lines[-1].strip()}; run it "
            f"again to go on after the {len(proposals.measured)} that were"
        )
    return proposals.measured


def cost_of(config: TrainingConfig, architecture: Architecture, timed: bool) -> Cost:
    """Return what one image costs a network of this recipe's input and width; `timed`: the latency too.

    Latency is that of PyTorch in this process, with its threads, from decoded pixels to a vector; median of 20.
    """
    preprocessing = config.preprocessing.at_size(architecture.image_size)
    channels, size = preprocessing.channels, preprocessing.image_size

    def latency() -> float:
        network = build_backbone(architecture.backbone, config.width, channels, size).eval()
        cpu = torch.device("cpu")

        def run(pixels: np.ndarray) -> np.ndarray:
            return embed(network, torch.from_numpy(pixels), preprocessing, cpu, None).numpy()

        return latency_ms(run, np.zeros((1, channels, size, size), np.uint8))

    return Cost(
        multiply_adds=architecture.multiply_adds(channels, config.width),
        num_parameters=architecture.num_parameters(channels, config.width),
        latency_ms=latency() if timed else None,
    )


class Scorer:
    """Measures parts of a super-net. Opens images of a size when the first network of that size is measured."""

    def __init__(self, job: TrainingJob, supernet_uri: str, scratch: Path) -> None:
        assert job.dev is not None, "the caller gives one"
        self._job, self._scratch = job, scratch
        self._device = torch.device("cuda" if job.use_gpu and torch.cuda.is_available() else "cpu")
        self._dtype = arithmetic(job.config.arithmetic, self._device)
        network = open_network(supernet_uri, torch.device("cpu"))[1]
        assert isinstance(network, ElasticCnn)
        self._supernet = network
        self._cloud = max((reference.generation_id for reference in job.dev.predecessors), key=ordinal_of)
        self._opened: dict[int, tuple[Preprocessing, list[Batch], Dev]] = {}

    def measure(self, architecture: Architecture, cost: Cost) -> Candidate:
        """Return recall@1 on the dev part of a network against itself and against the generation."""
        preprocessing, sample, dev = self._images(architecture.image_size)
        started = time.process_time()
        network = self._supernet.part(architecture).requires_grad_(False)
        network.to(device=self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        calibrate(network, sample, preprocessing, self._device, self._dtype)
        vectors = dev.vectors(network, preprocessing, self._device, self._dtype)
        own, theirs = (dev.right(vectors, of).double().mean() for of in (vectors, dev.references[self._cloud]))
        return Candidate(
            architecture=architecture,
            cost=cost,
            self_test=float(own),
            cross_test=float(theirs),
            seconds=round(time.process_time() - started, 4),
        )

    def close(self) -> None:
        """End what decodes the images."""
        for _, _, dev in self._opened.values():
            dev.images.close()

    def _images(self, size: int) -> tuple[Preprocessing, list[Batch], Dev]:
        """Preprocessing, the sample for batch norm, and the dev part of an input size."""
        if size not in self._opened:
            config = self._job.config
            preprocessing = config.preprocessing.at_size(size)
            images = read_manifest(self._job.manifest_uri)
            generator = torch.Generator().manual_seed(config.seed)
            number = min(config.calibration_images, CALIBRATED_AT_EPOCHS)
            rows = torch.randperm(len(images), generator=generator)[:number]
            pixels = decode_all(images.take(rows.numpy()), preprocessing)
            blocks = torch.arange(len(rows)).tensor_split(max(1, len(rows) // 256))
            sample = [Batch(rows[block], torch.zeros(len(block)), pixels[block], len(block)) for block in blocks]
            folder = self._scratch / str(size)
            folder.mkdir()
            resized = config.model_copy(update={"preprocessing": preprocessing})
            dev = load_dev(self._job.model_copy(update={"config": resized}), self._device, folder)
            assert dev is not None
            self._opened[size] = preprocessing, sample, dev
        return self._opened[size]


class _Trial(tune.Trainable):
    """One network to measure; Ray keeps the process for the next one."""

    def setup(self, config: dict[str, Any], job: dict[str, Any], supernet_uri: str) -> None:  # type: ignore[override]
        self._opened = ExitStack()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        scratch = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="graceful-search-")))
        self._scorer = Scorer(TrainingJob.model_validate(job), supernet_uri, scratch)
        self._opened.callback(self._scorer.close)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._asked = new_config
        return True

    def step(self) -> dict[str, Any]:
        architecture = Architecture.model_validate(self._asked["architecture"])
        found = self._scorer.measure(architecture, Cost.model_validate(self._asked["cost"]))
        return {_CANDIDATE: found.model_dump_json(), "done": True}

    def cleanup(self) -> None:
        self._opened.close()


class _Proposals(Searcher):
    """What Ray Tune asks for the next network, and tells what was measured."""

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        measured: list[Candidate],
        costs: Callable[[Architecture], Cost],
        seed: int,
        on_candidate: Callable[[Candidate], None],
    ) -> None:
        super().__init__()
        self.measured = measured
        self._space, self._config, self._costs, self._seed = space, config, costs, seed
        self._on_candidate = on_candidate
        self._pending: dict[str, Architecture] = {}

    def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
        return Searcher, ()  # Ray writes down what a search was asked with; what is gone on from is the caller's

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        found = propose(
            self._space,
            self._config,
            self.measured,
            self._pending.values(),
            lambda architecture: not self._config.excess(self._costs(architecture)),
            self._seed,
        )
        if found is None:
            return Searcher.FINISHED
        self._pending[trial_id] = found
        return {"architecture": found.model_dump(mode="json"), "cost": self._costs(found).model_dump(mode="json")}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._pending.pop(trial_id, None)
        if result and not error:
            candidate = Candidate.model_validate_json(result[_CANDIDATE])
            self.measured.append(candidate)
            self._on_candidate(candidate)


def _space_of(supernet_uri: str) -> Space:
    network = open_network(supernet_uri, torch.device("cpu"))[1]
    assert isinstance(network, ElasticCnn)
    return network.space
