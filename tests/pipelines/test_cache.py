"""What is believed of DVC's cache, on real DVC: what is damaged there is read-only, as all that DVC keeps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import cache
from pipelines.errors import BallastError


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=root, check=True)


def tear(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)
    path.chmod(0o444)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a folder and a file in cache and remote."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    made = tmp_path / "project"
    (made / "tables").mkdir(parents=True)
    for n in range(3):
        (made / "tables" / f"{n}.txt").write_text(f"{n} of the table")
    (made / "one.txt").write_text("one file")
    subprocess.run(["git", "init", "-q"], cwd=made, check=True)
    dvc(made, "init")
    dvc(made, "remote", "add", "-d", "there", str(tmp_path / "remote"))
    dvc(made, "add", "tables", "one.txt")
    dvc(made, "push")
    return made


def hashes(root: Path) -> dict[str, str]:
    return {
        name: yaml.safe_load((root / f"{name}.dvc").read_text())["outs"][0]["md5"] for name in ("tables", "one.txt")
    }


def kept(home: Path, suffix: str = "") -> list[Path]:
    return [path for path in home.glob("files/md5/*/*") if path.suffix == suffix]


def test_lacking_is_what_is_damaged_and_it_comes_anew_from_the_remote(root: Path) -> None:
    wanted = hashes(root).values()
    assert cache.lacking(root, wanted) == set()
    for path in kept(root / ".dvc" / "cache"):
        tear(path)
    assert len(cache.lacking(root, wanted)) == 4
    assert kept(root / ".dvc" / "cache") == []
    shutil.rmtree(root / "tables")
    dvc(root, "pull")
    assert cache.lacking(root, wanted) == set()
    assert (root / "tables" / "2.txt").read_text() == "2 of the table"


def test_lacking_does_not_believe_what_came_from_a_damaged_remote(root: Path, tmp_path: Path) -> None:
    for path in kept(tmp_path / "remote"):
        tear(path)
    shutil.rmtree(root / ".dvc" / "cache")
    (root / "one.txt").unlink()
    dvc(root, "pull", "one.txt")
    assert cache.lacking(root, [hashes(root)["one.txt"]]) == {hashes(root)["one.txt"]}


def test_damaged_list_of_a_folder_is_set_aside(root: Path) -> None:
    [listed] = kept(root / ".dvc" / "cache", ".dir")
    tear(listed)
    half = listed.read_bytes()
    assert cache.lacking(root, [hashes(root)["tables"]]) == {hashes(root)["tables"]}
    assert not listed.exists()
    assert (cache.set_aside(root / ".dvc/cache/files/md5") / hashes(root)["tables"]).read_bytes() == half


def test_damaged_database_of_dvc_is_named_and_can_be_deleted(root: Path, tmp_path: Path) -> None:
    [*databases] = (tmp_path / "site").rglob("*.db")
    for path in databases:
        tear(path)
        path.chmod(0o644)
    with pytest.raises(BallastError, match=r"DVC's own database of .* is damaged: .* Delete .*/site/repo, "):
        cache.lacking(root, hashes(root).values())
    shutil.rmtree(tmp_path / "site" / "repo")
    assert cache.lacking(root, hashes(root).values()) == set()
