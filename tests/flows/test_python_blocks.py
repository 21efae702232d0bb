"""The Python that README and docs show, run as it is printed, on a workspace that serves."""

import re
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from graceful.flows.store.workspace import Workspace
from tests.flows import tiny

PAGES = sorted([tiny.ROOT / "README.md", *(tiny.ROOT / "docs").rglob("*.md")])
BLOCKS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


def test_readme_and_docs_show_python():
    assert {page.name for page, _, _ in BLOCKS} >= {"README.md", "python.md"}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page.name}-{n}" for page, n, _ in BLOCKS])
def test_python_block_runs_as_it_is_printed(page: Path, number, block, workspace_root, flow_server, capsys):
    champion = Workspace(str(workspace_root)).registry.serving().champion
    source = Workspace(str(workspace_root)).view(champion).items["source"][0].as_py()
    with temporary_settings({PREFECT_API_URL: flow_server["PREFECT_API_URL"]}):
        exec(compile(block, f"{page.name}-{number}", "exec"), {"root": str(workspace_root), "image": source})
    assert capsys.readouterr().out.strip()
