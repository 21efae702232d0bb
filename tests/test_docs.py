"""The documents are true: every command in them exists, and what they show is what a run prints."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROMPT = "$ "


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def sessions(document: Path) -> list[tuple[str, list[str]]]:
    """Commands of the console blocks, each with the lines of output below it."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(document, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(PROMPT):
                found.append((line.removeprefix(PROMPT).strip(), []))
            elif found:
                found[-1][1].append(line)
    return found


def graceful_commands(document: Path) -> list[str]:
    """Commands in console blocks and in code spans, without comments."""
    spans = re.findall(r"`(graceful [a-z][^`]*)`", document.read_text())
    shown = [command for command, _ in sessions(document) if command.startswith("graceful ")]
    return list(dict.fromkeys([*shown, *(re.sub(r"\s+", " ", span) for span in spans)]))


CASES = [(document, command) for document in DOCUMENTS for command in graceful_commands(document)]


def test_a_command_line_is_taken_apart_as_a_shell_would(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(
        "```console\n$ graceful update \\\n    --json\nServing g1\n$ ls\n```\nAlso `graceful status`.\n"
    )
    assert sessions(document) == [("graceful update      --json", ["Serving g1"]), ("ls", [])]
    assert graceful_commands(document) == ["graceful update      --json", "graceful status"]


@pytest.mark.parametrize(
    "command", ["graceful fly", "graceful update --wings", "graceful search a b", "graceful decide"]
)
def test_wrong_command_would_be_found(command):
    with pytest.raises(AssertionError):
        check_command(command)


TOML = [(document, block) for document in DOCUMENTS for block in blocks(document, "toml")]


@pytest.mark.parametrize(("document", "block"), TOML, ids=[document.name for document, _ in TOML])
def test_a_piece_of_configuration_in_a_document_is_accepted(document, block, tmp_path):
    from graceful.flows.settings.config import load_config

    whole = tmp_path / "graceful.toml"
    shown = tomllib.loads(block)
    example = (ROOT / "examples" / "glyphs.toml").read_text()
    assert not set(shown) & {"policy", "gallery", "cluster"}, "the example has these tables already: test them here"
    whole.write_text(f"{example}\n{block}")
    load_config(whole, str(tmp_path))


@pytest.mark.parametrize(("document", "command"), CASES, ids=[f"{d.name}: {c}" for d, c in CASES])
def test_command_in_a_document_exists_with_its_options(document, command):
    check_command(command, whole=command in [shown for shown, _ in sessions(document)])


def check_command(command: str, whole: bool = True) -> None:
    """Parse a command as the command line would; carry nothing out. Not `whole`: arguments may be left out."""
    from graceful.flows.cli import app

    words = shlex.split(command, comments=True)[1:]
    for end in ("|", "&&", ">", ";"):
        words = words[: words.index(end)] if end in words else words
    commands = typer.main.get_command(app).commands
    if words[0] == "--help":
        return
    assert words[0] in commands, f"graceful {words[0]} is no command; there are {', '.join(sorted(commands))}"
    found = commands[words[0]]
    if hasattr(found, "commands"):  # a group: its second word is the command
        second = words[1] if len(words) > 1 else "nothing"
        assert second in found.commands, f"graceful {words[0]} has {', '.join(sorted(found.commands))}, not {second}"
        found, words = found.commands[second], [" ".join(words[:2]), *words[2:]]
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = [word.split("=")[0] for word in words[1:] if word.startswith("-") and not word.lstrip("-").isdigit()]
    unknown = [option for option in options if option not in known and option != "--help"]
    assert not unknown, f"graceful {words[0]} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
    if not whole:
        return
    try:
        with found.make_context(words[0], list(words[1:])):
            pass
    except Exception as error:  # typer carries its own copy of click's errors
        if not hasattr(error, "format_message"):
            raise
        raise AssertionError(f"{command}: {error.format_message()}") from None


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_make_targets_and_files_in_a_document_exist(document):
    text = document.read_text()
    wanted = set(re.findall(r"`make ([a-z][\w-]*)`", text))
    wanted |= {command.split()[1] for command, _ in sessions(document) if re.match(r"make [a-z]", command)}
    assert wanted <= make_targets(), f"make has no target {wanted - make_targets()}"
    places = re.findall(r"`((?:examples|docs|benchmarks|tests|flows|training|indexing|evaluation)/[\w./-]+)`", text)
    missing = sorted({place for place in places if not (ROOT / place).exists()})
    assert not missing, f"{document.name} names {', '.join(missing)}"


def quickstart() -> list[str]:
    """Output of the quickstart as the README shows it: below the command, or in the block that follows it."""
    readme = ROOT / "README.md"
    if not readme.exists() or "<!-- quickstart -->" in readme.read_text():
        pytest.skip("README.md does not show the quickstart's output yet")
    section = readme.read_text().partition("$ make quickstart\n")[2].partition("\n## ")[0]
    assert section, "README.md: expected a console block with '$ make quickstart', found none"
    below, _, rest = section.partition("```")
    following = re.search(r"^```\w*\n(.*?)^```", rest, flags=re.DOTALL | re.MULTILINE)
    output = below if below.strip() else (following.group(1) if following else "")
    assert output.strip(), "README.md: expected the quickstart's output below its command, found none"
    return [line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith(PROMPT)]


NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"


def shape(line: str) -> str:
    """A line without what differs from machine to machine: numbers, digests, places, and the width of columns."""
    line = re.sub(r"g(\d{3})-[0-9a-f]{6}", r"g\1-#", line)
    line = re.sub(r"\S*/\S*", "PLACE", line)
    line = re.sub(r"COMPATIBLE_ROLLOUT|FULL_BACKFILL|INCONCLUSIVE|HOLD|BOOTSTRAP", "OUTCOME", line)
    line = re.sub(rf"(?<![\w]){NUMBER}[+-]?(?!\w)", "N", line)
    return " ".join(line.split())


def test_shape_of_a_line_forgets_numbers_and_keeps_words():
    first = shape("g002-9f2c1a  6 x label, 480 images  |  self-test 81.2 %  |  HOLD  |  12 s")
    assert first == shape("g002-000000  8 x label, 1,640 images | self-test 9.0 % | INCONCLUSIVE | 7 s")
    assert first != shape("g002-9f2c1a  6 x label, 480 images  |  recall 81.2 %  |  HOLD  |  12 s")
    assert shape("g002  95.4+  97.0") == shape("g002 1.0- 2.0")


def test_quickstart_shows_what_a_run_prints():
    """The block is rendered again from a result of the same shape: same lines, other numbers."""
    from rich.console import Console

    shown = quickstart()
    from graceful.flows.settings.config import load_config
    from graceful.flows.terminal import print_replay
    from graceful.flows.update.replay import ControlResult, GenerationLine, ReplayResult, line_text

    config = load_config(ROOT / "examples" / "glyphs.toml", "/w")
    assert config.replay is not None
    names = [f"g{place + 1:03d}-00000{place}" for place in range(len(config.replay.counts))]
    square = [[0.5 for _ in names] for _ in names]
    lower = [[0.5 if column <= row else None for column in range(len(names))] for row in range(len(names))]
    lines = [
        GenerationLine(
            candidate=name, outcome="HOLD", summary="", fraction=None, overridden=place > 0, num_classes=4,
            num_training_images=320, self_test=0.5, served_before=None, served_after=None,
            nfr=None if place == 0 else 0.1, tax_points=None, seconds=1.0,
        )
        for place, name in enumerate(names)
    ]  # fmt: skip
    controls = [
        ControlResult(name=name, matrix=lower, nfr_between_neighbours=[0.1], ac=0.5, am=0.5, seconds=1.0)
        for name in config.replay.controls
    ]
    result = ReplayResult(
        root="/w", lines=lines, generations=names, matrix=lower, nfr=square, classification_nfr=square, ac=1.0, am=0.5,
        controls=controls, champion=names[-1], report="/w/evaluations/x/report.html", seconds=1.0,
    )  # fmt: skip
    with Console(width=200, file=open("/dev/null", "w"), record=True) as console:
        print_replay(console, result)
    printed = {shape(line) for line in console.export_text().splitlines() if line.strip()}
    for line in shown:
        words = shape(line)
        if re.match(r"g\d{3}-# ", words):  # one line per generation: the parts depend on what was decided
            parts = {part.split(" N")[0] for part in words.split(" | ")[1:]}
            assert parts & {"self-test"}, line
            assert re.match(r"g\d{3}-# N x \w+, N images", words), line
            continue
        assert words in printed or any(words and words in candidate for candidate in printed), (
            f"README.md shows {line!r}, a run prints no such line:\n" + "\n".join(sorted(printed))
        )
    assert len([line for line in shown if re.match(r"\s*g\d{3}-", line)]) == len(names)
    assert "N x alphabet" in shape(line_text(lines[0], 4, "alphabet"))


def test_measured_tables_are_those_of_the_stored_results():
    from benchmarks.tables import with_tables

    for page, num_tables in (
        ("operation.md", 3),
        ("results.md", 5),
        ("scale.md", 1),
        ("statistics.md", 1),
        ("comparison.md", 9),
        ("howto/congruent.md", 2),
        ("howto/edge.md", 4),
    ):
        text = (ROOT / "docs" / page).read_text()
        assert text.count("<!-- end of") == num_tables
        assert with_tables(text) == text, "run 'python -m benchmarks.tables'"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'graceful[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    loading = r"""<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=["']((?:https?:)?//[^"']+)"""
    for page in pages:
        assert re.findall(loading, page.read_text()) == [], f"{page.name} loads something from elsewhere"
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet.name
