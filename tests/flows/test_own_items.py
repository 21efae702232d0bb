"""A query's own item is known by its content, wherever a copy of it lies; near copies are counted once per set."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graceful.evaluation.outcomes import pair_state
from graceful.flows.store.evaluation_set import (
    EvaluationConfig,
    evaluation_set_uri,
    load_evaluation_set,
    near_copy_share,
    save_evaluation_set,
)
from graceful.flows.update.bench import Bench
from tests.training.test_copies import encoded, picture


def config(queries, gallery) -> EvaluationConfig:
    return EvaluationConfig.model_validate(
        {
            "protocol": "closed_set",
            "queries": {"source": "parquet", "path": str(queries)},
            "gallery": {"source": "parquet", "path": str(gallery)},
        }
    )


def test_a_gallery_of_copies_makes_a_random_model_no_better_than_chance(digits_file, tmp_path) -> None:
    shutil.copy(digits_file, tmp_path / "other.parquet")
    found = load_evaluation_set(config(digits_file, tmp_path / "other.parquet"))
    rng = np.random.default_rng(0)
    random = {digest: rng.standard_normal(16).astype(np.float32) for digest in found.queries.content_sha256}
    vectors = np.array([random[digest] for digest in found.queries.content_sha256])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bench = Bench(found, {"g1": vectors}, {"g1": vectors})
    bench.measure_pairs([("g1", "g1")])
    recall = (bench.first_rank[pair_state("g1", "g1")] == 1).mean()
    assert recall == pytest.approx(bench.chance("recall@k", 1), abs=0.05)
    assert recall < 0.2


def test_near_copies_are_counted_once_and_stored_beside_the_set(tmp_path) -> None:
    def write(name, payloads):
        images = [{"bytes": payload, "path": None} for payload in payloads]
        table = pa.table({"image": images, "label": [str(i % 5) for i in range(len(images))]})
        pq.write_table(table, tmp_path / name)
        return tmp_path / name

    pictures = [picture(seed) for seed in range(20)]
    queries = write("queries.parquet", [encoded(image) for image in pictures])
    gallery = write("gallery.parquet", [encoded(image, "JPEG", quality=70) for image in pictures[:5]])
    found = load_evaluation_set(config(queries, gallery))
    root = str(tmp_path / "workspace")
    save_evaluation_set(root, found)
    assert near_copy_share(root, found) == 0.25
    stored = tmp_path / "workspace" / "evaluation_sets" / found.set_id / "near_copies.json"
    assert evaluation_set_uri(root, found.set_id) in str(stored)
    counts = json.loads(stored.read_text())
    assert counts == {"queries": 20, "with_hash": 20, "with_near_copy": 5}
    gallery.unlink()
    assert near_copy_share(root, found) == 0.25
