"""Local paths, globs, folders and Hub ids are told apart, and what is missing is said with what is near."""

import pytest

from tunesmith.executors.kernel.data import files
from tunesmith.orchestrator.errors import InputError

ROWS = [{"text": "a"}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["open-r1/codeforces-cots", "gsm8k", "my-org/support_v1.2"])
def test_hub_ids(here, name):
    assert files.is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "org/rows.parquet", "./gsm8k", "/data/x", "~/rows", "a/b/c", "data/*.json", "rows.csv.gz"]
)
def test_paths_are_no_hub_ids(here, name):
    assert not files.is_hub_id(name)


def test_a_local_folder_wins_over_a_hub_id(here, write):
    write("org/set/train.jsonl", ROWS)
    assert not files.is_hub_id("org/set")
    assert not files.is_hub_id("org/other"), "org/ is a folder here, so org/other is a path"


def test_a_missing_file_names_its_neighbours(here, write):
    write("trainig.jsonl", ROWS)
    with pytest.raises(InputError) as caught:
        files.locate("training.jsonl")
    assert caught.value.code == "data.missing_file"
    assert "trainig.jsonl" in caught.value.why
    with pytest.raises(InputError, match="does not exist either"):
        files.locate("nowhere/training.jsonl")


def test_a_glob_is_sorted_and_an_empty_one_is_an_error(here, write):
    write("b.jsonl", ROWS)
    write("a.jsonl", ROWS)
    assert [path.name for path in files.locate("*.jsonl")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(InputError) as caught:
        files.locate("*.parquet")
    assert caught.value.code == "data.missing_file"


def test_a_folder_gives_the_files_of_its_split_only(here, write):
    for name in ("d/train-0.jsonl", "d/train-1.jsonl", "d/test.jsonl", "d/README.md", "d/.hidden.jsonl"):
        write(name, ROWS)
    assert [path.name for path in files.locate("d")] == ["train-0.jsonl", "train-1.jsonl"]
    assert [path.name for path in files.locate("d", "test")] == ["test.jsonl"]
    with pytest.raises(InputError) as caught:
        files.locate("d", "validation")
    assert caught.value.code == "data.no_split"
    assert "test, train" in caught.value.why


def test_a_folder_without_splits_gives_all_and_prefers_rows_to_text(here, write):
    write("d/one.jsonl", ROWS)
    write("d/two.csv", "text\nb\n")
    write("d/licence.txt", "words")
    assert [path.name for path in files.locate("d")] == ["one.jsonl", "two.csv"]


def test_a_folder_without_data_is_an_error(here, write):
    write("d/README.md", "words")
    with pytest.raises(InputError) as caught:
        files.locate("d")
    assert caught.value.code == "data.no_files"


def test_a_link_out_of_the_folder_is_refused(here, write):
    outside = write("secret.jsonl", ROWS)
    write("d/one.jsonl", ROWS)
    (here / "d" / "two.jsonl").symlink_to(outside)
    with pytest.raises(InputError) as caught:
        files.locate("d")
    assert caught.value.code == "data.outside_folder"


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_no_name_at_all(name):
    with pytest.raises(InputError):
        files.locate(name)


def test_a_device_is_no_data():
    with pytest.raises(InputError) as caught:
        files.locate("/dev/null")
    assert caught.value.code == "data.unreadable"
