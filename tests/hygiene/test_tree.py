"""The shape of the tree: file sizes, names, and what has no place in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAP = 600


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        return [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and ".types" not in path.parts]
    names = [name for name in listed.stdout.splitlines() if not name.startswith(".types/")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_file_is_longer_than_the_cap() -> None:
    long = {str(path.relative_to(ROOT)): count for path in tracked("*.py") if (count := lines(path)) > CAP}
    assert long == {}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_class_is_a_manager_helper_or_util() -> None:
    pattern = re.compile(r"^class \w*(Manager|Helper|Util)", re.MULTILINE)
    found = [str(path) for path in tracked("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_remote_code_is_never_trusted() -> None:
    pattern = re.compile(r"trust_remote_code\s*=\s*(?!False)")
    others = [path for path in tracked("*.py") if path != Path(__file__)]
    found = [str(path) for path in others if pattern.search(path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize("root", ["orchestrator", "executors", "graph"])
def test_every_package_folder_has_an_init(root: str) -> None:
    folders = {path.parent for path in tracked(f"{root}/*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
