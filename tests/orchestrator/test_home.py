from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.orchestrator.errors import InputError, StorageError
from tunesmith.orchestrator.home import Home, default_home, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nothing_is_made_before_make(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "home")
    assert not home.path.exists()
    home.make().make()
    assert [mode(path) for path in (home.path, home.jobs, home.cache, home.trackio)] == [0o700] * 4


def test_an_open_folder_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    assert mode(Home(tmp_path / "home").make().path) == 0o700


def test_default_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "x"))
    assert default_home().path == tmp_path / "x"
    monkeypatch.setenv("TUNESMITH_HOME", "~/y")
    assert default_home().path == Path.home() / "y"
    monkeypatch.delenv("TUNESMITH_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_home().path == tmp_path / "data" / "tunesmith"


@pytest.mark.parametrize(
    "ref", ["../x", "", "j-ABCDEF", "j-abcdef/..", "j-abcdef\n", "/etc", "j-abcde1", "j-abcdef\0", "x" * 400]
)
def test_no_id_leaves_the_home(home: Home, ref: str) -> None:
    with pytest.raises(InputError) as caught:
        home.job(ref)
    assert caught.value.code == "job.unknown"


def test_folders_of_jobs(home: Home) -> None:
    assert home.attempt("j-abcdef", 2) == home.path / "jobs" / "j-abcdef" / "attempts" / "2"
    assert home.job("j-abcdef.1").parent == home.jobs


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StorageError) as caught:
        Home(tmp_path / "home").make()
    assert caught.value.code == "storage.not_a_folder"
    assert "TUNESMITH_HOME" in caught.value.fix


def test_a_shared_folder_is_not_locked_up(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(StorageError) as caught:
        Home(shared).make()
    assert caught.value.code == "storage.shared"
    assert mode(shared) == 0o1777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 12345, 12345)
    with pytest.raises(StorageError) as caught:
        Home(tmp_path / "home").make()
    assert caught.value.code == "storage.foreign"
    assert "12345" in caught.value.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    for folder in (place, *place.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom tunesmith.orchestrator.errors import StorageError\n"
        "from tunesmith.orchestrator.home import Home\nos.setgid(12345); os.setuid(12345)\n"
        "try: Home(Path(sys.argv[1])).make()\nexcept StorageError as error: print(error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place / "home")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "storage.denied"


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o "$1" none "$0"', str(folder), options]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("options", "code"), [("ro", "storage.read_only"), ("size=16k", "storage.full")])
def test_a_disk_that_refuses(tmp_path: Path, options: str, code: str) -> None:
    place = tmp_path / "mount"
    if not mounted(place, options):
        pytest.skip("no mount may be made here")
    program = (
        "import sys\nfrom pathlib import Path\nfrom tunesmith.orchestrator.errors import StorageError\n"
        "from tunesmith.orchestrator.home import Home\n"
        "try: Home(Path(sys.argv[1])).make(); print('made')\n"
        "except StorageError as error: print(error.code)\n"
    )
    script = 'mount -t tmpfs -o "$1" none "$0"; (yes > "$0/ballast") 2>/dev/null; "$2" -c "$3" "$0/home"'
    command = ["unshare", "-m", "sh", "-c", script, str(place), options, sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code


def test_a_long_path_can_be_bound_and_reached(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 60) / ("y" * 60)).make()
    assert len(str(home.socket)) > 108
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(home.address)
        server.listen(1)
        client.connect(Home(home.path).address)
    assert stat.S_ISSOCK(home.socket.stat().st_mode)


def test_write_text_is_private_and_whole(home: Home) -> None:
    path = home.job("j-abcdef") / "plan.json"
    write_text(path, "{}")
    write_text(path, '{"a": 1}')
    assert path.read_text() == '{"a": 1}'
    assert mode(path) == 0o600
    assert [item.name for item in path.parent.iterdir()] == ["plan.json"]


def test_write_text_follows_no_link(home: Home, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (home.path / "request.json").symlink_to(tmp_path / "target")
    write_text(home.path / "request.json", "theirs")
    assert (tmp_path / "target").read_text() == "mine"
