"""The documentation: links resolve, examples run, variables are listed, pictures show the committed numbers."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import docs_frozen
import docs_images
import history
import pytest

import rnnfast

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    [README, ROOT / "CONTRIBUTING.md", *(ROOT / name / "README.md" for name in ("csrc", "bench", "tests"))]
    + list((ROOT / "docs").rglob("*.md"))
)
NEWEST = docs_images.newest_run()


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_fit(page):
    too_long = [line for line in page.read_text().splitlines() if len(line) > 120]
    assert too_long == []


def test_every_page_is_reached_from_the_index():
    """From the README, by links between pages."""
    reached, new = set(), {README}
    while new:
        page = new.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        new |= {path for path in ((page.parent / target).resolve() for target in targets) if path.exists()} - reached
    assert set(PAGES) <= reached


def test_readme_is_short_and_has_the_two_commands():
    text = README.read_text()
    assert len(text.splitlines()) <= 100
    assert re.search(r"^\s*make bench", text, re.M) and re.search(r"^\s*make test", text, re.M)


def test_readme_examples_run(capsys):
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    if rnnfast.backends()["cpu"] == "available" and not os.environ.get("RNNFAST_BACKEND"):
        assert capsys.readouterr().out == "".join(blocks("text"))


def variables_read() -> set[str]:
    """RNNFAST_* names in quotes, as os.environ, getenv and the like take them, or expanded by a shell script."""
    folders = [ROOT / name for name in ("rnnfast", "csrc", "kernel_build", "tests", "bench", "tools")]
    endings = (".py", ".cpp", ".h", ".cuh", ".cu", ".sh")
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in endings] + [ROOT / "setup.py"]
    found = set()
    for file in files:
        found |= set(re.findall(r"[\"'](RNNFAST_[A-Z0-9_]+)[\"']|\$\{(RNNFAST_[A-Z0-9_]+)", file.read_text()))
    return {name for pair in found for name in pair if name}


def test_environment_variables_are_documented():
    listed = re.findall(r"^\| `(RNNFAST_[A-Z0-9_]+)` \|", (ROOT / "docs" / "environment.md").read_text(), re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) == variables_read()


def test_pictures_show_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs_images.py", "--out", str(tmp_path)])
    docs_images.main()
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["frozen.svg", "speedup.svg", "trend.svg"]
    for name in drawn:
        again = (tmp_path / name).read_text()
        assert again == (docs_images.IMAGES / name).read_text(), f"{name} is old: run `make docs-images`"


def test_numbers_in_the_pages_are_those_of_the_results():
    performance = (ROOT / "docs" / "performance.md").read_text()
    assert docs_images.table(NEWEST) in performance
    assert docs_images.table(docs_images.newest_run("avx2")) in performance
    inference = (ROOT / "docs" / "inference.md").read_text()
    assert all(table(docs_frozen.newest_run()) in inference for table in docs_frozen.TABLES)
    records = json.loads(NEWEST.read_text())
    date = max(one["date"] for one in records if one.get("date"))
    for page in (README.read_text(), performance):
        assert f"torch {records[0]['versions']['torch']}, {date}" in page


def test_history_is_well_formed_and_has_the_newest_runs():
    rows = history.read()
    assert all(set(row) == set(history.COLUMNS) and all(row.values()) for row in rows)
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    for run in (NEWEST, docs_images.newest_run("avx2")):
        missing = [row for row in history.rows_of(json.loads(run.read_text())) if row not in rows]
        assert missing == [], f"python3 tools/history.py {named(run)}"


def test_history_appends_once_and_changes_nothing(tmp_path):
    file = tmp_path / "history.csv"
    rows = history.rows_of(json.loads(NEWEST.read_text()))
    assert history.append(rows[:2], file) == 2
    before = file.read_text()
    assert history.append(rows[:3], file) == 1 and history.append(rows[:3], file) == 0
    assert file.read_text().startswith(before)
    assert history.read(file) == rows[:3]
