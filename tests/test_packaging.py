"""What is shipped: pins that hold, no trace of the machine it was made on, links that lead somewhere."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("training", "indexing", "evaluation", "flows")
TEXT_SUFFIXES = (".py", ".md", ".toml", ".txt", ".j2", ".cfg", ".yml", ".yaml", ".json", "")


def pins() -> dict[str, Requirement]:
    return {found.name: found for found in map(Requirement, PROJECT["dependencies"])}


def tracked_files() -> list[Path]:
    """Files that git tracks, or would if they were added now."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("name", sorted(pins()))
def test_installed_version_is_the_pinned_one(name):
    assert pins()[name].specifier.contains(version(name), prereleases=True), f"{name} {version(name)} is installed"


def test_pins_that_keep_prefect_and_ray_alive_are_in_place():
    """Newer FastAPI breaks every flow run, newer SQLAlchemy stops schedules, Ray without `default` has no State API."""
    assert not pins()["fastapi"].specifier.contains("0.151.0")
    assert not pins()["sqlalchemy"].specifier.contains("2.1.0")
    assert not pins()["pyarrow"].specifier.contains("25.0.0")
    assert {"default", "train"} <= pins()["ray"].extras
    extra = [Requirement(text) for text in requires("ray") or []]
    wanted = {found.name for found in extra if found.marker and found.marker.evaluate({"extra": "default"})}
    assert "aiohttp" in wanted
    assert version("aiohttp")


def test_constraints_file_agrees_with_the_pins():
    locked = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, found, number = line.partition("==")
        if found and not line.startswith("#"):
            locked[re.sub(r"[-_.]+", "-", name).lower()] = number.split(";")[0].strip()
    for name, pin in pins().items():
        assert name in locked, f"constraints.txt: {name} is missing"
        assert pin.specifier.contains(locked[name], prereleases=True), f"constraints.txt: {name}=={locked[name]}"


def test_every_package_and_its_data_are_shipped():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(found["package-dir"].values()) == {"graceful", *PACKAGES}
    folders = [file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = {".".join(["graceful", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert {"graceful", *names} == set(found["packages"])
    for package in PACKAGES:
        data = {file.suffix for file in (ROOT / package).rglob("*") if file.is_file()} - {".py", ".pyc"}
        shipped = {Path(pattern).suffix for pattern in found["package-data"].get(f"graceful.{package}", [])}
        assert data <= shipped, f"{package}: {data - shipped} is not in package-data"
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests have no packages: they are imported by path"


def test_console_script_exists():
    import importlib

    module, _, name = PROJECT["scripts"]["graceful"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_no_file_names_a_machine_or_a_folder_of_one():
    names = {socket.gethostname(), socket.getfqdn(), getpass.getuser()} - {"localhost", "root", "runner", "user", ""}
    words = [re.escape(name) for name in names if len(name) > 4]
    # Absolute places of one machine; /tmp and /dev/shm exist everywhere.
    places = r"(?<![\w.:/])/(?:work|home|Users|root)/\w+"
    pattern = re.compile("|".join([*words, places]))
    found = []
    for file in tracked_files():
        if file.suffix not in TEXT_SUFFIXES or file == Path(__file__):
            continue
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_links_in_documents_lead_somewhere():
    broken = []
    for file in tracked_files():
        if file.suffix != ".md":
            continue
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            place, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            linked = (file.parent / place).resolve() if place else file
            if not linked.exists():
                broken.append(f"{file.relative_to(ROOT)}: {target}")
            elif anchor and linked.suffix == ".md" and anchor not in anchors_of(linked):
                broken.append(f"{file.relative_to(ROOT)}: {target} (no such heading)")
    assert not broken, "\n".join(broken)


def anchors_of(file: Path) -> set[str]:
    headings = re.findall(r"^#+\s+(.*)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# The wheel: what a user gets, beside packages of his own that are named like our folders

SHIPPED = ("graceful", *PACKAGES)
SUBSET = (
    "tests/conftest.py", "tests/test_api.py", "tests/evaluation/conftest.py", "tests/evaluation/test_outcomes.py",
    "tests/evaluation/test_retrieval.py", "tests/evaluation/test_matrix.py", "tests/evaluation/test_report.py",
)  # fmt: skip
DECOY = "raise ImportError('this is the package of the user, not that of graceful')\n"
GUARD = """
import os
import sys

import graceful

WHEEL = os.environ["GRACEFUL_WHEEL"]
assert graceful.__file__.startswith(WHEEL), graceful.__file__


def pytest_sessionfinish():
    ours = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "graceful"}
    assert "graceful.evaluation.report" in ours
    assert all(file.startswith(WHEEL) for file in ours.values()), ours
"""


def run_in(folder: Path, *command: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "GRACEFUL_"))}
    done = subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def uv() -> str:
    found = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if found is None:
        pytest.skip("uv is not installed")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves a build folder, and ships what an older one holds."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run_in(source, uv(), "build", "--quiet", "--wheel", "--out-dir", str(source / "dist"), "--python", sys.executable)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel alone; what it depends on comes from this environment."""
    target = tmp_path_factory.mktemp("target")
    run_in(target, uv(), "pip", "install", "--quiet", "--python", sys.executable, "--target", str(target), "--no-deps",
           str(wheel))  # fmt: skip
    return target


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A project that has packages named like our folders, and would break if one of them were imported."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(DECOY)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_wheel_holds_every_module_and_its_data_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"graceful/py.typed", "graceful/evaluation/templates/report.html.j2"} <= names
    expected = {f"graceful/{file.relative_to(ROOT)}" for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    expected |= {f"graceful/{file.name}" for file in (ROOT / "graceful").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_wheel_is_imported_beside_packages_of_the_same_names(installed: Path, users_folder: Path):
    program = (
        "import graceful, graceful.training.datasets, graceful.indexing.gallery, graceful.flows.search.http; "
        "print(graceful.__file__); print(graceful.training.datasets.__file__); print(graceful.__version__)"
    )
    package, module, number = run_in(
        users_folder, sys.executable, "-c", program, PYTHONPATH=str(installed)
    ).splitlines()[-3:]
    assert Path(package).parent == Path(module).parents[1] == installed / "graceful"
    assert number == PROJECT["version"]
    told = run_in(users_folder, sys.executable, "-m", "graceful.flows.cli", "--version", PYTHONPATH=str(installed))
    assert told == f"graceful {PROJECT['version']}\n"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_wheel_passes_tests_beside_packages_of_the_same_names(installed: Path, users_folder: Path):
    for name in SUBSET:
        (users_folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, users_folder / name)
    (users_folder / "conftest.py").write_text(GUARD)
    (users_folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\npythonpath = .\n")
    said = run_in(
        users_folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests",
        PYTHONPATH=str(installed), GRACEFUL_WHEEL=str(installed),
    )  # fmt: skip
    assert re.search(r"\d{2,} passed", said), said[-2000:]
