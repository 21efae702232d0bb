"""What each outcome asks of the gallery: `Rollout.of`, pure, one test per outcome."""

import pytest

from graceful.evaluation.decision import CertificateToIssue, Decision
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.update.rollout import Rollout

GALLERY = GalleryConfig(order="oldest_generation", seed=7, wave_rows=11, unit_rows=5)
PAIRS = (("g002-b", "g002-b"), ("g002-b", "g001-a"))


def rollout_of(outcome, **fields):
    certificates = tuple(CertificateToIssue(query_generation=q, gallery_generation=g) for q, g in PAIRS)
    known = {"summary": "", "candidate": "g002-b", "champion": "g001-a", "certificates": certificates, "reasons": ()}
    decision = Decision(outcome=outcome, **{**known, **fields})
    return Rollout.of(decision, update_key="key", evaluation="evaluation", gallery=GALLERY)


def test_bootstrap_embeds_everything_before_it_serves():
    assert rollout_of("BOOTSTRAP", champion=None) == Rollout(
        "key", "g002-b", "evaluation", 1.0, "random", "all", PAIRS, seed=7, wave_rows=11, unit_rows=5
    )


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_compatible_rollout_embeds_wave_zero_before_it_serves_and_its_fraction_afterwards(fraction):
    assert rollout_of("COMPATIBLE_ROLLOUT", fraction=fraction, order="class_distance") == Rollout(
        "key", "g002-b", "evaluation", fraction, "class_distance", "wave_zero", PAIRS, seed=7, wave_rows=11, unit_rows=5
    )


def test_compatible_rollout_without_an_order_takes_the_configured_one():
    assert rollout_of("COMPATIBLE_ROLLOUT", fraction=0.5).order == "oldest_generation"


def test_full_backfill_embeds_everything_before_it_serves_whatever_fraction_and_order_say():
    assert rollout_of("FULL_BACKFILL", fraction=0.5, order="class_distance") == Rollout(
        "key", "g002-b", "evaluation", 1.0, "random", "all", PAIRS, seed=7, wave_rows=11, unit_rows=5
    )


def test_hold_moves_nothing():
    assert rollout_of("HOLD", fraction=0.5) is None


def test_inconclusive_moves_nothing():
    assert rollout_of("INCONCLUSIVE", fraction=0.5) is None
