"""Continual compatible updates of embedding models: train, evaluate, decide, roll out, roll back.

A workspace: `open`, `create`. Judgement of plain arrays, without a workspace: `judge_outcomes`, `nfr_bound`,
`compatibility_matrix`, `backfill_curve`. What is listed in `__all__` is public; everything else may change.
Importing this package loads nothing but the standard library; a name loads what it needs when it is first used.

>>> import graceful
>>> graceful.nfr_bound([True] * 300, [True] * 300).upper < 0.01  # 0 of 300 queries flipped: below 1 %, at 95 %
True
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graceful.errors import GracefulError
    from graceful.evaluation.arrays import backfill_curve, compatibility_matrix, judge_outcomes
    from graceful.evaluation.backfill import BackfillCurve, smallest_sufficient_fraction
    from graceful.evaluation.bands import DifferenceBands, difference_bands
    from graceful.evaluation.decision import Decision
    from graceful.evaluation.flips import FlipRates, flip_rates, negative_flip_rate, positive_flip_rate
    from graceful.evaluation.intervals import ShareBounds, clopper_pearson, nfr_bound, share_bounds
    from graceful.evaluation.matrix import (
        AdvBctScores,
        CompatibilityMatrix,
        advbct_scores,
        average_compatibility,
        average_multimodel,
        backward_compatibility,
        compatibility_tax,
        criterion,
        forward_compatibility,
        update_gain,
    )
    from graceful.evaluation.outcomes import outcome_from_ranks
    from graceful.evaluation.policy import RolloutPolicy
    from graceful.evaluation.power import (
        identities_for_nfr,
        minimal_detectable_difference,
        nfr_power,
        queries_for_margin,
        queries_for_nfr,
    )
    from graceful.evaluation.retrieval import (
        average_precision_at_r,
        cmc_curve,
        mean_average_precision,
        mean_average_precision_at_r,
        recall_at_k,
    )
    from graceful.flows.api import Report, WorkspaceHandle, create, open
    from graceful.indexing.exact import RelevantRanks, relevant_ranks

    __version__: str

_HOME = {
    "Report": "flows.api",
    "WorkspaceHandle": "flows.api",
    "create": "flows.api",
    "open": "flows.api",
    "backfill_curve": "evaluation.arrays",
    "compatibility_matrix": "evaluation.arrays",
    "judge_outcomes": "evaluation.arrays",
    "BackfillCurve": "evaluation.backfill",
    "smallest_sufficient_fraction": "evaluation.backfill",
    "Decision": "evaluation.decision",
    "FlipRates": "evaluation.flips",
    "flip_rates": "evaluation.flips",
    "negative_flip_rate": "evaluation.flips",
    "positive_flip_rate": "evaluation.flips",
    "DifferenceBands": "evaluation.bands",
    "ShareBounds": "evaluation.intervals",
    "clopper_pearson": "evaluation.intervals",
    "difference_bands": "evaluation.bands",
    "nfr_bound": "evaluation.intervals",
    "share_bounds": "evaluation.intervals",
    "AdvBctScores": "evaluation.matrix",
    "CompatibilityMatrix": "evaluation.matrix",
    "advbct_scores": "evaluation.matrix",
    "average_compatibility": "evaluation.matrix",
    "average_multimodel": "evaluation.matrix",
    "backward_compatibility": "evaluation.matrix",
    "compatibility_tax": "evaluation.matrix",
    "criterion": "evaluation.matrix",
    "forward_compatibility": "evaluation.matrix",
    "update_gain": "evaluation.matrix",
    "outcome_from_ranks": "evaluation.outcomes",
    "RolloutPolicy": "evaluation.policy",
    "identities_for_nfr": "evaluation.power",
    "minimal_detectable_difference": "evaluation.power",
    "nfr_power": "evaluation.power",
    "queries_for_margin": "evaluation.power",
    "queries_for_nfr": "evaluation.power",
    "average_precision_at_r": "evaluation.retrieval",
    "cmc_curve": "evaluation.retrieval",
    "mean_average_precision": "evaluation.retrieval",
    "mean_average_precision_at_r": "evaluation.retrieval",
    "recall_at_k": "evaluation.retrieval",
    "RelevantRanks": "indexing.exact",
    "relevant_ranks": "indexing.exact",
    "GracefulError": "errors",
}

__all__ = [
    "__version__",
    "AdvBctScores",
    "BackfillCurve",
    "CompatibilityMatrix",
    "Decision",
    "DifferenceBands",
    "FlipRates",
    "GracefulError",
    "RelevantRanks",
    "Report",
    "RolloutPolicy",
    "ShareBounds",
    "WorkspaceHandle",
    "advbct_scores",
    "average_compatibility",
    "average_multimodel",
    "average_precision_at_r",
    "backfill_curve",
    "backward_compatibility",
    "clopper_pearson",
    "cmc_curve",
    "compatibility_matrix",
    "compatibility_tax",
    "create",
    "criterion",
    "difference_bands",
    "flip_rates",
    "forward_compatibility",
    "identities_for_nfr",
    "judge_outcomes",
    "mean_average_precision",
    "mean_average_precision_at_r",
    "minimal_detectable_difference",
    "negative_flip_rate",
    "nfr_bound",
    "nfr_power",
    "open",
    "outcome_from_ranks",
    "positive_flip_rate",
    "queries_for_margin",
    "queries_for_nfr",
    "recall_at_k",
    "relevant_ranks",
    "share_bounds",
    "smallest_sufficient_fraction",
    "update_gain",
]

if not TYPE_CHECKING:  # a checker sees the imports above, and reports a name that is not among them

    def __getattr__(name: str) -> Any:
        """Load a public name when it is first used (PEP 562)."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("graceful")
        elif name in _HOME:
            value = getattr(importlib.import_module(f"graceful.{_HOME[name]}"), name)
        else:
            raise AttributeError(f"module 'graceful' has no attribute {name!r}; public names: {', '.join(__all__)}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted(__all__)
