"""What is shipped: pins that hold, no trace of the machine it was made on, links that lead somewhere."""

import getpass
import re
import socket
import subprocess
import tomllib
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
