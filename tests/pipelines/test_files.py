from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import files
from pipelines.files import Missing, canonical_json, dvc_md5, read_json, sha256, whole_file, whole_folder, write_json


def test_sha256_is_of_the_files_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_whole_file_appears_only_at_the_end_and_in_new_folders(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    with whole_file(target) as part:
        part.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_whole_file_that_fails_leaves_the_old_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), whole_file(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_whole_folder_replaces_all_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("old", "new"):
        with whole_folder(target) as part:
            (part / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [target]


def test_whole_folder_that_fails_leaves_the_old_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with whole_folder(target) as part:
        (part / "old").touch()
    with pytest.raises(RuntimeError), whole_folder(target) as part:
        (part / "new").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


HALF = """
import os, signal, sys
from pathlib import Path
from pipelines import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as part:
    (part if sys.argv[1] == "whole_file" else part / "a").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def half(what: str, target: Path) -> subprocess.Popen[str]:
    """A process amid writing ``target``."""
    command = [sys.executable, "-c", HALF, what, str(target)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout and writer.stdout.readline() == "writing\n"
    return writer


@pytest.mark.parametrize("what", ["whole_file", "whole_folder"])
def test_what_a_killed_writer_left_goes_when_the_same_is_written_again(tmp_path: Path, what: str) -> None:
    target = tmp_path / "a.b"
    writer = half(what, target)
    writer.kill()
    writer.communicate()
    (tmp_path / ".a.b.0123.old").mkdir()
    (tmp_path / ".a.0123.part").touch()
    assert len(list(tmp_path.iterdir())) == 3
    with getattr(files, what)(target):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a.b", ".a.0123.part"}, "another's is not touched"


@pytest.mark.parametrize("what", ["whole_file", "whole_folder"])
def test_what_is_being_written_stays_when_the_same_is_written_beside_it(tmp_path: Path, what: str) -> None:
    target = tmp_path / "a"
    writer = half(what, target)
    with getattr(files, what)(target):
        pass
    writer.communicate("")
    assert writer.returncode == 0
    assert (target if what == "whole_file" else target / "a").read_text() == "half"
    assert list(tmp_path.iterdir()) == [target]


def test_canonical_json_of_equal_values_is_equal() -> None:
    assert (
        canonical_json({"b": [1, 2.5], "a": "é"})
        == canonical_json({"a": "é", "b": [1, 2.5]})
        == '{"a":"é","b":[1,2.5]}'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([value])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [value])
    assert list(tmp_path.iterdir()) == []


def test_write_json_read_json_round_trip(tmp_path: Path) -> None:
    value = {"z": 1, "a": [None, True, "μ"]}
    write_json(tmp_path / "sub" / "a.json", value)
    assert read_json(tmp_path / "sub" / "a.json") == value
    assert list(read_json(tmp_path / "sub" / "a.json")) == ["z", "a"]
    assert (tmp_path / "sub" / "a.json").read_text().endswith("}\n")


def test_read_json_of_a_file_that_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"result.json is not there. Run the step that writes it."):
        read_json(tmp_path / "result.json")


def test_dvc_md5_is_what_dvc_says_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    for name in ("b/ä 1.txt", "b/a.txt", "a.txt", "b-a.txt", "B.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "one.txt").write_text("one")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "tables", "one.txt"], cwd=tmp_path, check=True)
    for path in (folder, tmp_path / "one.txt"):
        [out] = yaml.safe_load(Path(f"{path}.dvc").read_text())["outs"]
        assert dvc_md5(path) == out["md5"]
