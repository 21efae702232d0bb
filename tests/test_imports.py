"""The three stages do not know each other, heavy libraries stay where they belong, and nothing imports in circles."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # a cold import of torch takes a minute on a busy machine

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "indexing", "evaluation", "flows")

# Within a package a module imports only modules before it.
ORDER = {
    "training": (
        "training", "training.generation", "training.architecture", "training.choices", "training.choosing",
        "training.job",
        "training.combinations", "training.manifest", "training.images", "training.copies",
        "training.measure", "training.glyphs", "training.materialise", "training.folders", "training.rows",
        "training.known", "training.datasets", "training.texts", "training.records", "training.distributed",
        "training.backbones", "training.libraries", "training.sampling", "training.simplex",
        "training.heads", "training.linear", "training.curvature", "training.probes", "training.text_tower",
        "training.encoder",
        "training.influence", "training.forgetting", "training.supernet",
        "training.predecessors",
        "training.constraints.contract", "training.constraints.bct", "training.constraints.cross_contrast",
        "training.constraints.focal", "training.constraints.hoc", "training.constraints.l2",
        "training.constraints.ldi", "training.constraints.mixbct",
        "training.constraints.oca", "training.constraints.ract", "training.constraints.repulsion",
        "training.constraints", "training.uncertainty", "training.augmentation", "training.pixels", "training.material",
        "training.objective",
        "training.progress", "training.trackers", "training.compiling", "training.pace",
        "training.finishing", "training.mapping", "training.starting", "training.step", "training.weighing",
        "training.validation",
        "training.mixing", "training.resuming",
        "training.loop",
        "training.rehearsal", "training.launch", "training.exporting", "training.search",
    ),
    "indexing": (
        "indexing", "indexing.checked_files", "indexing.columns", "indexing.embedding_files", "indexing.tables",
        "indexing.revisions", "indexing.matching", "indexing.ranking", "indexing.exact", "indexing.leases",
        "indexing.view", "indexing.items", "indexing.gallery", "indexing.planner", "indexing.embed",
        "indexing.embedding_pool", "indexing.reindex", "indexing.maintenance", "indexing.doctor",
        "indexing.selftest", "indexing.cache",
        "indexing.cluster_choice", "indexing.clusters",
        "indexing.derived_files", "indexing.index_choice", "indexing.kinds", "indexing.sidecar",
        "indexing.snapshots", "indexing.parts", "indexing.search", "indexing.following",
    ),
    "evaluation": (
        "evaluation", "evaluation.intervals", "evaluation.watching", "evaluation.bands", "evaluation.changed",
        "evaluation.outcomes", "evaluation.retrieval",
        "evaluation.flips", "evaluation.matrix", "evaluation.debt", "evaluation.backfill",
        "evaluation.power", "evaluation.cost",
        "evaluation.policy", "evaluation.slices", "evaluation.spending", "evaluation.clustering",
        "evaluation.thresholds",
        "evaluation.consumers",
        "evaluation.evidence", "evaluation.differences", "evaluation.certificates", "evaluation.gathering",
        "evaluation.variants",
        "evaluation.guards", "evaluation.needs", "evaluation.decision", "evaluation.planning",
        "evaluation.arrays", "evaluation.ways", "evaluation.captions", "evaluation.headline",
        "evaluation.plots", "evaluation.learning", "evaluation.report",
        "evaluation.label_page",
    ),
    "flows": (
        "flows", "flows.store", "flows.store.items", "flows.store.evalsets", "flows.store.dev_set",
        "flows.store.evaluation_set",
        "flows.store.events", "flows.store.registry", "flows.store.ledger", "flows.store.variants",
        "flows.store.workspace", "flows.store.withdrawn", "flows.store.approvals", "flows.store.canaries",
        "flows.store.claim", "flows.store.reports", "flows.store.evaluations", "flows.store.leaks",
        "flows.store.labels", "flows.store.clusterings", "flows.store.thresholds",
        "flows.settings", "flows.settings.template", "flows.settings.cron", "flows.settings.canary",
        "flows.settings.endpoint", "flows.settings.rollout", "flows.settings.notify",
        "flows.settings.schedule", "flows.settings.variants",
        "flows.settings.config",
        "flows.settings.reference", "flows.settings.inspection", "flows.settings.starter",
        "flows.runtime", "flows.runtime.environment", "flows.runtime.server", "flows.runtime.notify",
        "flows.runtime.progress", "flows.runtime.under_way", "flows.runtime.head_watch",
        "flows.runtime.head",
        "flows.runtime.cluster", "flows.runtime.jobs", "flows.runtime.embedding_job", "flows.runtime.preflight",
        "flows.runtime.job_main", "flows.runtime.encoders",
        "flows.runtime.session", "flows.runtime.flow_ui", "flows.runtime.service",
        "flows.update", "flows.update.query_log", "flows.update.bench", "flows.update.consumers",
        "flows.update.flips", "flows.update.assess", "flows.update.gate",
        "flows.update.serving", "flows.update.canary", "flows.update.rollout", "flows.update.act",
        "flows.update.predecessors",
        "flows.update.freeze",
        "flows.update.learning", "flows.update.train", "flows.update.text_towers",
        "flows.update.variants", "flows.update.architecture",
        "flows.update.judge", "flows.update.conclude",
        "flows.update.diagnosis",
        "flows.update.labelling", "flows.update.foresee",
        "flows.update.consumer_sections",
        "flows.update.explorer", "flows.update.publish", "flows.update.order", "flows.update.replay",
        "flows.update.form", "flows.update.by_hand", "flows.update.flow",
        "flows.search", "flows.search.views", "flows.search.searcher", "flows.search.sharded",
        "flows.search.pauses", "flows.search.batches", "flows.search.answering", "flows.search.looking",
        "flows.search.comparing", "flows.search.watching", "flows.search.beside", "flows.search.refusals",
        "flows.search.bodies", "flows.search.describing", "flows.search.guarding", "flows.search.metrics",
        "flows.search.report_pages", "flows.search.requests", "flows.search.endpoint", "flows.search.http",
        "flows.search.connections", "flows.search.serving",
        "flows.search.replicas", "flows.overlap", "flows.watching", "flows.deployments", "flows.schedule",
        "flows.deploying",
        "flows.commands", "flows.commands.setup", "flows.commands.networks", "flows.commands.check",
        "flows.commands.check_cluster",
        "flows.commands.encoders", "flows.commands.status", "flows.commands.doctor",
        "flows.commands.selftest", "flows.commands.evaluations", "flows.commands.evalset",
        "flows.commands.history", "flows.commands.canary", "flows.commands.debt", "flows.commands.flips",
        "flows.commands.influence",
        "flows.commands.adopt", "flows.commands.accept", "flows.commands.variants",
        "flows.commands.export",
        "flows.commands.images", "flows.commands.plan",
        "flows.commands.clusters", "flows.commands.updates", "flows.commands.forgetting",
        "flows.commands.rehearsal", "flows.commands.suggestions",
        "flows.commands.demo_world", "flows.commands.demo", "flows.api", "flows.terminal", "flows.terminal_debt",
        "flows.terminal_plan", "flows.terminal_canary",
        "flows.cli.signals", "flows.cli.shell", "flows.cli.entry", "flows.cli.updates", "flows.cli.candidates",
        "flows.cli.variants",
        "flows.cli.evalset",
        "flows.cli.gallery", "flows.cli.operating", "flows.cli.canary",
        "flows.cli", "flows.cli.__main__", "flows.cli_reference", "flows.api_reference",
    ),
}  # fmt: skip

# What lies below the stages: bytes, locations and errors, with no noun of the domain in it.
LEAF = ("errors", "files", "processes")
EVERYWHERE = ("numpy", "pydantic", "pydantic_core", *LEAF)
# Library -> modules that may import it; a package stands for all its modules.
ALLOWED = {
    "prefect": (
        "flows.runtime.flow_ui",
        "flows.overlap",
        "flows.watching",
        "flows.deployments",
        "flows.schedule",
        "flows.deploying",
        "flows.update.flow",
        "flows.update.form",
    ),
    "ray": (
        "training.launch",
        "training.search",
        "indexing.embedding_pool",
        "flows.runtime.cluster",
        "flows.runtime.jobs",
        "flows.runtime.preflight",
        "flows.search.sharded",
        "flows.search.replicas",
    ),
    "torch": ("training",),
    "torchvision": ("training",),
    "timm": ("training.backbones",),
    "safetensors": ("training",),
    "sklearn": ("training.materialise", "indexing.clusters"),
    "PIL": ("training.images", "training.copies", "training.known", "training.measure"),
    "cachetools": (
        "training.images",
        "training.copies",
    ),
    "faiss": ("indexing.kinds", "indexing.parts", "indexing.search", "indexing.snapshots"),
    "deltalake": ("indexing.tables",),
    "threadpoolctl": ("indexing.ranking",),
    "xxhash": ("indexing.checked_files", "indexing.derived_files", "indexing.revisions"),
    "pyarrow": ("indexing", "training", "flows"),
    "scipy": ("evaluation", "indexing.clusters"),
    "matplotlib": ("evaluation.plots", "evaluation.learning", "evaluation.report"),
    "onnxruntime": ("training.exporting",),
    "onnxscript": ("training.exporting",),
    "tensorboardX": ("training.trackers",),
    "mlflow": ("training.trackers",),
    "jinja2": ("evaluation.report", "evaluation.label_page"),
    "rich": ("flows",),
    "typer": ("flows.cli", "flows.cli_reference"),
    "fastapi": (
        "flows.search.http",
        "flows.search.endpoint",
        "flows.search.requests",
        "flows.search.report_pages",
        "flows.search.bodies",
        "flows.search.refusals",
    ),
    "starlette": ("flows.search.endpoint", "flows.search.bodies", "flows.search.guarding"),
    "uvicorn": ("flows.search.connections", "flows.search.serving"),
    "h11": ("flows.search.connections",),
    "prometheus_client": ("flows.search.metrics",),
}
FORBIDDEN = {"flows.cli": ("pyarrow", "prefect", "ray", *PACKAGES[:3])}
# Plain Python: an update, a search and a judgement run the same without Prefect.
WITHOUT_PREFECT = (
    "flows.search.searcher", "flows.search.serving", "flows.update.order", "flows.update.replay",
    "flows.commands.status", "flows.commands.demo", "flows.commands.accept", "flows.api",
)  # fmt: skip


def source_of(module: str) -> Path:
    """File of a module; modules are named without `graceful.` here, as the folders are."""
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def all_modules() -> list[str]:
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


MODULES = all_modules()


def imports_of(module: str, *, lazy: bool = True) -> Iterator[str]:
    """Names that a module imports, our own without `graceful.`; without `lazy` only those that importing it imports."""
    for name in _absolute_imports_of(module, lazy):
        own = name.partition(".")[0]
        assert own not in PACKAGES, f"{module} imports {name}: that is a user's package; ours is graceful.{own}"
        yield name.removeprefix("graceful.")


def _absolute_imports_of(module: str, lazy: bool) -> Iterator[str]:
    tree = ast.parse(source_of(module).read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute, found a relative one in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("graceful.") in (*MODULES, *LEAF) else str(node.module)


def may_import(module: str, library: str) -> bool:
    if any(library in forbidden and below(module, place) for place, forbidden in FORBIDDEN.items()):
        return False
    if library in sys.stdlib_module_names or library in EVERYWHERE:
        return True
    if library in PACKAGES:
        return library == module.split(".")[0] or module.startswith("flows.")
    return any(below(module, place) for place in ALLOWED.get(library, ()))


def below(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def describe(module: str) -> str:
    libraries = sorted(name for name in (*PACKAGES, *EVERYWHERE, *ALLOWED) if may_import(module, name))
    return f"{module} may import only {', '.join(libraries)} and the standard library"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_stage_may_import(module):
    lazily_allowed = {*PACKAGES} if below(module, "flows.cli") else set()
    at_top = {name.split(".")[0] for name in imports_of(module, lazy=False)}
    anywhere = {name.split(".")[0] for name in imports_of(module)} - lazily_allowed
    wrong = sorted(name for name in at_top | anywhere if not may_import(module, name))
    assert not wrong, f"{module} imports {', '.join(wrong)}; {describe(module)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_module_imports_only_modules_before_it(package):
    place = {module: number for number, module in enumerate(ORDER[package])}
    unknown = [module for module in MODULES if module.split(".")[0] == package and module not in place]
    assert not unknown, f"{', '.join(unknown)}: say in ORDER where it stands"
    for module in place:
        assert module in MODULES, f"ORDER names {module}, which does not exist"
        later = sorted({name for name in imports_of(module) if place.get(name, -1) > place[module]})
        assert not later, f"{module} imports {', '.join(later)}; it may import only modules before it"


def test_plain_modules_reach_prefect_by_no_way():
    for module in WITHOUT_PREFECT:
        assert module in MODULES, f"WITHOUT_PREFECT names {module}, which does not exist"
        seen, todo = set(), [module]
        while todo:
            current = todo.pop()
            if current in seen:
                continue
            seen.add(current)
            names = set(imports_of(current, lazy=False))
            assert not any(name.split(".")[0] == "prefect" for name in names), f"{module} reaches prefect by {current}"
            todo += [name for name in names if name in MODULES]


def loaded_after(statement: str, *names: str) -> set[str]:
    program = f"import sys; {statement}; print(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=280, check=True
    )
    return set(done.stdout.split())


HEAVY = (
    "torch", "ray", "faiss", "prefect", "pyarrow", "deltalake", "numpy", "scipy", "pydantic", "matplotlib",
    *(f"graceful.{name}" for name in PACKAGES[:3]),
)  # fmt: skip


def test_command_line_imports_nothing_heavy_before_a_command_runs():
    assert loaded_after("import graceful.flows.cli", *HEAVY) == set()


def test_the_package_itself_loads_nothing_until_a_name_is_used():
    assert loaded_after("import graceful; dir(graceful)", *HEAVY, "rich", "graceful.flows") == set()
    loaded = loaded_after("import graceful; graceful.nfr_bound", *HEAVY, "graceful.flows")
    assert loaded == {"numpy", "scipy", "graceful.evaluation"}


def test_the_package_is_imported_in_a_fraction_of_a_second():
    program = "import time; start = time.process_time(); import graceful; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 0.3, "seconds of this processor"


@pytest.mark.parametrize(
    "module", ["status", "doctor", "history", "flips", "setup", "check", "evaluations", "suggestions"]
)
def test_light_command_loads_no_framework(module):
    """status, rollback, delete, collect, history, check, init: they must answer within a second."""
    heavy = ("torch", "ray", "faiss", "prefect", "matplotlib", "torchvision")
    program = f"import graceful.flows.commands.{module}, graceful.flows.terminal"
    assert loaded_after(program, *heavy) == set()


def test_searching_loads_neither_prefect_nor_ray():
    assert loaded_after("import graceful.flows.search.searcher", "prefect", "ray", "torch") == {"torch"}


def test_reading_a_configuration_and_opening_a_workspace_load_no_framework():
    statement = "import graceful.flows.settings.config, graceful.flows.store.workspace, graceful.flows.commands.check"
    assert loaded_after(statement, "torch", "ray", "faiss", "prefect") == set()


def test_the_demo_loads_neither_torch_nor_ray_nor_prefect():
    assert loaded_after("import graceful.flows.commands.demo", "torch", "ray", "prefect", "faiss") == {"faiss"}


def test_judging_stored_outcomes_loads_no_framework():
    assert loaded_after("import graceful.evaluation.decision", "torch", "ray", "faiss", "prefect", "pyarrow") == set()


def test_rules_catch_what_they_forbid():
    assert not may_import("training.loop", "indexing")
    assert not may_import("evaluation.decision", "flows")
    assert not may_import("flows.search.searcher", "prefect")
    assert not may_import("indexing.exact", "torch")
    assert not may_import("flows.cli.gallery", "pyarrow")
    assert may_import("flows.update.flow", "prefect")
    assert "prefect" in describe("flows.update.flow").split(", ")
