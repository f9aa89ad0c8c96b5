from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier

import pytest
from postgresql import Server
from sqlalchemy import Connection

from pipelines.errors import BallastError, Conflict, Held
from pipelines.state import (
    _MIGRATIONS,
    GENESIS,
    SCHEMA,
    Decision,
    Entry,
    Note,
    State,
    Window,
    champions,
    frozen,
    today,
)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setenv("BALLAST_STATE_URI", uri(tmp_path))
    return State()


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'state.db'}"


def add(state: State, *path: tuple[str, int]) -> None:
    for kind, to in path:
        state.append(kind, to, head=state.head(), reason="because", actor="me", as_of=date(2013, 4, 1))  # type: ignore[arg-type]


def tamper(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "state.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def race(task: tuple[str, int]) -> list[bool]:
    """Append once per head that is seen; say which attempts won."""
    where, version = task
    state, won = State(where), []
    for _ in range(5):
        head = state.head()
        try:
            state.append("promote", version, head=head, reason="race", actor=str(version), as_of=date(2013, 4, 1))
            won.append(True)
        except Conflict:
            won.append(False)
    return won


def test_ledger_without_entries_has_no_champion(state: State) -> None:
    assert (state.champion(), state.previous_champion(), state.head(), state.verify()) == (None, None, GENESIS, [])


def test_append_chains_entries_and_moves_the_champion(state: State) -> None:
    add(state, ("promote", 1), ("promote", 3))
    first, second = state.ledger()
    assert (first.prev_hash, second.prev_hash) == (GENESIS, first.hash)
    assert (first.from_version, second.from_version, second.to_version) == (None, 1, 3)
    assert (state.champion(), state.previous_champion(), state.verify()) == (3, 1, [])


def test_append_on_an_old_head_raises_conflict(state: State) -> None:
    old = state.head()
    add(state, ("promote", 1))
    with pytest.raises(Conflict, match="v1 now"):
        state.append("promote", 2, head=old, reason="late", actor="me", as_of=date(2013, 4, 1))
    assert state.champion() == 1


def test_append_on_a_head_of_another_ledger_raises_conflict(state: State) -> None:
    with pytest.raises(Conflict, match="not the ledger"):
        state.append("promote", 2, head="f" * 64, reason="late", actor="me", as_of=date(2013, 4, 1))


def test_ledger_lets_no_two_entries_follow_the_same_one(state: State, tmp_path: Path) -> None:
    add(state, ("promote", 1))
    copied = "at, as_of, kind, from_version, to_version, reason, actor, record_sha256"
    fork = f"INSERT INTO ledger SELECT 2, prev_hash, 'x', {copied} FROM ledger"
    with pytest.raises(sqlite3.IntegrityError, match=r"ledger.prev_hash"):
        tamper(tmp_path, fork)


def test_append_by_eight_processes_at_once_keeps_the_chain_whole(tmp_path: Path) -> None:
    """The store does not exist yet: its making is part of the race."""
    with ProcessPoolExecutor(8, mp_context=get_context("fork")) as pool:
        won = list(pool.map(race, [(uri(tmp_path), version) for version in range(1, 9)]))
    state = State(uri(tmp_path))
    ledger = state.ledger()
    assert state.verify() == []
    assert len(ledger) == sum(map(sum, won)) >= 5
    assert [sum(entry.to_version == version for entry in ledger) for version in range(1, 9)] == list(map(sum, won))


def test_state_is_made_by_eight_at_once_on_postgresql(server: Server) -> None:
    where = server.url.replace("postgresql:", "postgresql+psycopg:")
    start = Barrier(8)

    def make(_: int) -> None:
        start.wait()
        State(where).ledger()

    for _ in range(5):
        server.run("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(make, range(8)))
    assert State(where).verify() == []


def test_state_in_another_database_is_refused() -> None:
    with pytest.raises(BallastError, match=r"It must be SQLite or PostgreSQL \(found mysql\)"):
        State("mysql+pymysql://db/ballast").ledger()


def test_setting_that_eight_write_at_once_is_the_last_one_s_on_postgresql(server: Server) -> None:
    """As `ballast status` does beside a promotion: both note how far the aliases show the ledger."""
    server.run("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    where = server.url.replace("postgresql:", "postgresql+psycopg:")
    State(where).ledger()

    def write(number: int) -> None:
        state = State(where)
        for _ in range(20):
            state.set_projected(f"head {number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert str(State(where).projected()).startswith("head ")


def freeze(state: State, kind: Note = "freeze") -> None:
    state.note(kind, lambda ledger: None, reason="peak season", actor="ana")


def test_note_moves_no_champion_and_leaves_the_head(state: State) -> None:
    freeze(state)
    assert (state.champion(), state.head(), state.previous_champion(), frozen(state.ledger())) == (
        None,
        GENESIS,
        None,
        state.ledger()[0],
    )
    freeze(state, "unfreeze")
    add(state, ("promote", 1), ("promote", 2))
    head = state.head()
    freeze(state)
    assert (state.champion(), state.head(), state.previous_champion()) == (2, head, 1)
    assert [(entry.from_version, entry.to_version) for entry in state.ledger()] == [
        (None, None),
        (None, None),
        (None, 1),
        (1, 2),
        (2, 2),
    ]
    assert (state.verify(), champions(state.ledger())) == ([], [1, 2])


def test_append_while_frozen_holds_a_promotion_and_no_rollback(state: State) -> None:
    add(state, ("promote", 1), ("promote", 2))
    freeze(state)
    with pytest.raises(Held, match=r"frozen: peak season \(by ana, since 20.* UTC\). v3 waits for `ballast unfreeze"):
        add(state, ("promote", 3))
    add(state, ("rollback", 1))
    with pytest.raises(Held):
        add(state, ("promote", 3))
    freeze(state, "unfreeze")
    add(state, ("promote", 3))
    assert (state.champion(), state.verify()) == (3, [])


class Overtaken(State):
    """Between its first look at the ledger and its writing, somebody else freezes promotion."""

    seen = False

    def ledger(self) -> list[Entry]:
        found = super().ledger()
        if not self.seen:
            self.seen = True
            freeze(State())
        return found


def test_append_overtaken_by_a_freeze_does_not_get_in(state: State) -> None:
    with pytest.raises(Held):
        Overtaken().append("promote", 1, head=GENESIS, reason="", actor="me", as_of=date(2013, 4, 1))
    assert [entry.kind for entry in state.ledger()] == ["freeze"]
    entry = Overtaken().append("rollback", 1, head=GENESIS, reason="", actor="me", as_of=date(2013, 4, 1))
    assert (entry.seq, state.verify()) == (3, [])


@pytest.mark.parametrize(
    ("path", "standing"),
    [
        ([("promote", 1), ("promote", 2), ("rollback", 1)], [1]),
        ([("promote", 1), ("promote", 2), ("promote", 4), ("rollback", 2), ("rollback", 1)], [1]),
        ([("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 1)], [1]),
        ([("promote", 1), ("promote", 2), ("rollback", 1), ("promote", 5)], [1, 5]),
        ([("promote", 1), ("promote", 2), ("rollback", 1), ("rollback", 2)], [1, 2]),
    ],
)
def test_champions_after_rollbacks_are_those_that_still_count(
    state: State, path: list[tuple[str, int]], standing: list[int]
) -> None:
    add(state, *path)
    assert champions(state.ledger()) == standing
    assert state.champion() == standing[-1]


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["UPDATE ledger SET reason = 'nothing to see' WHERE seq = 2"], "Entry 2 was changed"),
        (["UPDATE ledger SET record_sha256 = 'x' WHERE seq = 3"], "Entry 3 was changed"),
        (["DELETE FROM ledger WHERE seq = 2"], "missing before entry 3"),
        (["DELETE FROM ledger WHERE seq = 1"], "missing before entry 2"),
        (["UPDATE ledger SET prev_hash = 'x' WHERE seq = 3"], "Entry 3 does not follow"),
    ],
)
def test_verify_after_tampering_names_the_entry(state: State, tmp_path: Path, statements: list[str], said: str) -> None:
    add(state, ("promote", 1), ("promote", 2), ("promote", 3))
    tamper(tmp_path, *statements)
    assert any(said in problem for problem in state.verify()), state.verify()


def test_verify_after_an_entry_was_forged_with_a_fitting_hash_names_the_next(state: State, tmp_path: Path) -> None:
    add(state, ("promote", 1), ("promote", 2), ("promote", 3))
    tamper(tmp_path, "UPDATE ledger SET to_version = 9 WHERE seq = 2")
    forged = state.ledger()[1].computed_hash()
    tamper(tmp_path, f"UPDATE ledger SET hash = '{forged}' WHERE seq = 2")
    assert [problem for problem in state.verify() if "Entry 2" in problem] == []
    assert any("Entry 3 does not follow" in problem for problem in state.verify())


def test_clock_set_back_leaves_decisions_and_entries_in_their_order(state: State) -> None:
    ahead = datetime.now(UTC) + timedelta(days=1)
    state.remember(Decision("a" * 64, 1, "promote", "", "2013-04-01", ahead.isoformat(timespec="milliseconds")))
    add(state, ("promote", 1))
    state.remember(Decision("b" * 64, 2, "refuse", "", "2013-04-01", datetime.now(UTC).isoformat()))
    [entry], [first, second] = state.ledger(), state.decisions()
    assert (first.version, second.version) == (1, 2)
    assert first.decided_at < entry.at < second.decided_at
    assert not state.verify()


def test_decision_is_found_by_its_record_hash(state: State) -> None:
    made = Decision("a" * 64, 1, "refuse", "REFUSE", "2013-04-01", "2026-01-01T00:00:00Z")
    state.remember(made)
    assert (state.decision("a" * 64), state.decision("b" * 64), state.decisions()) == (made, None, [made])


def test_clock_when_set_is_today(state: State) -> None:
    assert state.clock() is None
    assert today() == datetime.now(UTC).date()
    state.set_clock(date(2013, 4, 1))
    state.set_clock(date(2013, 5, 1))
    assert state.clock() == today() == date(2013, 5, 1)
    state.set_clock(None)
    assert state.clock() is None


def test_clock_command_sets_and_prints_the_date(state: State) -> None:
    command = [sys.executable, "-m", "pipelines.state", "clock"]
    run = [subprocess.run([*command, *more], capture_output=True, text=True) for more in (["--set", "2013-04-01"], [])]
    assert [(done.returncode, done.stdout) for done in run] == [(0, "2013-04-01\n")] * 2
    bad = subprocess.run([*command, "--set", "April"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: The clock's date must look like 2013-04-01")
    assert len(bad.stderr.splitlines()) == 1


def test_state_written_by_newer_code_is_refused_unchanged(state: State, tmp_path: Path) -> None:
    tamper(tmp_path, f"UPDATE ballast_schema SET version = {SCHEMA + 1}")
    with pytest.raises(BallastError, match=f"schema {SCHEMA + 1}, and this Ballast knows no newer than {SCHEMA}"):
        State()


def made_by_schema(version: int, folder: Path) -> str:
    """A store that an older Ballast made and used."""
    with closing(sqlite3.connect(folder / "state.db")) as connection:
        connection.executescript((Path(__file__).parent / f"state_{version}.sql").read_text())
    return uri(folder)


@pytest.fixture
def old(tmp_path: Path) -> str:
    return made_by_schema(1, tmp_path)


def dump(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "state.db")) as connection:
        return list(connection.iterdump())


def test_state_of_an_older_schema_is_brought_forward_with_all_it_held(old: str, tmp_path: Path) -> None:
    state = State(old)
    assert [(entry.kind, entry.from_version, entry.to_version) for entry in state.ledger()] == [
        ("promote", None, 1),
        ("promote", 1, 3),
        ("rollback", 3, 1),
    ]
    assert (state.verify(), state.champion(), state.clock()) == ([], 1, date(2013, 5, 1))
    assert [(made.version, made.verdict, made.data) for made in state.decisions()] == [
        (1, "promote", None),
        (2, "refuse", None),
    ]
    state.remember(Decision("d" * 64, 4, "refuse", "", "2013-06-01", "2026-11-03", data="5e.dir"))
    add(state, ("promote", 4))
    assert (State(old).decisions()[-1].data, State(old).verify()) == ("5e.dir", [])
    tamper(tmp_path, "UPDATE ledger SET to_version = NULL WHERE seq = 4")  # as a new store lets an entry be
    fork = "INSERT INTO ledger SELECT 9, prev_hash, 'x', at, as_of, kind, 1, 1, reason, actor, '' FROM ledger"
    with pytest.raises(sqlite3.IntegrityError, match=r"ledger.prev_hash"):
        tamper(tmp_path, fork + " WHERE seq = 4")


@pytest.mark.parametrize("version", [2, 3])
def test_state_of_an_older_schema_has_room_for_windows_and_retrainings(tmp_path: Path, version: int) -> None:
    where = made_by_schema(2, tmp_path)
    if version == 3:  # whose tables are those of 2
        tamper(tmp_path, "INSERT INTO ballast_schema VALUES (3)")
    state = State(where)
    assert [entry.kind for entry in state.ledger()] == ["promote", "promote", "rollback", "freeze"]
    assert [(made.data, made.run) for made in state.decisions()] == [(None, None), (None, None), ("5e.dir", None)]
    assert (state.verify(), state.windows(), state.retrainings()) == ([], [], [])
    use_windows_and_retrainings(state)
    new = tmp_path / "new"
    new.mkdir()
    use_windows_and_retrainings(State(uri(new)))
    assert columns(tmp_path) == columns(new), "a migrated store is as a new one"


def use_windows_and_retrainings(state: State) -> None:
    state.remember(Decision("e" * 64, 5, "refuse", "", "2013-06-01", "2026-11-04", run="monitor/x"))
    seen = Window("2013-05-01", "2013-06-01", 3, "wait", {"inputs": {"raises": None, "share": 0.1}}, "2026-11-04", "me")
    state.remember_window(seen)
    state.ask_retraining("monitor/x", date(2013, 6, 1))
    assert (State(str(state._engine.url)).decisions()[-1].run, state.windows()) == ("monitor/x", [seen])
    assert [one.asked_by for one in state.retrainings()] == ["monitor/x"]


def columns(folder: Path) -> dict[str, set[str]]:
    with closing(sqlite3.connect(folder / "state.db")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: {row[1] for row in connection.execute(f"PRAGMA table_info({name})")} for name in tables}


def test_window_seen_again_takes_the_place_of_the_first(state: State) -> None:
    may, june = (Window(f"2013-0{n}-01", f"2013-0{n + 1}-01", 1, "wait", {"rows": n}, "now", "me") for n in (5, 6))
    again = Window("2013-05-01", "2013-06-01", 2, "retrain", {"rows": 9}, "later", "you")
    for window in (june, may, again):
        state.remember_window(window)
    assert state.windows() == [again, june], "the oldest first"


def test_retraining_that_is_not_known_ends_without_an_error(state: State) -> None:
    state.end_retraining("ana", "refuse")
    assert state.retrainings() == []


def test_retraining_begun_by_two_runs_is_two(state: State) -> None:
    state.ask_retraining("monitor/x", date(2013, 6, 1))
    for run in ("retrain_on_drift/a", "retrain_on_drift/b"):
        state.begin_retraining(run, date(2013, 6, 1), "drift", ["monitor/x"])
    assert [one.asked_by for one in state.retrainings()] == ["monitor/x", "retrain_on_drift/b"]


def test_state_whose_migration_breaks_off_is_as_it_was(
    old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, to_2 = dump(tmp_path), _MIGRATIONS[1]

    def breaks_off(connection: Connection) -> None:
        to_2(connection)
        raise KeyboardInterrupt

    monkeypatch.setitem(_MIGRATIONS, 1, breaks_off)
    with pytest.raises(KeyboardInterrupt):
        State(old)
    assert dump(tmp_path) == before
    monkeypatch.undo()
    assert State(old).champion() == 1


def test_state_migrated_by_four_processes_at_once_is_whole(old: str) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        won = list(pool.map(race, [(old, version) for version in range(5, 9)]))
    assert (State(old).verify(), len(State(old).ledger())) == ([], 3 + sum(map(sum, won)))


def test_state_half_made_by_a_killed_process_is_completed(state: State, tmp_path: Path) -> None:
    tamper(tmp_path, "DELETE FROM ballast_schema", "DROP TABLE settings")
    assert State().clock() is None


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("sqlite:////proc/nowhere/state.db", "BALLAST_STATE_URI or BALLAST_VAR"),
        ("sqlite:////proc", "cannot be used: unable to open"),
        ("nonsense", "no database"),
        ("nodialect://x/y", "no database"),
    ],
)
def test_state_that_cannot_be_written_says_so(broken: str, said: str) -> None:
    with pytest.raises(BallastError, match=said):
        State(broken)


def test_state_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"This is not a database, it is a sentence. " * 50)
    with pytest.raises(BallastError, match="is damaged: file is not a database"):
        State(uri(tmp_path))


def test_advance_clock_moves_forward_only_and_not_while_unset(state: State) -> None:
    state.advance_clock(date(2013, 5, 1))
    assert state.clock() is None
    state.set_clock(date(2013, 4, 1))
    state.advance_clock(date(2013, 5, 1))
    state.advance_clock(date(2013, 2, 1))
    assert state.clock() == date(2013, 5, 1)


def test_champion_at_is_the_one_that_served_as_the_day_began(tmp_path: Path) -> None:
    state = State(f"sqlite:///{tmp_path / 'state.db'}")
    for version, as_of in ((1, date(2013, 4, 1)), (2, date(2013, 7, 20))):
        state.append("promote", version, head=state.head(), reason="", actor="", as_of=as_of)
    days = [date(2013, 3, 1), date(2013, 4, 1), date(2013, 7, 1), date(2013, 7, 20), date(2013, 8, 1)]
    assert [state.champion_at(day) for day in days] == [None, 1, 1, 2, 2]
    state.append("rollback", 1, head=state.head(), reason="", actor="", as_of=date(2013, 8, 5))
    assert [state.champion_at(date(2013, 8, day)) for day in (1, 5)] == [2, 1]
