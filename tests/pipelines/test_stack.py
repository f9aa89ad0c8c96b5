from __future__ import annotations

import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import embedded, processes, stack
from pipelines.errors import BallastError, TryAgain
from pipelines.files import read_json, write_json
from pipelines.stack import Service

FOREVER = "import time; time.sleep(3600)"


@pytest.fixture(autouse=True)
def var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of its own for what is started; whatever a failed test leaves there is ended."""
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.delenv("AIRFLOW_PORT", raising=False)
    monkeypatch.delenv("MLFLOW_PORT", raising=False)
    (tmp_path / "var" / "logs").mkdir(parents=True)
    (tmp_path / "var" / "run").mkdir(parents=True)
    yield tmp_path / "var"
    for log in (tmp_path / "var" / "logs").glob("*.log"):
        stack._stop(log.stem)


@pytest.fixture(autouse=True)
def no_zombies() -> Iterator[None]:
    """What a test started and stopped is waited for, as init would."""
    yield
    while stack._children:
        stack._children.pop().wait(30)


def start(name: str, program: str) -> processes.Process:
    """Start a service as `up` does."""
    stack._start(Service(name, [sys.executable, "-c", program]), dict(os.environ))
    started = stack.running(name)
    assert started is not None
    return started.process


def wait_for(path: Path) -> str:
    """What a started program writes, once it has."""
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.01)
    return path.read_text().strip()


def test_environment_leaves_foreign_settings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AIRFLOW__CORE__EXECUTOR", "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(name, "foreign")
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH", "BALLAST_TRIGGER", "BALLAST_LANDING"):
        monkeypatch.setenv(name, "x")

    env = embedded.environment()

    assert env["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert env["BALLAST_LANDING"] == "x"
    left = {"AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS", "MLFLOW_RUN_ID", "PYTHONDONTWRITEBYTECODE"}
    assert not (left | {"PYTHONSAFEPATH", "BALLAST_TRIGGER"}) & env.keys()


def test_environment_other_port_reaches_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_PORT", "18099")
    monkeypatch.setenv("MLFLOW_PORT", "15099")

    env = embedded.environment()

    assert env["AIRFLOW__API__PORT"] == "18099"
    assert env["AIRFLOW__API__BASE_URL"] == embedded.airflow_url() == "http://localhost:18099"
    assert env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:18099/execution/"
    assert env["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:15099"


def test_environment_behind_a_proxy_keeps_this_machine_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")

    assert embedded.environment()["no_proxy"] == "intranet,127.0.0.1,localhost"


def test_environment_secrets_stay_and_are_private(var: Path) -> None:
    first, second = embedded.environment(), embedded.environment()

    for name in ("CORE__FERNET_KEY", "API__SECRET_KEY", "API_AUTH__JWT_SECRET"):
        assert first[f"AIRFLOW__{name}"] == second[f"AIRFLOW__{name}"]
    assert stat.S_IMODE((var / "airflow").stat().st_mode) == 0o700
    assert list(read_json(embedded.password_file())) == ["admin"]


@pytest.mark.parametrize("port", ["eighty", "0", "65536", "-1"])
def test_port_impossible_names_variable_and_value(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_PORT", port)

    with pytest.raises(BallastError, match=rf"AIRFLOW_PORT must be a port, 1 to 65535 \(found '{port}'\)"):
        embedded.airflow_port()


def test_port_of_a_running_service_holds_where_none_is_asked_for(var: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.mlflow_port() == 5000
    write_json(var / "run" / "mlflow.json", {"port": 5055})
    assert embedded.mlflow_port() == 5055
    monkeypatch.setenv("MLFLOW_PORT", "5066")
    assert embedded.mlflow_port() == 5066


def test_airflow_never_started_names_the_remedy() -> None:
    with pytest.raises(TryAgain, match=r"never started here\. `make run`"):
        embedded.airflow()


def test_up_port_taken_names_holder_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setenv("MLFLOW_PORT", str(port))
        monkeypatch.setattr(stack, "services", lambda: [Service("mlflow", [sys.executable, "-c", ""], port)])

        with pytest.raises(BallastError) as error:
            stack.up()

    assert f"Port {port} is taken by process {os.getpid()} (" in str(error.value)
    assert f"make run MLFLOW_PORT={port + 1}" in str(error.value)


def test_up_on_another_port_than_it_runs_says_so(var: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start("mlflow", FOREVER)
    write_json(var / "run" / "mlflow.json", {**read_json(var / "run" / "mlflow.json"), "port": 5055})
    monkeypatch.setenv("MLFLOW_PORT", "5066")

    with pytest.raises(BallastError, match=r"up with mlflow on port 5055 \(asked for: 5066\)"):
        stack.up()
    stack.down()


def test_up_service_that_ends_shows_its_last_lines_and_leaves_nothing(
    var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Service("api", [sys.executable, "-c", "raise RuntimeError('no room on the disk')"])
    healthy = Service("scheduler", [sys.executable, "-c", FOREVER])
    monkeypatch.setattr(stack, "services", lambda: [healthy, broken])

    with pytest.raises(BallastError) as error:
        stack.up()

    assert str(error.value).startswith("api ended")
    assert "RuntimeError: no room on the disk" in str(error.value)
    assert str(var / "logs" / "api.log") in str(error.value)
    assert stack.running("scheduler") is None


def test_down_ends_what_began_a_session_of_its_own(tmp_path: Path) -> None:
    step = f"import os; os.setsid(); print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); {FOREVER}"
    start("scheduler", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {step!r}]); {FOREVER}")
    pid = int(wait_for(tmp_path / "pid"))

    stack.down()

    assert processes.find(pid) is None
    assert stack.running("scheduler") is None


def test_down_ends_what_was_left_by_a_killed_service(tmp_path: Path) -> None:
    child = f"import os; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); {FOREVER}"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], env={{}}); {FOREVER}"
    leader = start("scheduler", program)
    pid = int(wait_for(tmp_path / "pid"))
    os.kill(leader.pid, 9)

    stack.down()

    assert processes.find(pid) is None


def test_down_kills_what_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "STOP_WITHIN_S", 0.2)
    ready = tmp_path / "ready"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    process = start("mlflow", f"{deaf}; print('deaf', file=open({str(ready)!r}, 'w')); {FOREVER}")
    wait_for(ready)

    stack.down()

    assert not processes.alive(process)


def test_down_twice_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    start("mlflow", FOREVER)
    stack.down()
    stack.down()

    assert capsys.readouterr().out.splitlines() == ["stopped: mlflow", "nothing was running"]


def test_down_reused_pid_is_not_touched(var: Path) -> None:
    bystander = start("bystander", FOREVER)
    stale = {"pid": bystander.pid, "born": bystander.born - 1, "boot": bystander.boot}
    write_json(var / "run" / "scheduler.json", {"process": stale, "at": 0.0, "port": None})

    stack.down()

    assert processes.alive(bystander)
    assert stack.running("scheduler") is None
    stack._stop("bystander")


def test_down_session_of_an_earlier_boot_is_not_touched(var: Path, tmp_path: Path) -> None:
    child = f"import os; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); {FOREVER}"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], env={{}}); {FOREVER}"
    leader = start("bystander", program)
    pid = int(wait_for(tmp_path / "pid"))
    os.kill(leader.pid, 9)
    stale = {"pid": leader.pid, "born": leader.born, "boot": "another"}
    write_json(var / "run" / "scheduler.json", {"process": stale, "at": 0.0, "port": None})

    stack.down()

    assert processes.find(pid) is not None
    stack._stop("bystander")
    assert processes.find(pid) is None


def test_start_keeps_the_log_of_the_time_before(var: Path) -> None:
    (var / "logs" / "mlflow.log").write_text("why it ended\n")
    start("mlflow", FOREVER)
    stack.down()

    assert (var / "logs" / "mlflow.log.1").read_text() == "why it ended\n"


def test_find_zombie_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    assert processes.find(pid) is None
    os.waitpid(pid, 0)
