"""A walk through the whole machine in seconds: synthetic encoders; real gallery, gate, waves, index and lineage.

Every outcome occurs once, by `act.decide_and_act` like in every update. Only the world is made up: training
is replaced by encoders of known geometry (`demo_world`). Written down before the first run and the same for
every candidate: the policy (all defaults), the prices, and the queries. What makes the outcomes differ is what differs
in life: how good a model is, whom it loses, whether its space fits the old one, and how many queries there are.
"""

import functools
import hashlib
import os
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from graceful.errors import UsageError
from graceful.evaluation.cost import CostInputs
from graceful.evaluation.outcomes import SERVED, fraction_state, pair_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.retrieval import metric_of
from graceful.files import join
from graceful.flows.commands.demo_world import SyntheticGeneration, SyntheticModels, labelled
from graceful.flows.search.views import open_view
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.store.evaluation_set import EvaluationSet, save_evaluation_set
from graceful.flows.store.evaluations import Evaluation
from graceful.flows.store.events import Adopted, Decided
from graceful.flows.store.reports import REPORT_FILE
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.act import Case, decide_and_act
from graceful.flows.update.assess import Candidacy, assess, record_decision
from graceful.flows.update.conclude import conclude
from graceful.flows.update.publish import publish
from graceful.flows.update.serving import ingest, rollback
from graceful.indexing.embed import EmbedUnit
from graceful.indexing.reindex import ReindexReport

T = TypeVar("T")

PRODUCTS, PICTURES_EACH, QUERIES_EACH, FEW = 400, 3, 6, 120
POLICY = RolloutPolicy()
"""The defaults. 2,400 queries of 400 products can prove them; FEW cannot, and that is a chapter."""
PRICES = CostInputs(
    rows_per_s=100,  # a small GPU
    num_rows=5_000_000,  # each picture stands for 4,167
    bytes_per_row=96,
    fixed_worker_hours=1.0,
    price_per_worker_hour=3.0,
    price_per_gib_month=0.1,
    value_per_point_day=1.0,  # deliberately little: nobody should have to believe that a point is worth much
    days_until_next_generation=60.0,
)
GALLERY = GalleryConfig(wave_rows=256, unit_rows=256)

# `spread`: how far two pictures of a product lie apart; `noise`: what the model adds to it.
FIRST = SyntheticGeneration("g001-c0ffee", spread=0.48, noise=0.4)
BETTER = SyntheticGeneration("g002-decade", spread=0.48, noise=0.2)
FORGETFUL = SyntheticGeneration(
    "g003-facade", spread=0.3, noise=0.1, lost=frozenset(f"product{number:03d}" for number in range(0, PRODUCTS, 20))
)
ANOTHER_SPACE = SyntheticGeneration("g004-beaded", spread=0.3, noise=0.1, rotation_seed=7)

WIDTH = 80

MEANING = {
    "BOOTSTRAP": (
        "nothing serves yet, so nothing can break: it serves",
        "graceful update, when new pictures have come",
    ),
    "INCONCLUSIVE": (
        "these queries cannot tell whether it is safe; nothing moves",
        "label more identities; or your word: graceful accept, graceful reject",
    ),
    "COMPATIBLE_ROLLOUT": (
        "it serves at once on the old gallery; what pays is re-embedded after",
        "graceful status watches, graceful rollback takes it back",
    ),
    "HOLD": (
        "it would break more than the limits allow, or cannot be judged",
        "graceful flips shows what breaks; train another, or graceful accept",
    ),
    "FULL_BACKFILL": (
        "worth it, but not on old vectors: all is embedded, then it serves",
        "graceful rollback while the old vectors stay; then graceful collect",
    ),
}
"""What each outcome means, and what to do next."""


class FolderInUseError(UsageError):
    """The demo would write into a folder that holds something."""

    exit_code = 2


@dataclass(frozen=True)
class Found:
    """One answer of a search: the item, its score, the generation of its vector, and whether it is the product."""

    item_id: str
    score: float
    generation: str
    right: bool


@dataclass
class DemoResult:
    """What the demo did, in order."""

    root: str
    report: str = ""
    outcomes: list[str] = field(default_factory=list)
    fractions: list[float | None] = field(default_factory=list)
    searches: dict[str, list[Found]] = field(default_factory=dict)
    champion: str = ""
    seconds: float = 0.0


def run_demo(root: str | None, console: Console) -> DemoResult:
    """Walk through every outcome in a new workspace; by default in a temporary folder that stays.

    Raises:
        FolderInUseError: `root` exists and is not empty.
    """
    started = time.monotonic()
    if root is None:
        root = tempfile.mkdtemp(prefix="graceful-demo-")
    elif os.path.exists(root) and (not os.path.isdir(root) or os.listdir(root)):
        raise FolderInUseError(
            f"starting the demo: expected a new or an empty folder, found one in use ({root}); choose another --root"
        )
    demo = Demo(root, Console(width=min(console.width, WIDTH), file=console.file, highlight=False))
    for chapter in (
        demo.begin, demo.bootstrap, demo.too_few_queries, demo.compatible, demo.roll_back, demo.forgetful,
        demo.another_space,
    ):  # fmt: skip
        chapter()
    demo.result.champion = demo.workspace.registry.serving().champion or ""
    demo.result.seconds = time.monotonic() - started
    demo.end()
    return demo.result


class Demo:
    """The story: one method per chapter, in the order in which they are told."""

    def __init__(self, root: str, console: Console) -> None:
        self.console = console
        self.models = SyntheticModels()
        self.workspace = Workspace(root, self.models)
        self.workspace.create()
        self.result = DemoResult(root)
        products = [f"product{number:03d}" for number in range(PRODUCTS)]
        gallery, self.items = labelled(products, [f"shelf{number}" for number in range(PICTURES_EACH)])
        queries, _ = labelled(products, [f"user{number}" for number in range(QUERIES_EACH)])
        self.all_queries = _evaluation_set(queries, gallery)
        few = queries.take(np.arange(0, len(queries), len(queries) // FEW))
        self.few_queries = _evaluation_set(few, gallery)
        self.query = queries.sources[0]
        self._sources = dict(zip(*self.all_queries.images, strict=True))
        self._vectors = functools.cache(self._encode)

    def begin(self) -> None:
        """The shop before it has a model."""
        ingest(self.workspace, self.items)
        self.console.print(f"[bold]Graceful in six chapters[/bold]  (workspace: {self.result.root})", soft_wrap=True)
        self.say(
            f"A shop has {self.items.num_rows:,} pictures of {PRODUCTS} products; customers search with a photo. An "
            "embedding model turns each picture into a vector, and near vectors are the answer. The models here are "
            "synthetic, so that nothing has to be trained; gallery, gate, index and lineage are the real ones."
        )

    def bootstrap(self) -> None:
        """The first generation."""
        self.chapter("The first model")
        evaluation = self.update(FIRST, self.all_queries, "first")
        ranks = evaluation.outcomes.first_rank[pair_state(FIRST.generation_id, FIRST.generation_id)]
        wrong = np.flatnonzero(ranks != 1)
        self.query = str(evaluation.outcomes.query_ids[wrong[0]])
        self.say(
            f"There is nothing to break yet: {FIRST.generation_id} embeds the gallery and serves. It finds the right "
            f"product first in {_percent(_right(evaluation, pair_state(*[FIRST.generation_id] * 2)))} of the searches. "
            "Here is one of the others:"
        )
        self.search("before")

    def too_few_queries(self) -> None:
        """A better model and too little evidence."""
        self.chapter("A better model, and too little evidence")
        evaluation = self.update(BETTER, self.few_queries, "few")
        state = _state(evaluation, 0.0)
        needed = evaluation.decision.queries_needed
        self.say(
            f"{BETTER.generation_id} was judged on {state.num_queries} queries. It looks {_points(state.difference)} "
            f"points better, and {_percent(state.nfr)} of the searches that work today would fail. But with so few "
            f"queries that share may be anything up to {_percent(state.nfr_upper)}, and the limit is "
            f"{_percent(POLICY.max_nfr)}. So nothing moves, and the gate says what would help: "
            + (
                "more queries than anyone has."
                if needed is None
                else f"about {needed:,} more queries, if the rest looks like these."
            )
        )

    def compatible(self) -> None:
        """The same model with enough queries."""
        self.chapter("The same model, and enough evidence")
        evaluation = self.update(BETTER, self.all_queries, "enough")
        now, moved = _right(evaluation, SERVED), _right(evaluation, fraction_state(0.0))
        fraction = evaluation.decision.fraction or 0.0
        later, first = _right(evaluation, fraction_state(fraction)), _state(evaluation, 0.0)
        self.say(
            f"On {first.num_queries:,} queries the gate is sure: its vectors fit the old ones, so that it can search "
            f"the gallery as it is. Right answers: {_percent(now)} today, {_percent(moved)} from the moment it serves, "
            f"{_percent(later)} once {_percent(fraction)} of the gallery is re-embedded. Of the searches that work "
            f"today {_percent(first.nfr)} would fail, surely at most {_percent(first.nfr_upper)} (limit "
            f"{_percent(POLICY.max_nfr)}). The last pictures would cost more than they bring, and stay as they are:"
        )
        self.gallery()
        self.say("The search from before, now:")
        self.search("after")

    def roll_back(self) -> None:
        """Back, without touching data."""
        self.chapter("A phone call: take it back", "ROLLBACK")
        data = self.workspace.gallery.version()
        rollback(self.workspace, reason="demo: the shop wants its old answers back")
        same = self.workspace.gallery.version() == data
        self.say(
            f"One pointer moves, and {self.workspace.registry.serving().champion} serves again. "
            + ("No vector was written or deleted. " if same else "")
            + "The old answer is back, to the digit:"
        )
        self.search("rolled back")

    def forgetful(self) -> None:
        """Better on average, and worse for some."""
        self.chapter("Better on average")
        evaluation = self.update(FORGETFUL, self.all_queries, "forgetful")
        full = _state(evaluation, 1.0)
        self.say(
            f"{FORGETFUL.generation_id} wins {_points(full.difference)} points on average. A leaderboard would ship "
            f"it. But it has forgotten {len(FORGETFUL.lost)} products: {_percent(full.nfr)} of the searches that work "
            f"today would fail (surely at least {_percent(full.nfr_lower)}, limit {_percent(POLICY.max_nfr)}), whoever "
            "looks for one of those, even with the whole gallery re-embedded. Nothing moves."
        )

    def another_space(self) -> None:
        """A new architecture: its vectors mean nothing to the old ones."""
        self.chapter("A model from another world")
        during: list[str] = []
        self.models.before_unit = lambda unit: self._look_during(unit, during)
        evaluation = self.update(ANOTHER_SPACE, self.all_queries, "another")
        self.models.before_unit = lambda unit: None  # noqa: ARG005
        full, old = _state(evaluation, 1.0), evaluation.evidence.certificates[0]
        self.say(
            f"{ANOTHER_SPACE.generation_id} is a new architecture. On the vectors of {old.gallery_generation} its "
            f"queries are {_points(old.difference)} points off: it gets no certificate and may never be scored against "
            f"them. On a gallery of its own it wins {_points(full.difference)} points, "
            f"breaks {_percent(full.nfr)} of what works today, and pays for the work before the next model is due. So "
            f"the whole gallery was embedded first, while {' and then '.join(dict.fromkeys(during))} went on "
            "answering, and then the pointer moved:"
        )
        self.gallery()
        self.search("replaced")

    def end(self) -> None:
        """Where everything lies, and what to try next."""
        root = self.result.root
        self.console.print(f"\n[bold]Done in {self.result.seconds:.1f} seconds.[/bold] Every decision has a page:")
        self.console.print(f"  {self.result.report}", soft_wrap=True)
        self.console.print("Look around:")
        for command in ("status", "report", "rollback"):
            self.console.print(f"  graceful {command} --root {root}", soft_wrap=True)
        self.console.print("Then with training, on digits, and on pictures of your own:")
        for line in ("make quickstart", "graceful init shop --from photos/"):
            self.console.print(f"  {line}", soft_wrap=True)

    def update(self, generation: SyntheticGeneration, evaluation_set: EvaluationSet, key: str) -> Evaluation:
        """One candidate through the gate, as in every update; no training before it."""
        registry = self.workspace.registry
        name, champion = generation.generation_id, registry.serving().champion
        self.models.add(generation)
        if name not in registry.generations():
            registry.record(Adopted(name="synthetic", factory=f"{__name__}:{key}"), generation=name)
        save_evaluation_set(self.workspace.root, evaluation_set)
        update_key, shown = f"demo-{key}", []  # type: str, list[str]

        def judge() -> tuple[Decided, Evaluation]:
            others = tuple(other for other in registry.generations() if other != name)
            candidacy = Candidacy(name, champion, others, POLICY, GALLERY.order, seed=GALLERY.seed, cost=PRICES)
            evaluation = assess(self.workspace, evaluation_set, candidacy, self._cached)
            return record_decision(self.workspace, evaluation, update_key), evaluation

        case = Case(
            workspace=self.workspace,
            update_key=update_key,
            champion=champion,
            gallery=GALLERY,
            judge=judge,
            publish=lambda decided, evaluation: self._publish(decided, evaluation, shown),
            conclude=lambda decision: conclude(self.workspace, update_key, decision),
        )
        decided, evaluation, _ = decide_and_act(case, do=self.step)
        self.result.report = join(self.workspace.evaluation_uri(decided.evaluation), REPORT_FILE)
        self.result.outcomes.append(decided.outcome)
        self.result.fractions.append(evaluation.decision.fraction)
        return evaluation

    def step(self, name: str, act: Callable[[], T]) -> T:
        """Say a step when it is done, with what it came to."""
        result = act()
        said = self._told(name, result)
        if said:
            self.console.print(f"   [dim]{said}[/dim]")
        return result

    def search(self, name: str) -> None:
        """Search as production would: the champion's encoder, the champion's view, the FAISS index."""
        workspace = self.workspace
        champion = workspace.registry.serving().champion
        assert champion is not None
        followed = open_view(workspace, champion)
        vectors, _ = self.models.generations[champion].encode([self.query])
        found = followed.index.search(vectors, 3)
        entries = followed.book.entries(found.revisions)
        product = self.query.removeprefix("synthetic:").split("/")[0]
        item_ids = [entries[int(revision)][0] for revision in found.revisions[0]]
        rows = zip(item_ids, found.scores[0], found.generations[0], strict=True)
        hits = [Found(str(i), float(s), str(g), str(i).startswith(f"{product}-")) for i, s, g in rows]
        self.result.searches[name] = hits
        self.console.print(f"   a customer's photo of {product}, asked of {champion}:")
        for place, hit in enumerate(hits, 1):
            mark = "[green]right[/green]" if hit.right else "[red]wrong[/red]"
            self.console.print(f"     {place}  {hit.score:.4f}  {hit.item_id:<20}  {mark}  (vector: {hit.generation})")

    def gallery(self) -> None:
        """Who owns the rows that the champion reads, as a bar."""
        champion = self.workspace.registry.serving().champion
        assert champion is not None
        view = self.workspace.view(champion)
        for owner, rows in view.rows_by_generation().items():
            bar = "#" * round(30 * rows / view.num_items)
            self.console.print(f"     {owner}  {rows:5,} of {view.num_items:,} pictures  {bar}")

    def chapter(self, title: str, outcome: str = "") -> None:
        """A heading."""
        number = len(self.result.outcomes) + ("rolled back" in self.result.searches) + 1
        self.console.print(f"\n[bold]{number}  {title}[/bold]")
        if outcome:
            self.console.print(f"   [bold cyan]{outcome}[/bold cyan]")

    def say(self, text: str) -> None:
        """A paragraph, set in."""
        indent = " " * 3
        self.console.print(
            textwrap.fill(text, self.console.width, initial_indent=indent, subsequent_indent=indent), markup=False
        )

    def _told(self, name: str, result: Any) -> str:
        if name == "judge":
            meaning, what_next = MEANING[result[0].outcome]
            return (
                f"decided and recorded: [/dim][bold cyan]{result[0].outcome}[/bold cyan]\n     means: {meaning}\n"
                f"     next:  {what_next}[dim]"
            )
        if name in ("embed before the move", "re-index") and isinstance(result, ReindexReport) and result.embedded:
            when = "before it serves" if name == "embed before the move" else f"in {len(result.waves)} waves"
            return f"{result.embedded:,} pictures embedded {when}"
        if name == "move serving state":
            return f"serving: {self.workspace.registry.serving().champion}"
        return ""

    def _publish(self, decided: Decided, evaluation: Evaluation, shown: list[str]) -> None:
        """Once, when all is done: an update publishes twice, and here every page would be drawn twice in seconds."""
        if shown:
            publish(self.workspace, decided, evaluation)
        shown.append(decided.evaluation)

    def _look_during(self, unit: EmbedUnit, during: list[str]) -> None:
        """Who serves, and from whose vectors, while a gallery is being embedded."""
        champion = self.workspace.registry.serving().champion
        assert champion is not None, unit
        owners = {name for name, rows in self.workspace.view(champion).rows_by_generation().items() if rows}
        during.append(champion if owners == {champion} else f"a mix of {', '.join(sorted(owners))}")

    def _cached(self, generation: str, hashes: Any) -> NDArray[np.float32]:
        return self._vectors(generation, tuple(hashes))

    def _encode(self, generation: str, hashes: tuple[str, ...]) -> NDArray[np.float32]:
        return self.models.generations[generation].encode([self._sources[digest] for digest in hashes])[0]


def _evaluation_set(queries: Any, gallery: Any) -> EvaluationSet:
    name = hashlib.sha256("".join([*queries.content_sha256, *gallery.content_sha256]).encode()).hexdigest()[:16]
    return EvaluationSet(name, queries, gallery, queries.labels, {})


def _state(evaluation: Evaluation, fraction: float) -> Any:
    return next(state for state in evaluation.evidence.states if state.fraction == fraction)


def _right(evaluation: Evaluation, state: str) -> float:
    return float(metric_of(evaluation.outcomes, state, POLICY.metric, POLICY.k))


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.1f}".removesuffix(".0") + " %"


def _points(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:+.1f}"
