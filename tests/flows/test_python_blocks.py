"""The Python that README and docs show, run as it is printed: beside a workspace `shop`, pictures and a query."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
def folder(workspace_root: Path) -> Path:
    """The folder that the pages speak of: a workspace `shop` that serves, photos, and a query."""
    folder = workspace_root.parent
    workspace_root.rename(folder / "shop")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "photos" / f"{number}.png")
    Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "query.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page.name}-{n}" for page, n, _ in BLOCKS])
def test_python_block_runs_as_it_is_printed(page: Path, number, block, folder, flow_server, command_environment):
    """In a process of its own: what Prefect starts in this one would go on reporting to this test's server."""
    (folder / "block.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=folder,
        env={**command_environment, **flow_server},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}:\n{block}\n{done.stderr[-3000:]}"
    assert done.stdout.strip()
