"""Workspaces that travel, with real git and real DVC: a toy project on machines that share two remotes and no disk.

tests/e2e/test_travel.py takes the real steps the same way.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from pipelines import exporter, facts, places, refs, travel, workspace
from pipelines import run as runner
from pipelines.errors import BallastError, TryAgain
from pipelines.remote import Remote

PROJECT = Path(__file__).resolve().parents[2]
MARCH = date(2024, 3, 1)
CHAIN = ("settle", "land", "ingest", "validate", "score", "drift", "policy")

# A step of the toy: what it writes is a hash of all that it has read, so that what did not come with it shows.
TOY = """
import hashlib, json, os, sys
from pathlib import Path

name, *reads = sys.argv[1:]
out, var, landing = Path("data", name), Path(os.environ["BALLAST_VAR"]), Path(os.environ["BALLAST_LANDING"])
out.mkdir(parents=True, exist_ok=True)
(var / f"{name}.runs").open("a").write("x")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def digest(paths):
    return hashlib.sha256("".join(f"{path.name} {path.read_text()}" for path in sorted(paths)).encode()).hexdigest()


places = [Path("data", read) for read in reads]
seen = digest(path for place in places for path in ([place] if place.is_file() else place.rglob("*.*")))
result = {"summary": f"{name} of {seen[:8]} {Path('params.yaml').read_text()}"}
if name == "land":
    text = Path(os.environ["BALLAST_SOURCE"], "rows").read_text()
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    write(landing / "objects" / sha256[:2] / f"{sha256[2:]}.parquet", text)
    piece = {"last": text, "until": "2024-03-01T00:00:00+00:00", "partitions": [{"sha256": sha256}]}
    write(landing / "index" / "toy.json", json.dumps({"toy": {"settings": {"all": piece}}}) + "\\n")
    write(out / "manifest.json", json.dumps({"sha256": sha256}))
if name == "ingest":
    sha256 = json.loads(Path("data/land/manifest.json").read_text())["sha256"]
    write(out / "tables" / "a.parquet", (landing / "objects" / sha256[:2] / f"{sha256[2:]}.parquet").read_text())
if name == "score":
    day = int(os.environ["BALLAST_RUN"][1:])
    result |= {"version": 1, "start": f"2024-02-0{day}", "end": f"2024-02-0{day + 2}"}
    write(var / "predictions" / f"date=2024-02-0{day}" / "v1.parquet", f"{day} {seen}")
    (var / "predictions" / f"date=2024-02-0{day + 1}" / "v1.parquet").unlink(missing_ok=True)
    result["logged"] = digest((var / "predictions").rglob("*.parquet"))
if name == "policy":
    window = os.environ["BALLAST_RUN"]
    for kind in ("verdict", "policy"):
        write(var / "reports" / "monitor" / window / f"{kind}.json", seen)
    result |= {"interval": window, "windows": digest((var / "reports").rglob("policy.json"))}
write(out / "result.json", json.dumps(result))
"""


@dataclass
class Machine:
    """A worker: a clone of the code with var/ and a DVC cache of its own. Without remotes it is all on its own."""

    root: Path
    source: Path
    git_remote: str = ""
    dvc_remote: str = ""

    @property
    def var(self) -> Path:
        return self.root / "var"

    def space(self, run_id: str = "r1") -> Path:
        return self.var / "runs" / "d" / run_id

    def times(self, step: str) -> int:
        file = self.var / f"{step}.runs"
        return len(file.read_text()) if file.exists() else 0

    @contextmanager
    def here(self) -> Iterator[None]:
        """Be on this machine."""
        self.var.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "ROOT", self.root)
            patch.chdir(self.root)
            patch.setenv("BALLAST_VAR", str(self.var))
            patch.setenv("BALLAST_SOURCE", str(self.source))
            patch.setenv("BALLAST_GIT_REMOTE", self.git_remote)
            patch.setenv("BALLAST_DVC_REMOTE", self.dvc_remote)
            yield

    def run(self, step: str, run_id: str = "r1", as_of: date | None = MARCH) -> dict[str, Any]:
        """What ``python -m pipelines.run`` does, without the second that a process takes to begin."""
        with self.here():
            alone = not places.travels()
            space = workspace.ensure("d", run_id, as_of, self.root) if alone else travel.ensure("d", run_id, as_of)
            env = {**runner.environment("d", run_id), "BALLAST_LINKS": str(space.root / "none")}
            return runner.run(step, space, [], env | {"BALLAST_SOURCE": str(self.source)})

    def left(self, run_id: str = "r1", *kinds: str) -> dict[str, str]:
        """What a run has left in its workspace, and under var/ for others; ``kinds`` are the beginnings of names."""
        space = self.space(run_id)
        found = {path.relative_to(space).as_posix(): path for path in space.rglob("*") if path.is_file()}
        found |= {path.relative_to(self.var).as_posix(): path for path in self.var.glob("predictions/*/*.parquet")}
        found |= {path.relative_to(self.var).as_posix(): path for path in self.var.glob("reports/monitor/*/*.json")}
        wanted = kinds or ("data/", "dvc.lock", "params.yaml", "predictions/", "reports/")
        return {
            name: path.read_text() for name, path in found.items() if name.startswith(wanted) and ".git" not in name
        }


@dataclass
class Site:
    """The remotes, and the machines that share them."""

    home: Path

    @property
    def git_remote(self) -> Path:
        return self.home / "remote.git"

    @property
    def dvc_remote(self) -> Path:
        return self.home / "dvc"

    def machine(self, name: str, dvc_remote: str | None = None) -> Machine:
        root = self.home / name
        git(self.home, "clone", "-q", str(self.git_remote), str(root))
        return Machine(root, self.home / "source", str(self.git_remote), dvc_remote or str(self.dvc_remote))

    def object(self, md5: str) -> Path:
        return self.dvc_remote / "files" / "md5" / md5[:2] / md5[2:]

    def refs(self) -> dict[str, str]:
        lines = git(self.git_remote, "for-each-ref", "--format=%(refname) %(objectname)", "refs/ballast").splitlines()
        return dict(line.split() for line in lines)


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's repository, what others clone of it, and a source."""
    home = tmp_path_factory.mktemp("toy")
    project = home / "project"
    (project / "pipelines").mkdir(parents=True)
    (project / "pipelines" / "__init__.py").touch()
    (project / "toy.py").write_text(TOY)
    (project / "uv.lock").write_bytes((PROJECT / "uv.lock").read_bytes())
    (project / "params.yaml").write_text('as_of: "2024-01-01"\n')
    (project / "data").mkdir()
    (project / "data" / ".gitignore").write_text("*\n!.gitignore\n")
    (project / ".gitignore").write_text("/var\n__pycache__\n")
    for step, reads in travel.READS.items():
        words = ["toy.py", step, *reads]
        (project / "pipelines" / f"{step}.py").write_text(
            f"import sys\nsys.argv = {words}\nexec(open('toy.py').read())\n"
        )
    stages = {
        "land": ([], ["manifest.json", "result.json"]),
        "ingest": (["land/manifest.json"], ["tables", "result.json"]),
        "validate": (["ingest/tables"], ["result.json"]),
    }
    about = {
        name: {
            "cmd": f"python toy.py {name} {' '.join(deps)}",
            "params": ["as_of"],
            "deps": ["toy.py", *(f"data/{dep}" for dep in deps)],
            "outs": [f"data/{name}/{out}" for out in outs],
            **({"always_changed": True} if name == "land" else {}),
        }
        for name, (deps, outs) in stages.items()
    }
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": about}, sort_keys=False))
    git(project, "init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=project, check=True)
    shutil.copy(PROJECT / ".dvc" / "config", project / ".dvc" / "config")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "The toy")
    git(home, "clone", "-q", "--bare", str(project), str(home / "remote.git"))
    for name in ("dvc", "source"):
        (home / name).mkdir()
    (home / "source" / "rows").write_text("of February")
    return home


@pytest.fixture
def site(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in [name for name in os.environ if name.startswith("BALLAST_")]:
        monkeypatch.delenv(name)
    return Site(shutil.copytree(template, tmp_path / "site"))


@pytest.fixture(scope="module")
def expected(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """What the last of these runs leaves where one machine makes them all, and nothing travels."""

    @cache
    def ran(*run_ids: str) -> dict[str, str]:
        site = Site(shutil.copytree(template, tmp_path_factory.mktemp("alone") / "site"))
        machine = alone(site.machine("alone"))
        for run_id in run_ids:
            for step in CHAIN:
                machine.run(step, run_id)
        return machine.left(run_ids[-1])

    return ran


def alone(machine: Machine) -> Machine:
    return replace(machine, git_remote="", dvc_remote="")


def travelled(machines: list[Machine], *run_ids: str) -> dict[str, str]:
    """The same, where each step is done by the next machine."""
    turns = cycle(machines)
    for run_id in run_ids:
        found: dict[str, str] = {}
        for step in CHAIN:
            machine = next(turns)
            machine.run(step, run_id)
            found |= left_by(machine, step, run_id)
    return found


def left_by(machine: Machine, step: str, run_id: str) -> dict[str, str]:
    shared = {"score": ("predictions/",), "policy": ("reports/",)}.get(step, ())
    return machine.left(run_id, f"data/{step}/", "dvc.lock", "params.yaml", *shared)


def names_only_what_is_there(site: Site) -> bool:
    """Whether the DVC remote has all that the refs of the git remote name."""
    named: set[str] = set()
    for ref in site.refs():
        for file in git(site.git_remote, "ls-tree", "--name-only", ref).splitlines():
            if file == "index.json":
                named |= set(json.loads(git(site.git_remote, "show", f"{ref}:{file}")).values()) - {""}
            elif file == "dvc.lock" or file.endswith(".dvc"):
                outs = git(site.git_remote, "show", f"{ref}:{file}").replace("deps:", "outs:").split("outs:")
                named |= {md5 for text in outs for md5 in re.findall(r"md5: (\w{32}\.dir)\b", text)}
                named |= set(re.findall(r"path: data/\S+\n\s+hash: md5\n\s+md5: (\w{32})\n", "\n".join(outs)))
    lists = [json.loads(site.object(md5).read_text()) for md5 in named if md5.endswith(".dir")]
    named |= {entry["md5"] for one in lists for entry in one}
    assert named or not site.refs() or len(site.refs()) == 2
    return all(site.object(md5).is_file() for md5 in named)


def test_chain_with_each_step_on_the_next_machine_leaves_what_one_machine_does(
    site: Site, expected: Callable[..., dict[str, str]]
) -> None:
    """r1 takes away a day of the prediction log that r2 has written, and r3 reads what is left."""
    runs = ("r2", "r1", "r3")
    assert travelled([site.machine("a"), site.machine("b")], *runs) == expected(*runs)
    assert names_only_what_is_there(site)


def test_exporter_reads_what_was_landed_from_the_git_remote(site: Site) -> None:
    """Toy's rows are as landing stores' indexes are: one table, one piece."""
    machine, watching = site.machine("a"), site.machine("b")
    with watching.here():
        source = exporter.LandingSource()
        source.look()
        assert (source.error, [metric.samples for metric in source.families()]) == (None, [[], []])
    for last in ("2024-02-28T22:00:00+00:00", "2024-02-29T22:00:00+00:00"):
        machine.run("settle", last[8:10])
        (site.home / "source" / "rows").write_text(last)
        machine.run("land", last[8:10])
        with watching.here():
            source.look()
        assert source.error is None
        newest, asked = (metric.samples[0] for metric in source.families())
        assert (newest.labels, newest.value) == ({"table": "toy"}, facts.stamp(last))
        assert asked.value == facts.stamp("2024-03-01T00:00:00+00:00")
    site.git_remote.rename(site.home / "away")
    with watching.here():
        source.look()
    assert source.error.startswith("The git remote") and source.families()


def test_chain_killed_before_and_after_each_effect_ends_as_an_unbroken_one(
    site: Site, expected: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An effect is what another machine may see: an object sent, a ref moved. The next machine takes over."""
    turns, kills, found = cycle([site.machine("a"), site.machine("b")]), 0, dict[str, str]()
    for step in CHAIN:
        for at in range(100):
            machine = next(turns)
            with monkeypatch.context() as patch:
                killed_at(patch, at)
                with suppress(Killed):
                    machine.run(step)
                    break
            kills += 1
            assert names_only_what_is_there(site)
        found |= left_by(machine, step, "r1")
    assert found == expected("r1")
    assert kills > 30


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def killed_at(patch: pytest.MonkeyPatch, at: int) -> None:
    """End the process at the so manieth moment before or after an effect."""
    left = iter([*[False] * at, True, *[False] * 100])

    def dying(of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            if next(left):
                raise Killed
            result = of(*given, **more)
            if next(left):
                raise Killed
            return result

        return call

    for place, name in ((Remote, "send_files"), (Remote, "_put"), (refs, "move")):
        patch.setattr(place, name, dying(getattr(place, name)))


def test_step_whose_process_was_killed_is_done_by_another_machine(
    site: Site, expected: Callable[..., dict[str, str]]
) -> None:
    one, other = site.machine("a"), site.machine("b")
    one.run("settle")
    begun = site.refs()
    pid = os.fork()
    if pid == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refs, "move", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            one.run("land")
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert site.refs() == begun
    for step in CHAIN:
        other.run(step)
    assert other.left() == expected("r1")


def test_begin_of_two_machines_at_once_agrees_on_one_commit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = site.machine("a"), site.machine("b")
    move = refs.move

    def late(*given: Any) -> bool:
        monkeypatch.setattr(refs, "move", move)
        (site.home / "project" / "new").touch()
        git(site.home / "project", "add", "-A")
        git(site.home / "project", "commit", "-qm", "meanwhile")
        git(site.home / "project", "push", "-q", str(site.git_remote), "HEAD")
        other.run("settle", as_of=date(2024, 4, 1))
        return move(*given)

    monkeypatch.setattr(refs, "move", late)
    with pytest.raises(BallastError, match=r"began as of 2024-04-01 \(asked for: 2024-03-01\)"):
        one.run("settle")
    commits = {one.run("land", as_of=None)["commit"], other.run("ingest", as_of=None)["commit"]}
    assert commits == {git(site.home / "project", "rev-parse", "HEAD")} == {site.refs()["refs/ballast/runs/d/r1"]}


def test_step_that_two_machines_do_at_once_moves_the_run_on_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = site.machine("a"), site.machine("b")
    one.run("land")
    send = Remote.send_cached

    def late(*given: Any) -> None:
        monkeypatch.setattr(Remote, "send_cached", send)
        other.run("ingest")
        other.run("validate")
        send(*given)

    monkeypatch.setattr(Remote, "send_cached", late)
    with pytest.raises(TryAgain, match="Another worker has moved this run on while ingest ran here"):
        one.run("ingest")
    assert one.run("ingest")["cached"] is True
    assert "validate" in yaml.safe_load(one.left("r1", "dvc.lock")["dvc.lock"])["stages"]


def test_step_after_one_that_was_killed_within_git_goes_on(site: Site) -> None:
    machine = site.machine("a")
    machine.run("settle")
    machine.run("land")
    space = machine.space()
    for lock in (".git/index.lock", ".git/refs/ballast/states/d/r1.lock", ".dvc/tmp/index.index.lock"):
        assert (space / lock).parent.is_dir()
        (space / lock).touch()
    machine.run("ingest")
    assert not list((space / ".git").rglob("*.lock"))


def test_runs_at_once_on_machines_with_a_cache_each_all_end_well(site: Site) -> None:
    machines = [site.machine("a"), site.machine("b")]

    def steps(machine: Machine, run_id: str) -> None:
        for step in CHAIN[:3]:
            for _ in range(3):  # another machine may do the same step of the same run
                with suppress(TryAgain):
                    machine.run(step, run_id)
                    break
            else:
                raise AssertionError(step)

    started = []
    for machine in machines:
        for run_id in ("r1", "r2", "r3"):
            if not (pid := os.fork()):
                code = 1
                with suppress(BaseException):
                    steps(machine, run_id)
                    code = 0
                os._exit(code)
            started.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in started] == [0] * 6
    locks = {git(site.git_remote, "show", f"refs/ballast/states/d/r{n}:dvc.lock") for n in range(1, 4)}
    assert len(locks) == 1
    assert names_only_what_is_there(site)


def test_stage_of_the_same_inputs_in_another_run_on_another_machine_comes_from_the_run_cache(site: Site) -> None:
    one, other = site.machine("a"), site.machine("b")
    for machine, run_id in ((one, "r1"), (other, "r2")):
        for step in ("land", "ingest", "validate"):
            cached = machine.run(step, run_id)["cached"]
            assert cached is (machine is other and step != "land")
    assert (one.times("validate"), other.times("validate")) == (1, 0)
    stages = yaml.safe_load(other.left("r2", "dvc.lock")["dvc.lock"])["stages"]
    site.object(stages["validate"]["outs"][0]["md5"]).unlink()
    third = site.machine("c")
    found = [third.run(step, "r3")["cached"] for step in ("land", "ingest", "validate")]
    assert found == [False, True, False], "what the run cache speaks of is gone: the stage is run again"


def tear(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 3)
    path.chmod(0o444)


@pytest.mark.parametrize("where", ["here", "in the remote"])
def test_run_cache_that_is_damaged_is_not_believed(site: Site, where: str) -> None:
    one, other = site.machine("a"), site.machine("b")
    for step in ("land", "ingest"):
        one.run(step, "r1")
    home = one.root / ".dvc" / "cache" if where == "here" else site.dvc_remote
    for entry in [path for path in home.glob("runs/*/*/*") if path.is_file()]:
        tear(entry)
    machine = one if where == "here" else other
    machine.run("land", "r2")
    assert machine.run("ingest", "r2")["cached"] is (where == "here"), "here the remote has it whole"
    assert names_only_what_is_there(site)


def test_damaged_object_of_the_remote_is_named_and_sent_again_once_it_is_deleted(site: Site) -> None:
    one, other = site.machine("a"), site.machine("b")
    for step in ("land", "ingest"):
        one.run(step)
    stages = yaml.safe_load(one.left("r1", "dvc.lock")["dvc.lock"])["stages"]
    listed = site.object(next(out["md5"] for out in stages["ingest"]["outs"] if out["md5"].endswith(".dir")))
    torn = site.object(json.loads(listed.read_text())[0]["md5"])
    tear(torn)
    with pytest.raises(TryAgain, match=f"{torn} holds other bytes than its name says. Delete it there"):
        other.run("validate")
    torn.unlink()
    one.run("ingest")
    assert other.run("validate")["cached"] is False


def test_config_of_dvc_that_is_damaged_is_written_anew(site: Site) -> None:
    machine = site.machine("a")
    machine.run("land")
    config = machine.space() / ".dvc" / "config.local"
    whole = config.read_text()
    config.write_text(whole[: whole.index("['remote")])
    machine.run("ingest")
    assert config.read_text() == whole
    assert names_only_what_is_there(site)


def test_run_cache_that_is_gone_everywhere_is_no_harm(site: Site) -> None:
    machine = site.machine("a")
    for step in ("land", "ingest"):
        machine.run(step)
    shutil.rmtree(machine.root / ".dvc" / "cache" / "runs")
    shutil.rmtree(site.dvc_remote / "runs")
    assert machine.run("ingest")["cached"] is True


def test_damaged_object_of_the_cache_is_not_sent(site: Site) -> None:
    machine = site.machine("a")
    file = machine.root / "one.txt"
    file.write_text("half")
    with machine.here(), Remote.of(machine.root) as remote, pytest.raises(BallastError, match="is damaged"):
        remote.send_files({"0" * 32: file})
    assert not site.object("0" * 32).exists()


@pytest.mark.parametrize("away", ["git_remote", "dvc_remote"])
def test_remote_that_is_away_asks_to_try_again_and_leaves_nothing_half(
    site: Site, away: str, expected: Callable[..., dict[str, str]]
) -> None:
    one, other = site.machine("a"), site.machine("b")
    path: Path = getattr(site, away)
    gone = path.with_name("gone")
    for step in ("land", "ingest"):
        one.run(step)
    for attempt in (lambda: one.run("validate"), lambda: other.run("validate"), lambda: one.run("land", "r2")):
        path.rename(gone)
        with pytest.raises(TryAgain, match=rf"The (git|DVC) remote {path} \(BALLAST_{away.upper()}\) does not serve: "):
            attempt()
        assert not path.exists()
        gone.rename(path)
    assert (one.times("validate"), other.times("validate")) == (0, 0)
    for step in CHAIN[3:]:
        other.run(step)
    whole = expected("r1")
    assert other.left("r1", "dvc.lock", "data/score/") == {
        name: text for name, text in whole.items() if name.startswith(("dvc.lock", "data/score/"))
    }


def test_remote_that_goes_away_as_a_step_ends_leaves_the_state_before(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = site.machine("a")
    one.run("land")
    before, send = site.refs(), Remote.send

    def away(*given: Any) -> None:
        site.dvc_remote.rename(site.home / "gone")
        site.dvc_remote.touch()
        send(*given)

    monkeypatch.setattr(Remote, "send", away)
    with pytest.raises(TryAgain, match=r"The DVC remote .* does not serve: NotADirectoryError"):
        one.run("ingest")
    assert site.refs() == before


def test_fault_of_our_own_is_no_remote_that_is_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one = site.machine("a")
    one.run("land")
    monkeypatch.setattr(Remote, "send", lambda: None)
    with pytest.raises(TypeError):
        one.run("ingest")


def test_dvc_remote_alone_keeps_the_refs_in_the_checkout(site: Site) -> None:
    machine = replace(site.machine("a"), git_remote="")
    for step in ("settle", "land", "ingest"):
        machine.run(step)
    kept = git(machine.root, "for-each-ref", "--format=%(refname)", "refs/ballast").splitlines()
    assert kept == ["refs/ballast/runs/d/r1", "refs/ballast/shared/var", "refs/ballast/states/d/r1"]
    assert "ingest" in git(machine.root, "show", "refs/ballast/states/d/r1:dvc.lock")
    assert site.refs() == {}


def test_git_remote_alone_keeps_the_data_under_var(site: Site) -> None:
    machine = replace(site.machine("a"), dvc_remote="")
    machine.run("land")
    assert "refs/ballast/states/d/r1" in site.refs()
    assert list((machine.var / "dvc-remote" / "files").rglob("*"))


def test_begin_on_a_remote_without_head_says_what_to_do(site: Site) -> None:
    machine = site.machine("a")
    git(site.git_remote, "symbolic-ref", "HEAD", "refs/heads/none")
    with pytest.raises(BallastError, match=r"has no HEAD to begin a run on\. Push the branch"):
        machine.run("land")
    assert not machine.space().exists()


def test_git_remote_s_password_is_not_shown(site: Site) -> None:
    machine = site.machine("a")
    machine.git_remote = "http://me:hunter2@127.0.0.1:9/remote.git"
    with pytest.raises(TryAgain, match=r"http://\*\*\*@127\.0\.0\.1:9/remote\.git") as error:
        machine.run("land")
    assert "hunter2" not in str(error.value)


def test_workspace_whose_refs_are_gone_is_made_anew(site: Site) -> None:
    machine = site.machine("a")
    machine.run("land")
    for ref in site.refs():
        git(site.git_remote, "update-ref", "-d", ref)
    with pytest.raises(TryAgain, match="was of an earlier life of this run, and is removed"):
        machine.run("ingest")
    assert machine.run("land")["cached"] is False


def test_installation_that_begins_to_travel_takes_what_it_has_along(site: Site) -> None:
    one, other = site.machine("a"), site.machine("b")
    for step in CHAIN:
        alone(one).run(step, "r1")
    assert (site.refs(), list(site.dvc_remote.iterdir()), (one.var / "dvc-remote").exists()) == ({}, [], False)
    for machine, run_id in ((one, "r3"), (other, "r5")):
        for step in CHAIN:
            machine.run(step, run_id)
    days = sorted(path.name for path in (other.var / "predictions").iterdir())
    assert days == [f"date=2024-02-0{day}" for day in (1, 3, 5)]
    assert sorted(path.name for path in (other.var / "reports" / "monitor").iterdir()) == ["r1", "r3", "r5"]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ThreadedMotoServer]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    (none := tmp_path / "none").touch()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(none),
        "AWS_SHARED_CREDENTIALS_FILE": str(none),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="dvc")
    yield "s3://dvc/ballast", server
    server.stop()


def test_chain_by_an_s3_api_leaves_what_one_machine_does_and_asks_to_try_again_when_that_is_away(
    site: Site, expected: Callable[..., dict[str, str]], bucket: tuple[str, ThreadedMotoServer]
) -> None:
    url, server = bucket
    machines = [site.machine(name, url) for name in "ab"]
    assert travelled(machines, "r1") == expected("r1")
    server.stop()
    with pytest.raises(
        TryAgain, match=r"The DVC remote s3://dvc/ballast \(BALLAST_DVC_REMOTE\) does not serve: "
    ) as error:
        site.machine("c", url).run("policy")
    assert "hunter2" not in str(error.value)


def test_reads_covers_every_step_and_what_its_command_reads_by_default() -> None:
    assert set(travel.READS) == set(runner.STEPS)
    for step, reads in travel.READS.items():
        found = set()
        for node in ast.walk(ast.parse((PROJECT / "pipelines" / f"{step}.py").read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("data/"):
                found.add(node.value.split("/")[1])
        assert found - {step} <= set(reads), step
    made = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    assert set(travel.KEPT) == {name for reads in travel.READS.values() for name in reads} - set(made)
