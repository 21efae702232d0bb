"""The command line `graceful`: parse, call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 the decision is to hold, 4 it is inconclusive, 5 it waits for a person,
130 interrupted, 143 ended.
"""

# Each module registers its commands; their order here is that of the help.
# isort: off
from graceful.flows.cli import updates, candidates, variants, evalset, gallery, operating, canary
# isort: on

from graceful.flows.cli.entry import main
from graceful.flows.cli.shell import app, reported_errors

__all__ = [
    "app",
    "canary",
    "candidates",
    "evalset",
    "gallery",
    "main",
    "operating",
    "reported_errors",
    "updates",
    "variants",
]
