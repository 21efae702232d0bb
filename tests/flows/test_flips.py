"""Flips explained: right answer before, wrong answer after, whose vector, why; against a search by plain loops."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from graceful.evaluation.evidence import Question
from graceful.evaluation.outcomes import SERVED, fraction_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.flows.settings.config import ReportConfig
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.evaluations import FLIPS, judge, read_flips, worst_first, write_evaluation
from graceful.flows.store.reports import REPORT_FILE, forget_pictures
from graceful.flows.update.bench import Bench
from graceful.flows.update.explorer import explore
from graceful.flows.update.flips import INDEX, MIXED, MODEL, UNREADABLE_ROWS, explain_flips
from graceful.flows.update.query_log import UNREADABLE
from graceful.indexing.kinds import approximate_rows
from graceful.training.images import UnreadableImageError, thumbnail
from graceful.training.manifest import LabelledImages

POLICY = RolloutPolicy(num_resamples=100, fractions=(0.0, 0.5, 1.0))
IDENTITIES, EACH, WIDTH = 12, 6, 8


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def asks(state: str) -> str:
    """Who queries in a state."""
    return "g1" if state == SERVED else "g2"


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Every image is query and row; g2 is g1 with noise, and the last row cannot be read before it is re-embedded."""
    draw = np.random.default_rng(3)
    labels = np.repeat([f"id{number:02d}" for number in range(IDENTITIES)], EACH)
    labels[-2:] = ""  # distractors: nothing is relevant to them
    names = [f"image{number:02d}" for number in range(len(labels))]
    images = LabelledImages(sources=names, labels=labels, content_sha256=names)
    means = unit(draw.standard_normal((IDENTITIES, WIDTH)))
    first = unit(np.repeat(means, EACH, axis=0) + 0.35 * draw.standard_normal((len(labels), WIDTH)))
    turned = unit(first + 0.5 * draw.standard_normal((1, WIDTH)))  # so that mixed galleries lose some of their own
    second = unit(turned + 0.25 * draw.standard_normal(first.shape))
    vectors = {"g1": first, "g2": second}
    found = Bench(EvaluationSet("set", images, images, labels, {}), vectors, vectors)
    found.measure_pairs([("g2", "g2")])
    found.measure_served("g1", np.full(len(labels), "g1"))
    for query in ("g1", "g2"):
        found.measure_live(query, np.full(len(labels), "g1"), ["g1"])
    before = np.full(len(labels), "g1", dtype=object)
    before[0] = UNREADABLE
    ranking = np.arange(len(labels))
    found.measure_fractions("g2", before.astype(np.str_), ranking, POLICY.fractions)
    return found


@pytest.fixture(scope="module")
def evaluation(bench: Bench) -> Any:
    question = Question(candidate="g2", champion="g1", order="random", live_owners={"g1": 1.0})
    return judge(bench.outcomes(), POLICY, question)


@pytest.fixture(scope="module")
def flips(bench: Bench, evaluation: Any) -> pa.Table:
    return explain_flips(bench, evaluation.outcomes, evaluation.evidence)


def test_every_flip_of_every_state_is_there_and_a_plain_search_gives_the_same_answers(
    bench: Bench, evaluation: Any, flips: pa.Table
) -> None:
    labels, names = bench.evaluation_set.queries.labels, bench.evaluation_set.queries.sources
    expected = []
    for state in map(fraction_state, POLICY.fractions):
        for query in range(len(labels)):
            ranked = {}
            for where in (SERVED, state):
                generation, owners = asks(where), bench.owners[where]
                scores = [
                    (float(bench.gallery_vectors[owners[row]][row] @ bench.query_vectors[generation][query]), row)
                    for row in range(len(labels))
                    if row != query and owners[row] != UNREADABLE
                ]
                ranked[where] = [row for _, row in sorted(scores, reverse=True)]
            right = {
                where: [bool(labels[query]) and labels[row] == labels[query] for row in ranked[where]]
                for where in ranked
            }
            if not right[SERVED][0] or right[state][0]:
                continue
            wrong = ranked[state][0]
            expected.append(
                (
                    names[query], state, 1, right[state].index(True) + 1, names[ranked[SERVED][0]], names[wrong],
                    labels[wrong], bench.owners[state][wrong],
                )
            )  # fmt: skip
    columns = (
        "query", "state", "rank_before", "rank_after", "right_item", "wrong_item", "wrong_identity", "wrong_owner",
    )  # fmt: skip
    found = [tuple(row[name] for name in columns) for row in flips.to_pylist()]
    assert len(expected) > 10
    assert sorted(found) == sorted(expected)
    assert flips.schema.equals(FLIPS)
    for state in evaluation.evidence.states:  # the same count as the report's
        rows = flips.filter(pc.equal(flips["state"], state.state))
        assert rows.num_rows == round(state.nfr * state.num_queries)
    assert set(flips["wrong_owner"].to_pylist()) == {"g1", "g2"}


def test_the_margin_is_by_how_much_the_wrong_answer_is_ahead(bench: Bench, flips: pa.Table) -> None:
    names, labels = bench.evaluation_set.queries.sources, bench.evaluation_set.queries.labels
    for row in flips.to_pylist():
        query, (generation, owners) = names.index(row["query"]), (asks(row["state"]), bench.owners[row["state"]])
        scores = np.array(
            [
                bench.gallery_vectors[o][r] @ bench.query_vectors[generation][query] if o else -9
                for r, o in enumerate(owners)
            ]
        )
        scores[query] = -9
        mine = labels == labels[query]
        assert row["margin"] == pytest.approx(scores[~mine].max() - scores[mine].max(), abs=1e-6)
        assert row["margin"] >= 0


def test_a_flip_is_laid_to_the_model_or_to_the_older_vectors_beside_its_own(flips: pa.Table) -> None:
    full = flips.filter(pc.equal(flips["state"], "fraction/1"))
    lost_in_full = set(full["query"].to_pylist())
    assert set(full["cause"].to_pylist()) == {MODEL}
    mixed = flips.filter(pc.not_equal(flips["state"], "fraction/1"))
    for row in mixed.to_pylist():
        assert row["cause"] == (MODEL if row["query"] in lost_in_full else MIXED)
    assert {MODEL, MIXED} == set(mixed["cause"].to_pylist())


def large_bench(num_identities: int = 1_500) -> Bench:
    """Two rows an identity; the candidate is the champion turned, nearly."""
    draw = np.random.default_rng(5)
    labels = np.repeat([f"id{number:04d}" for number in range(num_identities)], 2)
    names = [f"image{number:04d}" for number in range(len(labels))]
    images = LabelledImages(sources=names, labels=labels, content_sha256=names)
    first = unit(np.repeat(draw.standard_normal((num_identities, WIDTH)), 2, axis=0))
    first = unit(first + 0.1 * draw.standard_normal(first.shape))
    turn = np.linalg.qr(draw.standard_normal((WIDTH, WIDTH)))[0]
    vectors = {"g1": first, "g2": unit(first @ turn + 0.05 * draw.standard_normal(first.shape))}
    found = Bench(EvaluationSet("set", images, images, labels, {}), vectors, vectors)
    found.measure_pairs([("g2", "g2")])
    served = np.full(len(labels), "g1")
    found.measure_served("g1", served)
    for query in ("g1", "g2"):
        found.measure_live(query, served, ["g1"])
    found.measure_fractions("g2", served, np.arange(len(labels)), POLICY.fractions)
    return found


def test_what_only_an_approximate_index_loses_is_laid_to_the_index() -> None:
    bench = large_bench()
    question = Question(candidate="g2", champion="g1", order="random", live_owners={"g1": 1.0})
    found = judge(bench.outcomes(), POLICY, question)
    exact = explain_flips(bench, found.outcomes, found.evidence)
    assert INDEX not in exact["cause"].to_pylist()
    through = explain_flips(bench, found.outcomes, found.evidence, "ivf", 0.5)
    assert through.filter(pc.not_equal(through["cause"], INDEX)).equals(exact)
    rows = [row for row in through.to_pylist() if row["cause"] == INDEX and row["state"] == "fraction/1"]
    assert {row["rank_after"] for row in rows} == {1}  # exact search answers them

    def answered(generation: str) -> set[int]:
        vectors = bench.gallery_vectors[generation]
        proposed = approximate_rows("ivf", vectors, vectors, 2, 0.5)
        assert proposed is not None
        partner = np.arange(len(vectors)) ^ 1
        kept = [[row for row in line if row != query][:1] for query, line in enumerate(proposed.tolist())]
        return {query for query, line in enumerate(kept) if partner[query] in line}

    right = {state: set(np.flatnonzero(bench.first_rank[state] == 1).tolist()) for state in (SERVED, "fraction/1")}
    lost = (right[SERVED] & right["fraction/1"] & answered("g1")) - answered("g2")
    assert len(lost) > 20
    assert {row["query"] for row in rows} == {f"image{query:04d}" for query in lost}
    assert approximate_rows("flat", bench.gallery_vectors["g1"], bench.query_vectors["g1"], 2, 0.5) is None


def test_a_search_whose_answers_cannot_be_read_says_so(bench: Bench) -> None:
    labels = bench.evaluation_set.queries.labels
    gone = Bench(bench.evaluation_set, bench.query_vectors, bench.gallery_vectors)
    gone.first_rank, gone.average_precision = dict(bench.first_rank), dict(bench.average_precision)
    gone.owners = dict(bench.owners)
    owners = np.where(labels == "id03", UNREADABLE, "g1")
    for state, ranks in gone._rank_mixes("g2", {"fraction/0": owners}).items():
        gone._store(state, ranks)
    found = judge(
        gone.outcomes(), POLICY, Question(candidate="g2", champion="g1", order="random", live_owners={"g1": 1})
    )
    rows = explain_flips(gone, found.outcomes, found.evidence).to_pylist()
    lost = [row for row in rows if row["identity"] == "id03" and row["state"] == "fraction/0"]
    assert lost
    assert {(row["cause"], row["rank_after"], row["margin"]) for row in lost} == {(UNREADABLE_ROWS, None, None)}
    assert all(row["wrong_item"] and row["right_item"] for row in lost)


def test_flips_lie_beside_the_evaluation_and_an_older_one_has_none(
    evaluation: Any, flips: pa.Table, tmp_path: Path
) -> None:
    write_evaluation(str(tmp_path / "new"), replace(evaluation, flips=flips))
    assert read_flips(str(tmp_path / "new")).equals(flips)
    write_evaluation(str(tmp_path / "old"), evaluation)
    assert read_flips(str(tmp_path / "old")).equals(FLIPS.empty_table())


def test_the_worst_come_first(flips: pa.Table) -> None:
    rows = worst_first(flips).to_pylist()
    keys = [(row["rank_after"] or 10**9, row["margin"] or 9) for row in rows]
    assert keys == sorted(keys, reverse=True)
    assert sorted(map(str, rows)) == sorted(map(str, flips.to_pylist()))


@pytest.fixture
def pictured(flips: pa.Table, tmp_path: Path) -> pa.Table:
    """The same flips about files that exist: a picture of each image."""
    rows = flips.to_pylist()
    for number, name in enumerate(sorted({row[key] for row in rows for key in ("query", "right_item", "wrong_item")})):
        Image.new("RGB", (60, 30), (number, 99, 7)).save(tmp_path / f"{name}.png")
    for row in rows:
        row.update({key: str(tmp_path / f"{row[key]}.png") for key in ("query", "right_item", "wrong_item")})
    return pa.Table.from_pylist(rows, schema=FLIPS)


def test_the_explorer_shows_the_worst_with_pictures_and_keeps_them_back_where_they_are_private(
    pictured: pa.Table,
) -> None:
    shown = explore(pictured, "fraction/0", ReportConfig(num_flips=3))
    assert shown.num_flips > len(shown.cards) == 3
    assert sum(shown.causes.values()) == shown.num_flips
    ranks = [card.rank_after or 10**9 for card in shown.cards]
    assert ranks == sorted(ranks, reverse=True)
    for card in shown.cards:
        for picture in (card.query_picture, card.right_picture, card.wrong_picture):
            assert picture is not None
            assert picture.data_uri.startswith("data:image/jpeg;base64,")
    private = explore(pictured, "fraction/0", ReportConfig(num_flips=3, pictures=False))
    assert [card.query for card in private.cards] == [card.query for card in shown.cards]
    assert {card.query_picture for card in private.cards} == {None}


def test_a_picture_that_cannot_be_read_is_left_out(pictured: pa.Table) -> None:
    worst = worst_first(pictured.filter(pc.equal(pictured["state"], "fraction/0"))).to_pylist()[0]
    Path(worst["wrong_item"]).write_bytes(b"no picture")
    Path(worst["right_item"]).unlink()
    card = explore(pictured, "fraction/0", ReportConfig(num_flips=1)).cards[0]
    assert (card.right_picture, card.wrong_picture) == (None, None)
    assert card.query_picture is not None


def test_a_forgotten_picture_is_taken_out_of_the_page_and_no_other(pictured: pa.Table, tmp_path: Path) -> None:
    cards = explore(pictured, "fraction/0", ReportConfig(num_flips=2)).cards
    pictures = [card.query_picture for card in cards if card.query_picture is not None]
    tags = [f'<img src="{p.data_uri}" data-content="{p.content_sha256}" alt="x">' for p in pictures]
    (tmp_path / REPORT_FILE).write_text(f"<p>{tags[0]}{tags[1]}{tags[0]}</p>")
    assert forget_pictures(str(tmp_path), [pictures[0].content_sha256]) == 2
    assert (tmp_path / REPORT_FILE).read_text() == f"<p>{tags[1]}</p>"
    assert forget_pictures(str(tmp_path / "nowhere"), ["00"]) == 0


def test_a_thumbnail_is_small_upright_and_the_same_every_time() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (400, 200), (200, 10, 10)).save(buffer, format="JPEG", exif=exif)
    small = thumbnail(buffer.getvalue(), 128)
    assert Image.open(io.BytesIO(small)).size == (64, 128)
    assert small == thumbnail(buffer.getvalue(), 128)
    assert len(small) < 2_000
    with pytest.raises(UnreadableImageError):
        thumbnail(buffer.getvalue()[:200], 128)


def test_no_vector_leaves_with_the_flips(flips: pa.Table) -> None:
    assert not [name for name in flips.schema.names if re.search("vector|embedding", name)]
