"""The Python that README and docs show, run as it is printed: beside a workspace `shop`, pictures and a query."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.flows import tiny

PAGES = sorted([tiny.ROOT / "README.md", *(tiny.ROOT / "docs").rglob("*.md")])
BLOCKS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


def test_readme_and_docs_show_python():
    assert {page.name for page, _, _ in BLOCKS} >= {"README.md", "python.md"}


@pytest.fixture
def shop(workspace_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the pages speak of, with a gallery that serves; the test stands in it."""
    folder = workspace_root.parent
    workspace_root.rename(folder / "shop")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "photos" / f"{number}.png")
    Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "query.jpg")
    monkeypatch.chdir(folder)
    return folder / "shop"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page.name}-{n}" for page, n, _ in BLOCKS])
def test_python_block_runs_as_it_is_printed(page: Path, number, block, shop, flow_server, capsys):
    with temporary_settings({PREFECT_API_URL: flow_server["PREFECT_API_URL"]}):
        exec(compile(block, f"{page.name}-{number}", "exec"), {})
    assert capsys.readouterr().out.strip()
