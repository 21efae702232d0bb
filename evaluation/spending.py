"""Spends the error level over the candidates that are judged on the same evaluation identities.

A bound at level alpha lets a bad candidate pass with probability alpha. Five bad candidates judged on the same queries
let one of them pass up to five times as often, so that a judgement, a *look*, may use a part of alpha only. Before it,
`spent` of alpha is gone (0 to 1), and it takes

    share(spent) = (1 - spent)^2 / (K + 1 - spent)        K = planned_updates

of alpha. From fresh identities on, i looks then spend i / (i + K) in all: half of alpha in the K that are planned, and
never the whole, so that a schedule is not stopped by it. Whatever K is changed to on the way, no share is above what is
left. The shares sum to at most 1, and by the union bound the probability that any of the bad candidates passes is at
most alpha, however alike they are and whichever of them is looked at first.

This is an alpha-spending function (Lan and DeMets, Biometrika 70, 1983) in the number of looks. Its increments are used
as they are: looks at growing data about one hypothesis would be correlated in a known way and could use more of alpha,
candidates are different hypotheses. What is fed back to training is each decision alone; a training that reads which
evaluation queries were lost is outside of what this bounds.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.policy import RolloutPolicy

NOTHING_LEFT = 1e-9
"""A level at which no bound passes."""


class Look(BaseModel):
    """What one judgement of a candidate may use of the error level, fixed before its outcomes are bounded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluation_set: str = Field(description="The evaluation set.")
    number: int = Field(ge=1, description="Which judgement this is of those that shared one of its identities.")
    fresh: float = Field(ge=0, le=1, description="Share of the set that no judgement before has used.")
    spent: float = Field(ge=0, le=1, description="Share of the error level that was spent on the set before.")
    share: float = Field(ge=0, le=1, description="Share of the error level that this judgement uses.")
    planned_updates: int = Field(ge=1, description="planned_updates of the policy that it was taken under.")


def next_share(spent: float, planned_updates: int) -> float:
    """Share of the error level that the next look may use.

    >>> [round(next_share(i / (i + 4), 4), 4) for i in range(5)]  # planned: 4
    [0.2, 0.1333, 0.0952, 0.0714, 0.0556]
    >>> sum(next_share(i / (i + 4), 4) for i in range(10_000)) < 1
    True
    """
    left = 1 - min(max(spent, 0.0), 1.0)
    return left**2 / (planned_updates + left)


def at_level(policy: RolloutPolicy, look: Look | None) -> RolloutPolicy:
    """The policy with the error level of one look: alpha x its share. Outside of a plan, and without one, all of it."""
    if look is None or policy.alpha_spending == "none":
        return policy
    return policy.model_copy(update={"alpha": max(policy.alpha * look.share, NOTHING_LEFT)})


def told(look: Look, policy: RolloutPolicy) -> str:
    """What a look uses and what brings the rest back, for people; `policy` at the level of the look."""
    level = f"{100 * policy.alpha:.3g} %"
    if policy.alpha_spending == "none":
        return (
            f"judgement {look.number} on these evaluation identities, each at the whole error level, {level} "
            "(alpha_spending is none): bad candidates add up"
        )
    return (
        f"judgement {look.number} on these evaluation identities: it uses {100 * look.share:.3g} % of the error level, "
        f"{level}; {100 * look.spent:.3g} % were spent before, and fresh evaluation identities bring them back"
    )
