"""What `ballast gc` removes and what it never touches, on a real MLflow, state store, git repository and DVC cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import Project

from pipelines import cache, embedded, gc, places, promote, refs, registry, workspace
from pipelines.dagruns import PAGE, Airflow, Refused
from pipelines.errors import BallastError, TryAgain
from pipelines.state import State
from pipelines.workspace import name_of

DAY_S = 86_400
MARCH = date(2013, 3, 1)


class Fake(Airflow):
    """An Airflow that says of its runs, by state, no more than a page at once; those that ended last come first."""

    def __init__(self, by_state: dict[str, list[str]]) -> None:
        super().__init__("", "", "")
        self.runs_by_state = by_state
        self.asked = 0

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        self.asked += 1
        dag = path.split("/")[2]
        names = [(name, state) for state in query["state"] for name in self.runs_by_state.get(state, [])]
        found = [(name, state) for name, state in names if dag in ("~", name.partition("/")[0])]
        if dag == "deleted":
            raise Refused("no such DAG", 404)
        nothing = dict.fromkeys(("queued_at", "start_date", "end_date", "conf"))
        runs = [
            {"dag_id": name.partition("/")[0], "dag_run_id": name.partition("/")[2], "state": state, **nothing}
            for name, state in found
        ]
        start = query.get("offset", 0)
        return {"dag_runs": runs[start : start + min(query["limit"], PAGE)]}


@dataclass
class Site:
    """A checkout with a DVC cache of its own, and its var/."""

    project: Project

    @property
    def root(self) -> Path:
        return self.project.root

    @property
    def cache(self) -> Path:
        return self.root / ".dvc" / "cache" / "files" / "md5"

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True)

    def object(self, text: str, days: float = 30) -> str:
        return self._put(text.encode(), "", days)

    def folder(self, *texts: str, days: float = 30) -> str:
        """A folder in the cache, and its files."""
        files = [{"md5": self.object(text, days), "relpath": text} for text in texts]
        return self._put(json.dumps(files).encode(), ".dir", days)

    def _put(self, data: bytes, suffix: str, days: float) -> str:
        name = hashlib.md5(data).hexdigest() + suffix
        path = self.cache / name[:2] / name[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        age(path, days)
        return name

    def has(self, name: str) -> bool:
        return (self.cache / name[:2] / name[2:]).exists()

    def run(self, name: str, days: float, lock: str = "") -> Path:
        space = places.var() / "runs" / name
        (space / ".dvc" / "tmp").mkdir(parents=True)
        (space / "dvc.lock").write_text(lock)
        (space / ".dvc" / "tmp" / "ballast.lock").touch()
        for path in (space / "dvc.lock", space / ".dvc" / "tmp" / "ballast.lock", space):
            age(path, days)
        return space

    def runs(self) -> list[str]:
        home = places.var() / "runs"
        return sorted(str(path.relative_to(home)) for path in home.glob("*/*"))


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))


def lock(*names: str) -> str:
    """A dvc.lock that names these objects."""
    return "stages:\n  land:\n    outs:\n" + "".join(
        f"    - path: {n}\n      md5: {name}\n" for n, name in enumerate(names)
    )


@pytest.fixture
def site(project: Project, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(places, "ROOT", project.root)
    made = Site(project)
    made.git("init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=project.root, check=True)
    made.git("add", "params.yaml")
    made.git("commit", "-qm", "first")
    return made


def known(monkeypatch: pytest.MonkeyPatch, **by_state: list[str]) -> Fake:
    fake = Fake(by_state)
    monkeypatch.setattr(embedded, "airflow", lambda: fake)
    return fake


def collect(keep: int = 2, days: int = 14, reports: int = 2) -> list[str]:
    return [waste.name for waste in gc.collect(keep, days, reports)]


def test_collect_workspaces_keeps_the_last_that_ended_well_and_whatever_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        site.run(f"retrain/r{number}", days=30 - number)
        site.run(f"monitor/m{number}", days=30 - number)
    site.run("retrain/running", days=90)
    site.run("retrain/queued", days=90)
    site.run("retrain/failed", days=13)
    site.run("retrain/failed-long-ago", days=15)
    site.run(f"alert/{name_of('r:with:colons')}", days=90)
    site.run("alert/by-hand", days=0.5)
    known(
        monkeypatch,
        running=["retrain/running"],
        queued=["retrain/queued", "alert/r:with:colons"],
        success=[*(f"{dag}{number}" for dag in ("retrain/r", "monitor/m") for number in range(5)), "alert/by-hand"],
        failed=["retrain/failed", "retrain/failed-long-ago"],
    )
    collect(keep=2)
    assert site.runs() == [
        "alert/by-hand",
        f"alert/{name_of('r:with:colons')}",
        "monitor/m3",
        "monitor/m4",
        "retrain/failed",
        "retrain/queued",
        "retrain/r3",
        "retrain/r4",
        "retrain/running",
    ]
    collect(keep=0)
    assert "alert/by-hand" in site.runs(), "touched within a day"


def test_collect_workspaces_without_airflow_keeps_what_may_still_run(site: Site) -> None:
    State().begin_retraining("retrain/under-way", MARCH, "schedule")
    for name, days in {"retrain/under-way": 90, "retrain/new": 13, "retrain/old": 15}.items():
        site.run(name, days)
    collect(keep=0)
    assert site.runs() == ["retrain/new", "retrain/under-way"]


def test_collect_workspaces_counts_as_ended_well_only_what_airflow_knows_as_that(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, well = ([f"{name}{number}" for number in range(PAGE + 20)] for name in ("retrain/failed", "monitor/well"))
    days = {failed[-1]: 13, well[-1]: 13, "retrain/forgotten": 13, "retrain/long-forgotten": 15, "deleted/r": 13}
    for name, since in days.items():
        site.run(name, since)
    known(monkeypatch, success=well, failed=failed)
    assert collect(keep=0) == [well[-1], "retrain/long-forgotten"]


def test_collect_workspace_takes_along_what_dvc_keeps_of_it_elsewhere(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    known(monkeypatch)
    for name in ("over", "young"):
        space = workspace.root_of("d", name)
        workspace.clone(site.root, "HEAD", space)
        (space / ".dvc").mkdir(exist_ok=True)
        workspace.share_cache(site.root, space)
        workspace.found(space, "HEAD", name, None)
        assert workspace.cache_of(space)  # DVC opens it
        age(space, 30 if name == "over" else 1)
    kept = places.var() / "dvc-site" / "repo"
    assert len(list(kept.iterdir())) == 2
    assert collect() == ["d/over"]
    assert len(list(kept.iterdir())) == 1


def test_tidy_asks_airflow_back_to_the_oldest_workspace_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = known(monkeypatch, running=["retrain/new"], success=[f"retrain/r{number}" for number in range(5 * PAGE)])
    for name in ("new", "r0", "r1"):
        site.run(f"retrain/{name}", days=0)
    gc.tidy()
    assert fake.asked == 2


def test_collect_workspace_that_a_step_holds_is_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    space = site.run("retrain/orphan", days=90)
    with (space / ".dvc" / "tmp" / "ballast.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        collect(keep=0)
        assert site.runs() == ["retrain/orphan"]
    collect(keep=0)
    assert site.runs() == []


def test_tidy_removes_workspaces_that_are_over_and_nothing_else(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_KEEP_RUNS", "1")
    monkeypatch.setenv("BALLAST_KEEP_FAILED_DAYS", "5")
    days = {"well": 90, "well-too": 80, "running": 90, "held": 85, "failed": 6, "failed-lately": 4, "new": 0.5}
    spaces = {name: site.run(f"retrain/{name}", since) for name, since in days.items()}
    begun = places.var() / "runs" / "retrain" / ".begun.1234.part"  # another run is making it now
    begun.mkdir()
    idle = site.object("idle")
    tidy = [name for name in sorted(days) if name not in ("well", "well-too", "failed")]
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "connect", lambda: (_ for _ in ()).throw(TryAgain("away")))
        gc.tidy()
    assert len(site.runs()) == len(days) + 1, "Airflow is away"
    known(
        monkeypatch,
        running=["retrain/running"],
        success=[f"retrain/{name}" for name in ("new", "well-too", "held", "well")],
        failed=["retrain/failed", "retrain/failed-lately"],
    )
    with (spaces["held"] / ".dvc" / "tmp" / "ballast.lock").open() as file, workspace.using():
        fcntl.flock(file, fcntl.LOCK_EX)
        gc.tidy()
    assert site.runs() == [f"retrain/{name}" for name in sorted([begun.name, *tidy])]
    assert site.has(idle)


def test_collect_when_airflow_has_more_runs_than_it_tells_waits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, running=[f"d/r{number}" for number in range(120)])
    with pytest.raises(TryAgain, match="100 runs or more"):
        collect()


def test_collect_data_leaves_what_anything_names(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, success=["retrain/kept", "retrain/older"])
    named = [site.object(f"named {n}") for n in range(4)]
    inside = [hashlib.md5(text.encode()).hexdigest() for text in ("x", "y")]
    folder, idle, idle_folder = site.folder("x", "y"), site.object("idle"), site.folder("y", "z")
    young = site.object("young", days=1)
    site.run("retrain/kept", days=2, lock=lock(named[0], folder))
    space = site.run("retrain/older", days=3, lock=lock(idle))
    guard = places.var() / "replay/plan/never/runs/d/r/.dvc/tmp/dvc.lock.before"
    guard.parent.mkdir(parents=True)
    guard.write_text(lock(named[1]))
    (site.root / "dvc.lock").write_text(lock(named[2]))
    site.git("add", "dvc.lock")
    site.git("commit", "-qm", "lock")
    site.git("update-ref", "refs/ballast/runs/d/r", "HEAD")
    site.git("reset", "-q", "--hard", "HEAD~1")
    (site.root / "dvc.lock").write_text(lock(named[3]))
    collect(keep=1)
    assert not space.exists()
    assert [site.has(name) for name in (*named, folder, *inside, young)] == [True] * 8
    assert [site.has(name) for name in (idle, idle_folder, hashlib.md5(b"z").hexdigest())] == [False] * 3


@pytest.mark.parametrize("found", ["by gc", "by a step"])
def test_collect_where_the_list_of_a_folder_is_damaged_removes_nothing_until_it_is_made_anew(
    site: Site, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    known(monkeypatch)
    folder, stray = site.folder("a", "b"), site.object("stray")
    (site.root / "dvc.lock").write_text(lock(folder))
    listed = site.cache / folder[:2] / folder[2:]
    listed.write_text('[{"md5": "12')
    if found == "by a step":
        assert cache.lacking(site.root, [folder]) == {folder}
        assert not listed.exists()
    with pytest.raises(BallastError, match="is damaged: which files are needed cannot be told"):
        gc.collect(2, 14, 2)
    assert site.has(stray)
    site.folder("a", "b")
    collect()
    assert (site.has(stray), site.has(hashlib.md5(b"a").hexdigest())) == (False, True)
    assert not list(cache.set_aside(site.cache).glob("*"))


def test_plan_touches_nothing(site: Site, monkeypatch: pytest.MonkeyPatch, ballast: Any) -> None:
    known(monkeypatch)
    site.object("idle")
    site.run("retrain/old", days=90)
    (places.var() / "runs/retrain/.x.1234.part").mkdir()
    before = snapshot(site)
    code, out, _ = ballast("gc", "--keep", "0")
    assert code == 0
    assert "retrain/old" in out
    assert "left behind by a kill" in out
    assert "1 objects of the DVC cache" in out
    assert "nothing was touched. `ballast gc --yes` removes it" in out
    assert snapshot(site) == before
    found = json.loads(ballast("gc", "--keep", "0", "--yes", "--json")[1])
    assert found["removed"] is True
    assert [one["kind"] for one in found["waste"]] == ["workspace", "workspace", "data"]
    assert found["bytes"] == sum(one["bytes"] for one in found["waste"])
    assert site.runs() == []
    assert "nothing can go" in ballast("gc", "--keep", "0", "--yes")[1]


def test_gc_without_options_keeps_what_the_settings_say(
    site: Site, monkeypatch: pytest.MonkeyPatch, ballast: Any
) -> None:
    known(monkeypatch, success=["retrain/r2", "retrain/r1", "retrain/r0"])
    for name, days in {"r2": 20, "r1": 21, "r0": 22, "lost": 20}.items():
        site.run(f"retrain/{name}", days)
    monkeypatch.setenv("BALLAST_KEEP_RUNS", "1")
    monkeypatch.setenv("BALLAST_KEEP_FAILED_DAYS", "21")

    def named(*options: str) -> list[str]:
        return [one["name"] for one in json.loads(ballast("gc", "--json", *options)[1])["waste"]]

    assert named() == ["retrain/r1", "retrain/r0"]
    assert named("--keep", "2", "--days", "19") == ["retrain/lost", "retrain/r0"]
    monkeypatch.setenv("BALLAST_KEEP_RUNS", "")
    assert named() == []
    said = " ".join(ballast("gc", "--help")[1].split())
    for name, default in workspace.KEEP.items():
        assert f"[env var: {name}; default: {default};" in said


def snapshot(site: Site) -> list[str]:
    ours = [places.var() / "runs", site.cache, places.var() / "models", places.var() / "mlflow" / "artifacts"]
    return sorted(str(path) for root in ours for path in root.rglob("*"))


def test_collect_refs_of_runs_in_the_git_remote_but_the_commit_of_a_version(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = site.root.with_name("remote.git")
    subprocess.run(["git", "clone", "-q", "--bare", str(site.root), str(bare)], check=True)
    monkeypatch.setenv("BALLAST_GIT_REMOTE", str(bare))
    tree = workspace.git(site.root, "rev-parse", "HEAD^{tree}")
    commits = [refs.commit(site.root, tree, f"code {n}") for n in range(2)]
    for name, days in {"r1": 30, "r2": 20, "r3": 10, "failed": 9, "running": 90}.items():
        then = f"{int(time.time() - days * DAY_S)} +0000"
        with monkeypatch.context() as patch:
            patch.setenv("GIT_COMMITTER_DATE", then)
            state = refs.commit(site.root, tree, name)
        pin = commits[name == "r1"]
        run = f"retrain/{name}"
        assert refs.move(site.root, {f"{workspace.RUNS}/{run}": (None, pin), f"{refs.STATES}/{run}": (None, state)})
    ended_well = [f"retrain/r{number}" for number in (1, 2, 3)]
    known(monkeypatch, success=ended_well, failed=["retrain/failed"], running=["retrain/running"])
    made = registry.Version(1, "", "", "", datetime.now(UTC), {"ballast.commit": commits[1]})
    monkeypatch.setattr(registry, "versions", lambda: [made])
    monkeypatch.setattr(gc, "_models", lambda state, days: ())
    monkeypatch.setattr(gc, "_kept", lambda version: None)
    assert collect(keep=1, days=14) == ["retrain/r2", "retrain/r1"]
    left = [f"{kind}/retrain/{name}" for kind in ("runs", "states") for name in ("failed", "r3", "running")]
    assert sorted(refs.there("refs/ballast/*")) == sorted(f"refs/ballast/{one}" for one in [*left, "runs/retrain/r1"])
    assert collect(keep=1, days=8) == ["retrain/failed"]


def versions(site: Site) -> None:
    """v1 was champion, v2 is; v3 was refused and forced back out of, v4 refused and waits, v5 and v6 refused."""
    site.project.prepare()
    for number in range(1, 7):
        (site.root / "dvc.lock").write_text(lock(site.object(f"of v{number}")))
        digest = site.project.train(iterations=3 + number)
        version = site.project.register()
        record = site.project.decided(version, digest, "promote" if number in (1, 2) else "refuse")
        if number in (1, 2):
            promote.promote(version, record, State())
        if number == 3:
            promote.force(3, "we try it", State())
            State().append("rollback", 2, head=State().head(), reason="no", actor="me", as_of=MARCH)
        if number == 4:
            State().note("ask", lambda ledger: None, reason="", actor="d/r", record_sha256=record)
    (site.root / "dvc.lock").unlink()


def test_collect_models_takes_only_refused_ones_that_nothing_speaks_of(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch)
    versions(site)
    for number in (2, 5):
        registry.model(number)
    assert collect() == [], "none is 14 days old"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 15 * DAY_S)
    registry.project(2, 5)  # by hand
    assert [waste.name for waste in gc.plan(2, 14, 2)][:2] == ["v6", "1 objects of the DVC cache"]
    registry.project(2, 1)
    assert collect() == ["v5", "v6", "2 objects of the DVC cache"]
    assert [site.has(hashlib.md5(f"of v{n}".encode()).hexdigest()) for n in range(1, 7)] == [True] * 4 + [False] * 2
    local = {path.name for path in (places.var() / "models").iterdir() if path.is_dir()}
    assert local == {registry.version(2).digest}
    for number in (1, 2, 3, 4):
        assert registry.model(number).is_dir()
    with pytest.raises(BallastError, match=r"The model of v5 is gone: the gate had refused it, and `ballast gc`"):
        registry.model(5)
    with pytest.raises(BallastError, match=r"The model of v6 is gone"):
        promote.force(6, "now", State())
    assert registry.size(5) == 0
    assert collect() == []


def test_collected_model_that_is_made_again_is_a_new_version(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    site.project.prepare()
    (site.root / "dvc.lock").write_text(lock("0" * 32))
    digest = site.project.train()
    site.project.decided(site.project.register(), digest, "refuse")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 15 * DAY_S)
    assert collect() == ["v1"]
    assert site.project.register() == 2
    assert registry.model(2).is_dir()


def test_collect_reports_leaves_verdicts_and_the_last_windows(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    shown: list[State] = []
    monkeypatch.setattr(gc.timeline, "show", shown.append)
    for month in (1, 2, 3):
        folder = places.var() / "reports" / "monitor" / f"2013-0{month}-01..2013-0{month + 1}-01"
        folder.mkdir(parents=True)
        for name in ("evidently.html", "verdict.json", "policy.json"):
            (folder / name).write_text("{}")
    assert collect(reports=2) == ["2013-01-01..2013-02-01"]
    left = sorted(str(path.relative_to(places.var())) for path in places.var().glob("reports/monitor/*/evidently.html"))
    assert [name.split("/")[2] for name in left] == ["2013-02-01..2013-03-01", "2013-03-01..2013-04-01"]
    assert len(list(places.var().glob("reports/monitor/*/verdict.json"))) == 3
    assert len(shown) == 1


def test_collect_killed_anywhere_is_done_by_the_next(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)

    def fill() -> None:
        for root in (places.var() / "runs", site.cache):
            shutil.rmtree(root, ignore_errors=True)
        kept = site.folder("kept", "shared")
        for number in range(8):
            site.folder(f"a{number}", "shared", f"b{number}")
        site.run("retrain/old", days=90, lock=lock(site.object("of old")))
        site.run("retrain/older", days=91, lock=lock(site.object("of older")))
        (site.root / "dvc.lock").write_text(lock(kept))

    fill()
    collect(keep=0)
    expected = snapshot(site)
    unlink, rmtree = Path.unlink, shutil.rmtree
    crashed = 0
    for crash_at in range(100):
        fill()
        left = iter([*[False] * crash_at, True, *[False] * 100])

        def dying(of: Callable[..., Any], left: Any = left) -> Callable[..., Any]:
            def call(*given: Any, **more: Any) -> Any:
                if next(left):
                    with suppress(OSError):
                        unlink(Path(given[0]) / "dvc.lock")  # half of a folder is gone
                    raise KeyboardInterrupt
                return of(*given, **more)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", dying(unlink))
            patch.setattr(shutil, "rmtree", dying(rmtree))
            try:
                collect(keep=0)
            except KeyboardInterrupt:
                crashed += 1
                for folder in site.cache.glob("*/*.dir"):
                    assert all(site.has(entry["md5"]) for entry in json.loads(folder.read_text()))
                for space in places.var().glob("runs/*/[!.]*"):
                    assert (space / "dvc.lock").exists()
                assert not [name for name in expected if not Path(name).exists()]
        collect(keep=0)
        assert snapshot(site) == expected
        if crashed <= crash_at:
            break
    assert crashed > 8


def test_collect_while_a_step_or_another_collection_runs_asks_to_try_again(site: Site) -> None:
    with workspace.using(), workspace.using(), pytest.raises(TryAgain, match="or another `ballast gc` runs"):
        collect()
    with workspace.alone(), pytest.raises(TryAgain):
        collect()


def test_step_that_begins_meanwhile_waits_for_the_collection(site: Site) -> None:
    order: list[str] = []

    def step() -> None:
        with workspace.using():
            order.append("step")

    with workspace.alone():
        thread = threading.Thread(target=step)
        thread.start()
        time.sleep(0.3)
        order.append("collected")
    thread.join(10)
    assert order == ["collected", "step"]
