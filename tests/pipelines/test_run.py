"""The runner with a real git repository and real DVC: a toy project of two stages."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pipelines import container
from pipelines import run as runner
from pipelines.errors import BallastError
from pipelines.files import dvc_md5
from pipelines.workspace import SEAL, ensure, name_of, run_cache_alone

PROJECT = Path(__file__).resolve().parents[2]
STAGE = """
import json, pathlib, sys, tempfile, time, os
left = tempfile.mkdtemp()
name, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
print(f"{name} begins", flush=True)
pathlib.Path(os.environ["BALLAST_VAR"], f"{name}.pid").write_text(str(os.getpid()))
with open(pathlib.Path(os.environ["BALLAST_VAR"], f"{name}.runs"), "a") as file:
    file.write("x")
pathlib.Path(os.environ["BALLAST_VAR"], f"{name}.connection").write_text(os.environ.get("AIRFLOW_CONN_SHOP", ""))
time.sleep(seconds)
out = pathlib.Path("data", name)
out.mkdir(parents=True, exist_ok=True)
(out / "result.json").write_text(json.dumps({"summary": f"{name} of " + open("params.yaml").read().strip()}))
sys.exit(code)
"""


class Project:
    """A project with `land` and `train` whose commands do what the test asks for."""

    def __init__(self, root: Path) -> None:
        self.root, self.var = root / "project", root / "var"
        self.root.mkdir()
        self.var.mkdir()
        (self.root / "stage.py").write_text(STAGE)
        (self.root / "uv.lock").write_bytes((PROJECT / "uv.lock").read_bytes())
        (self.root / "params.yaml").write_text('as_of: "2013-04-01"\n')
        (self.root / ".gitignore").write_text("/data\n")
        self.git("init", "-q")
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=self.root, check=True)
        self.stages()

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout.strip()

    def stages(self, seconds: float = 0, code: int = 0) -> None:
        """Commit a dvc.yaml whose stages take ``seconds`` and end with ``code``."""
        stages = {
            name: {
                "cmd": f"python stage.py {name} {seconds} {code}",
                "deps": ["stage.py", *deps],
                "params": ["as_of"],
                "outs": [f"data/{name}/result.json"],
            }
            for name, deps in {"land": [], "train": ["data/land/result.json"]}.items()
        }
        (self.root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
        self.git("add", "-A")
        self.git("commit", "-qm", "stages", "--allow-empty")

    def command(self, step: str, run_id: str = "r1", as_of: str = "2013-05-01", *more: str) -> list[str]:
        # the runner's own main, on this project instead of the one it lies in
        here = (
            "import pathlib, sys; sys.argv[0] = 'pipelines.run'\n"
            f"import pipelines.places; pipelines.places.ROOT = pathlib.Path({str(self.root)!r})\n"
            "from pipelines import errors, run; errors.exit_with(run.main)"
        )
        return [sys.executable, "-c", here, step, "--dag-id", "d", "--run-id", run_id, "--as-of", as_of, *more]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "BALLAST_VAR": str(self.var), "PYTHONPATH": str(PROJECT)}

    def run(
        self, step: str, run_id: str = "r1", as_of: str = "2013-05-01", *more: str
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(step, run_id, as_of, *more)
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)

    def workspace(self, run_id: str = "r1") -> Path:
        return self.var / "runs" / "d" / run_id

    def times(self, name: str) -> int:
        file = self.var / f"{name}.runs"
        return len(file.read_text()) if file.exists() else 0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(runner.RESULT)
    return json.loads(last.removeprefix(runner.RESULT))


def test_run_new_stage_runs_in_a_clone_as_of_its_date(project: Project) -> None:
    result = result_of(project.run("land"))
    assert result["summary"] == 'land of as_of: "2013-05-01"'
    assert (result["as_of"], result["cached"]) == ("2013-05-01", False)
    assert result["commit"] == project.git("rev-parse", "HEAD")
    assert (project.root / "params.yaml").read_text() == 'as_of: "2013-04-01"\n'
    assert not (project.root / "data").exists()


PREPARE = """as_of: "2013-04-01"
land: {train_days: 1}
prepare:
  label_delay_days: 1         # one day

# a word in between
  train_days:                 # empty: all days so far
  test_days: 14
evaluate:
  train_days: 3
"""


def test_run_train_days_are_pinned_once_and_the_rest_of_the_file_stays(project: Project) -> None:
    (project.root / "params.yaml").write_text(PREPARE)
    project.stages()
    for days in ("90", "30"):
        result_of(project.run("land", "r1", "2013-04-01", f"--train-days={days}"))
    found = (project.workspace() / "params.yaml").read_text()
    assert found == PREPARE.replace("train_days:      ", "train_days: 90      ")
    assert yaml.safe_load(found)["prepare"] == {"label_delay_days": 1, "train_days": 90, "test_days": 14}


def test_run_train_days_all_empties_what_was_committed(project: Project) -> None:
    (project.root / "params.yaml").write_text(PREPARE.replace("train_days:  ", "train_days: 60  "))
    project.stages()
    result_of(project.run("land", "r1", "2013-04-01", "--train-days=all"))
    result_of(project.run("land", "r2", "2013-04-01"))
    found = [yaml.safe_load((project.workspace(run) / "params.yaml").read_text()) for run in ("r1", "r2")]
    assert [one["prepare"]["train_days"] for one in found] == [None, 60]


@pytest.mark.parametrize(
    ("days", "said"), [("0", "a number above 0, or all (found '0')"), ("90", "one line `train_days:` in its section")]
)
def test_run_train_days_that_cannot_be_set_make_no_workspace(project: Project, days: str, said: str) -> None:
    done = project.run("land", "r1", "2013-05-01", f"--train-days={days}")
    assert (done.returncode, project.workspace().exists()) == (1, False)
    assert said in done.stderr


def test_run_same_inputs_in_another_run_come_from_the_cache_with_the_same_lock(project: Project) -> None:
    for step in ("land", "train"):
        result_of(project.run(step, "r1"))
    for step in ("land", "train"):
        assert result_of(project.run(step, "r2"))["cached"] is True
    assert project.times("train") == 1
    locks = [(project.workspace(run) / "dvc.lock").read_text() for run in ("r1", "r2")]
    assert locks[0] == locks[1]


def test_run_beneath_a_socket_reads_no_rc_file_of_the_shell(project: Project, tmp_path: Path) -> None:
    """As a daemon or rsh starts it: bash would read ~/.bashrc, and a `python` there come first on the PATH."""
    other = tmp_path / "home" / "python"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nexit 9\n")
    other.chmod(0o755)
    (tmp_path / "home" / ".bashrc").write_text(f'PATH="{other.parent}:$PATH"\n')
    environment = {**project.environment(), "HOME": str(tmp_path / "home"), "SHLVL": "0"}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            project.command("land"), env=environment, stdin=theirs, capture_output=True, text=True, check=False
        )
    assert result_of(done)["cached"] is False


def test_run_land_has_the_connection_that_it_asks_for_and_leaves_no_trace_of_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "params.yaml").write_text('as_of: "2013-04-01"\nland: {options: {connection: shop}}\n')
    project.stages()
    monkeypatch.setenv("AIRFLOW_CONN_SHOP", "of the environment")

    def land(run_id: str, as_of: str, answer: str, *ask: str) -> str:
        command, environment = project.command("land", run_id, as_of, *ask), project.environment()
        done = subprocess.run(command, env=environment, input=answer, capture_output=True, text=True, check=True)
        assert ("ballast-connection shop" in done.stdout.splitlines()) == bool(ask)
        assert "hunter2" not in done.stdout + done.stderr
        return (project.var / "land.connection").read_text()

    assert land("r1", "2013-05-01", '{"password": "hunter2"}\n', "--ask-connection") == '{"password": "hunter2"}'
    kept = [file for file in project.workspace().rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]
    assert kept == []
    assert land("r2", "2013-05-02", "\n", "--ask-connection") == "of the environment"
    assert land("r3", "2013-05-03", '{"password": "hunter2"}\n') == "of the environment"


def test_run_other_date_runs_again(project: Project) -> None:
    result_of(project.run("land", "r1"))
    assert result_of(project.run("land", "r2", "2013-06-01"))["cached"] is False


def test_run_commit_after_the_run_began_is_not_part_of_it(project: Project) -> None:
    first = result_of(project.run("land"))
    project.stages(code=1)
    second = result_of(project.run("train"))
    assert first["commit"] == second["commit"]


def test_run_id_used_again_after_its_workspace_went_begins_at_the_commit_of_today(project: Project) -> None:
    result_of(project.run("land"))
    shutil.rmtree(project.workspace())
    project.stages(seconds=0.1)
    assert result_of(project.run("land"))["commit"] == project.git("rev-parse", "HEAD")


def test_run_uncommitted_change_is_named_and_left_out(project: Project) -> None:
    (project.root / "stage.py").write_text("raise SystemExit(1)")
    done = project.run("land")
    result_of(done)
    assert "not part of this run (uncommitted in the checkout): stage.py" in done.stdout


@pytest.mark.parametrize("code", [65, 75, 3])
def test_run_failing_stage_keeps_its_exit_code_and_records_nothing(project: Project, code: int) -> None:
    project.stages(code=code)
    assert project.run("land").returncode == code
    assert not (project.workspace() / "dvc.lock").exists()


def test_run_begun_as_of_another_date_is_refused(project: Project) -> None:
    result_of(project.run("land"))
    done = project.run("train", as_of="2013-06-01")
    assert done.returncode == 1
    assert "began as of 2013-05-01 (asked for: 2013-06-01)" in done.stderr


def test_run_writes_its_entry_of_the_run_cache_while_no_other_reads_there(project: Project) -> None:
    """DVC takes an entry that is half there for a corrupt one, and removes it under the hands of who writes it."""
    project.stages(seconds=0.5)
    cache = project.root / ".dvc" / "cache"
    with subprocess.Popen(project.command("land"), env=project.environment(), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert any("begins" in line for line in run.stdout)
        with run_cache_alone(str(cache / "runs")):
            while not any((cache / "files").rglob("*")):
                assert run.poll() is None
                time.sleep(0.05)
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(1)
            assert not (cache / "runs").exists()
        run.stdout.read()
    assert run.returncode == 0
    assert len([path for path in (cache / "runs").rglob("*") if path.is_file()]) == 1


def start_slow(project: Project, *under: str, step: str = "land") -> tuple[subprocess.Popen[str], int]:
    """Start a step that takes long, ``under`` another command or none; return it, and the stage's pid once it works."""
    project.stages(seconds=60)
    command = [*under, *project.command(step)]
    process = subprocess.Popen(command, env=project.environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "begins" in line:
            break
    pid_file = project.var / f"{step}.pid"
    for _ in range(500):
        if pid_file.exists() and pid_file.read_text():
            return process, int(pid_file.read_text())
        time.sleep(0.02)
    raise AssertionError("the stage did not begin")


def gone(pid: int) -> bool:
    """Whether a process ends (a zombie of a killed runner counts as ended)."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_run_killed_leaves_no_stage_behind(project: Project, signal_number: signal.Signals) -> None:
    process, stage = start_slow(project)
    process.send_signal(signal_number)
    process.wait()
    if signal_number == signal.SIGTERM:
        assert "did not end" not in process.stdout.read(), "a step that ends at SIGTERM is not waited for"
    process.stdout.close()
    assert process.returncode == (128 + signal.SIGTERM if signal_number == signal.SIGTERM else -signal.SIGKILL)
    assert gone(stage)


def test_run_whose_operator_was_killed_ends_its_stage(project: Project) -> None:
    """Airflow's task process starts the runner in a session of its own; SIGKILL gives it no time to say so."""
    operator = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"
    process, stage = start_slow(project, sys.executable, "-c", operator)
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(stage)


def test_run_after_its_stage_was_killed_ends_as_an_unbroken_run(project: Project) -> None:
    process, stage = start_slow(project)
    os.kill(stage, signal.SIGKILL)
    assert process.wait() == 128 + signal.SIGKILL
    process.stdout.close()
    (project.workspace() / "data" / "land").mkdir(parents=True, exist_ok=True)
    (project.workspace() / "data" / "land" / "result.json").write_text('{"half":')
    (project.workspace() / "stage.py").write_text(STAGE.replace("time.sleep(seconds)", ""))
    assert result_of(project.run("land"))["cached"] is False


def test_run_leaves_no_temporary_file_of_its_step_not_even_of_a_killed_one(project: Project) -> None:
    process, _ = start_slow(project)
    process.kill()
    process.communicate()
    scratch = project.workspace() / ".dvc" / "tmp" / "scratch"
    assert len(list(scratch.iterdir())) == 1
    (project.workspace() / "stage.py").write_text(STAGE.replace("time.sleep(seconds)", ""))
    result_of(project.run("land"))
    assert not scratch.exists()


def test_run_that_fails_leaves_no_bytecode_which_a_full_disk_may_have_cut_short(project: Project) -> None:
    result_of(project.run("land"))
    half = project.workspace() / "pipelines" / "sources" / "__pycache__" / "sql.cpython-311.pyc"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    (project.workspace() / "stage.py").write_text("raise OSError(28, 'No space left on device')")
    assert project.run("train").returncode == 1
    assert not half.parent.exists()


@pytest.mark.parametrize("name", ["params.yaml", "dvc.lock", ".dvc/config.local"])
def test_run_whose_settings_or_lock_are_not_as_it_left_them_is_refused(project: Project, name: str) -> None:
    result_of(project.run("land"))
    file = project.workspace() / name
    whole = file.read_text()
    file.write_text(whole + "\n")
    done = project.run("train")
    assert done.returncode == 1
    assert f"{file} is not as the run's steps left it" in done.stderr
    file.write_text(whole)
    result_of(project.run("train"))
    result_of(project.run("train"))


def test_run_after_a_killed_commit_restores_the_lock_file(project: Project) -> None:
    result_of(project.run("land"))
    root = project.workspace()
    whole = (root / "dvc.lock").read_text()
    (root / ".dvc" / "tmp" / "dvc.lock.before").write_text(whole)
    (root / "dvc.lock").write_text(whole[: len(whole) // 2])
    (root / ".dvc" / "tmp" / "rwlock").write_text('{"half":')
    result_of(project.run("train"))
    assert (root / "dvc.lock").read_text().startswith(whole.rstrip())


def test_run_after_a_commit_that_was_killed_at_its_end_keeps_the_lock_file(project: Project) -> None:
    result_of(project.run("land"))
    guard, lock = project.workspace() / ".dvc" / "tmp" / "dvc.lock.before", project.workspace() / "dvc.lock"
    guard.write_text("")
    result_of(project.run("train"))
    assert {"land", "train"} == set(yaml.safe_load(lock.read_text())["stages"])
    assert not guard.exists()


def test_run_after_a_killed_commit_without_a_seal_restores_the_lock_file(project: Project) -> None:
    result_of(project.run("land"))
    root = project.workspace()
    whole = (root / "dvc.lock").read_text()
    (root / ".dvc" / "tmp" / "dvc.lock.before").write_text(whole)
    (root / "dvc.lock").write_text(whole[: len(whole) // 2])
    (root / SEAL).unlink()
    result_of(project.run("train"))
    assert (root / "dvc.lock").read_text().startswith(whole.rstrip())


def test_run_after_a_killed_commit_whose_guard_is_damaged_too_is_refused(project: Project) -> None:
    result_of(project.run("land"))
    lock = project.workspace() / "dvc.lock"
    whole = lock.read_text()
    (project.workspace() / ".dvc" / "tmp" / "dvc.lock.before").write_text(whole[:40])
    lock.write_text(whole[:50])
    done = project.run("train")
    assert f"{lock} is not as the run's steps left it" in done.stderr


def test_run_whose_input_is_not_as_its_stage_left_it_is_refused(project: Project) -> None:
    result_of(project.run("land"))
    file = project.workspace() / "data" / "land" / "result.json"
    file.write_text("{}")
    done = project.run("train")
    assert done.returncode == 1
    assert f"{file} is not as `land` left it" in done.stderr
    assert project.times("train") == 0
    assert result_of(project.run("land"))["cached"] is True
    result_of(project.run("train"))


def tear(file: Path) -> None:
    """Cut a file in half; it stays write-protected, if it is."""
    mode = file.stat().st_mode
    file.chmod(0o644)
    os.truncate(file, file.stat().st_size // 2)
    file.chmod(mode)


def test_run_on_a_lock_that_knows_a_stage_by_another_name_is_well(project: Project) -> None:
    """DVC keeps in dvc.lock what is no longer in dvc.yaml."""
    result_of(project.run("land"))
    lock = yaml.safe_load((project.workspace() / "dvc.lock").read_text())
    lock["stages"]["fetch"] = lock["stages"].pop("land")
    lock["stages"]["fetch"]["outs"][0]["md5"] = "0" * 32
    (project.root / "dvc.lock").write_text(json.dumps(lock))
    project.git("add", "-f", "dvc.lock")
    project.git("commit", "-qm", "a lock")
    for step in ("land", "train"):
        result_of(project.run(step, "r2"))
    assert "fetch" in (project.workspace("r2") / "dvc.lock").read_text()


def test_run_is_cached_whatever_the_command_looks_like_in_yaml(project: Project) -> None:
    """What YAML folds does not come back as it was."""
    dvc_yaml = project.root / "dvc.yaml"
    stages = json.loads(dvc_yaml.read_text())
    stages["stages"]["land"]["cmd"] = "python   stage.py   land   0   0" + "   --some-word   of-some-length" * 6
    dvc_yaml.write_text(json.dumps(stages))
    project.git("commit", "-qam", "long")
    assert [result_of(project.run("land", run))["cached"] for run in ("r1", "r2", "r3")] == [False, True, True]


def test_folder_is_as_it_was_left_whatever_dvc_ignores_in_it(project: Project) -> None:
    (project.root / ".dvcignore").write_text("*.part\n")
    tables = project.root / "data" / "ingest" / "tables"
    tables.mkdir(parents=True)
    (tables / "a.csv").write_text("a")
    left = {"path": "data/ingest/tables", "md5": dvc_md5(tables)}
    (project.root / "dvc.lock").write_text(json.dumps({"stages": {"ingest": {"outs": [left]}}}))
    (tables / "b.part").write_text("half")
    runner._check_read(project.root, "decide")
    (tables / "a.csv").write_text("b")
    runner._check_read(project.root, "promote")
    with pytest.raises(BallastError, match="tables is not as `ingest` left it"):
        runner._check_read(project.root, "decide")


@pytest.mark.parametrize("kind", ["files/md5", "runs"])
def test_run_takes_no_damaged_out_from_the_cache_and_mends_it(project: Project, kind: str) -> None:
    result_of(project.run("land"))
    whole = (project.workspace() / "data" / "land" / "result.json").read_text()
    kept = [file for file in (project.root / ".dvc" / "cache" / kind).rglob("*") if file.is_file()]
    kept = [file for file in kept if not file.name.endswith(".lock")]
    assert len(kept) == 1
    tear(kept[0])
    assert result_of(project.run("land", "r2"))["cached"] is False
    assert result_of(project.run("land", "r3"))["cached"] is True
    assert project.times("land") == 2
    for run in ("r2", "r3"):
        assert (project.workspace(run) / "data" / "land" / "result.json").read_text() == whole


class Asked(NamedTuple):
    """A step that asked its parent, and what for."""

    done: subprocess.CompletedProcess[str]
    request: dict[str, Any]


def run_asking(
    project: Project, step: str, answer: str | None = None, run_id: str = "r1", environment: str = sys.prefix
) -> Asked:
    """Be the parent of a step whose stage is to run in a container: answer so, or else run it, here."""
    env = {**project.environment(), "BALLAST_STAGE_RUNNER": "container"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(project.command(step, run_id), env=env, text=True, **pipes)
    request: dict[str, Any] = {}
    for line in process.stdout:
        if line.startswith(container.COMMAND):
            request = json.loads(line.removeprefix(container.COMMAND))
            break
    if request and answer is None:
        path = f"{Path(sys.executable).parent}:{env['PATH']}"
        inside = {"PATH": path, "VIRTUAL_ENV": environment, **request["env"]}
        answer = f"{subprocess.run(request['command'], cwd=request['cwd'], env=inside, check=False).returncode}\n"
    out, err = process.communicate(answer)
    return Asked(subprocess.CompletedProcess(process.args, process.returncode, line + out, err), request)


def test_run_stage_that_its_parent_ran_ends_as_one_that_ran_here(project: Project) -> None:
    asked = run_asking(project, "land")
    assert result_of(asked.done)["cached"] is False
    assert asked.request["cwd"] == str(project.workspace())
    again = run_asking(project, "land", run_id="r2")
    assert (result_of(again.done)["cached"], again.request) == (True, {})
    (project.root / ".dvc" / "cache").rename(project.root / ".dvc" / "gone")
    result_of(project.run("land", "r3"))
    locks = [(project.workspace(run) / "dvc.lock").read_text() for run in ("r1", "r2", "r3")]
    assert locks[0] == locks[1] == locks[2]


def test_run_stage_in_an_image_of_another_lock_is_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("another")
    asked = run_asking(project, "land", environment=str(tmp_path))
    assert (asked.done.returncode, project.times("land")) == (1, 0)


@pytest.mark.parametrize(
    ("answer", "code"), [("65\n", 65), ("75\n", 75), ("3\n", 3), ("137\n", 137), ("", 75), ("6", 75)]
)
def test_run_stage_that_its_parent_could_not_run_records_nothing(project: Project, answer: str, code: int) -> None:
    """An answer cut short, or none, is a parent that is gone."""
    done = run_asking(project, "land", answer).done
    assert done.returncode == code
    assert not (project.workspace() / "dvc.lock").exists()
    result_of(project.run("land"))


def test_run_killed_while_its_parent_runs_the_stage_ends_at_once(project: Project) -> None:
    env = {**project.environment(), "BALLAST_STAGE_RUNNER": "container"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(project.command("land"), env=env, text=True, **pipes) as process:
        while not process.stdout.readline().startswith(container.COMMAND):
            pass
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
    result_of(project.run("land"))


def test_run_in_a_container_asked_for_at_a_terminal_is_refused(project: Project) -> None:
    ours, theirs = pty.openpty()
    env = {**project.environment(), "BALLAST_STAGE_RUNNER": "container"}
    done = subprocess.run(project.command("land"), env=env, stdin=theirs, capture_output=True, text=True, check=False)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 1
    assert "it is Airflow's tasks that start those. Unset it, or set local." in done.stderr


def test_run_stage_runner_misspelt_is_refused(project: Project) -> None:
    env = {**project.environment(), "BALLAST_STAGE_RUNNER": "docker"}
    done = subprocess.run(project.command("land"), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BALLAST_STAGE_RUNNER must be local or container (found 'docker')" in done.stderr


def test_register_sends_the_data_to_the_remote_that_the_project_names_before_the_version(
    project: Project, tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "remote", "add", "-d", "team", str(remote)], cwd=project.root, check=True)
    project.stages()
    for step in ("land", "train"):
        result_of(project.run(step))
    assert not remote.exists()
    assert project.run("register").returncode == 1, "the toy has no model"

    elsewhere = tmp_path / "elsewhere"
    project.git("clone", "-q", str(project.root), str(elsewhere))
    shutil.copy(project.workspace() / "dvc.lock", elsewhere)
    subprocess.run([*dvc, "pull", "-q"], cwd=elsewhere, check=True)
    assert (elsewhere / "data" / "train" / "result.json").read_text()

    shutil.rmtree(remote)
    remote.write_text("no folder")
    done = project.run("register")
    assert done.returncode == 75, done.stderr
    assert f"The DVC remote {remote} (team in .dvc/config) does not serve" in done.stderr


def test_ensure_foreign_environment_lock_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = project.var / "venv"
    prefix.mkdir()
    (prefix / "uv.lock").write_text("another")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setenv("BALLAST_VAR", str(project.var))
    with pytest.raises(Exception, match="not the one that this environment was installed from"):
        ensure("d", "r", None, project.root)
    assert not (project.var / "runs" / "d" / "r").exists()


def test_name_of_different_ids_stay_different() -> None:
    ids = ["scheduled__2013-04-01T00:00:00+00:00", "scheduled__2013-04-01T00-00-00-00-00", "plain", "a/b", "a.b"]
    names = [name_of(run_id) for run_id in ids]
    assert len(set(names)) == len(ids)
    assert all("/" not in name and ":" not in name for name in names)
