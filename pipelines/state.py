"""The state store: what must be agreed on by everybody. The only module that holds it.

One small database (``places.state_uri()``): the ledger of champions and of what people said of
promoting them, the decisions that were made, what the monitor saw and which retrainings there were, the example clock.
``python -m pipelines.state clock`` prints the date that a run with no date of its own takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    case,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateIndex, CreateTable

from pipelines import places
from pipelines.errors import BallastError, Conflict, Held, TryAgain, exit_with
from pipelines.files import canonical_json

SCHEMA = 5
GENESIS = "0" * 64  # the previous hash of the first entry
BUSY_TIMEOUT_S = 30
# libpq's: without them a server whose machine is gone is waited for until TCP gives up, a quarter of an hour.
GIVE_UP = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "tcp_user_timeout": 60_000}
ALERTS_KEPT = timedelta(days=90)  # once settled; Airflow's own 409 still stops a later repetition
MOST_ALERTS_KEPT = 10_000  # once settled, the newest: whoever knows the token cannot fill the store
FAILED_SHOWN = timedelta(days=7)  # nobody can answer an alert that was given up: people are told for so long
ON_ITS_WAY = "on its way"  # the outcome of an alert while a bridge has claimed it

Move = Literal["promote", "rollback", "force"]  # what makes a version champion
Word = Literal["ask", "approve", "reject", "supersede"]  # what is said of a decision that waits for a person
Note = Literal["freeze", "unfreeze", "reset"] | Word  # what is said and moves no champion
MOVES: tuple[Move, ...] = get_args(Move)

metadata = MetaData()
_schema = Table("ballast_schema", metadata, Column("version", Integer, primary_key=True))
_ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("prev_hash", String(64), nullable=False, unique=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("at", Text, nullable=False),
    Column("as_of", Text),
    Column("kind", Text, nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("record_sha256", String(64)),
)
_decisions = Table(
    "decisions",
    metadata,
    Column("record_sha256", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("summary", Text, nullable=False),
    Column("as_of", Text, nullable=False),
    Column("decided_at", Text, nullable=False),
    Column("data", Text),
    Column("run", Text),
    Column("facts", Text),
)
_windows = Table(
    "windows",
    metadata,
    Column("start", String(10), primary_key=True),
    Column("end", String(10), primary_key=True),
    Column("version", Integer),
    Column("verdict", Text, nullable=False),
    Column("numbers", Text, nullable=False),
    Column("decided_at", Text, nullable=False),
    Column("actor", Text, nullable=False),
)
_retrainings = Table(
    "retrainings",
    metadata,
    Column("asked_by", String(512), primary_key=True),
    Column("run", Text),
    Column("as_of", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("asked_at", Text, nullable=False),
    Column("began_at", Text),
    Column("ended_at", Text),
    Column("outcome", Text),
)
_alerts = Table(
    "alerts",
    metadata,
    Column("run_id", String(250), primary_key=True),
    Column("action", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("received_at", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("next_at", Text),
    Column("settled_at", Text),
    Column("outcome", Text),
    Index("alerts_by_age", "received_at", "status"),
)
_settings = Table("settings", metadata, Column("name", String(64), primary_key=True), Column("value", Text))


@dataclass(frozen=True)
class Entry:
    """One entry of the ledger. ``hash`` is over all other fields, so also over the entry before.

    One that moves no champion leaves it as it was: ``to_version`` is ``from_version``, None before the first promotion.
    """

    seq: int
    prev_hash: str
    hash: str
    at: str
    as_of: str | None
    kind: str
    from_version: int | None
    to_version: int | None
    reason: str
    actor: str
    record_sha256: str | None

    def computed_hash(self) -> str:
        """SHA-256 of the other fields. Empty ones do not count: a field added later leaves old hashes as they are."""
        fields = {name: value for name, value in asdict(self).items() if name != "hash" and value is not None}
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


@dataclass(frozen=True)
class Decision:
    """What the gate said of a version, by the hash of its record: a record that is not here was not made by it."""

    record_sha256: str
    version: int
    verdict: str
    summary: str
    as_of: str
    decided_at: str
    data: str | None = None  # provenance.data() of what it was judged on; None where that is not known
    run: str | None = None  # the DAG run that asked for it, which may decide again; None outside of one
    facts: dict[str, Any] | None = (
        None  # of its record, what metrics count: `rules`, `trained_until`; None before schema 5
    )


@dataclass(frozen=True)
class Window:
    """What the monitor saw of an interval (the end is exclusive), and what the policy said of it."""

    start: str
    end: str
    version: int | None  # the champion that was watched
    verdict: str
    numbers: dict[str, Any]
    decided_at: str
    actor: str


@dataclass(frozen=True)
class Retraining:
    """A retraining, asked for, begun or ended. Times are as-of dates unless named ``_at``."""

    asked_by: str  # the monitor's run whose policy asked, else the retraining's own
    run: str | None  # the DAG run that does it; None until that has begun it
    as_of: str
    kind: str  # of trigger: schedule, drift, alert, person, laptop
    asked_at: str
    began_at: str | None = None
    ended_at: str | None = None
    outcome: str | None = None  # promote, refuse, paused or failed; None while it is under way


@dataclass(frozen=True)
class Alert:
    """Something that was asked for from outside, by the id of the run that it starts: the bridge's inbox."""

    run_id: str
    action: str  # retrain, monitor, rollback or freeze
    payload: dict[str, Any]  # what the run gets to know of it
    status: str = "waiting"  # waiting, started, done (no run was needed), held, withdrawn or failed
    received_at: str = field(default_factory=lambda: _now())
    tries: int = 0
    next_at: str | None = None  # when delivery is tried (again), or a claim on it ends; None: at once
    settled_at: str | None = None
    outcome: str | None = None  # in words

    @property
    def asks(self) -> str | None:
        """Who asks for the retraining that it opens: the run it starts; None if it asks for none."""
        return f"retrain_on_alert/{self.run_id}" if self.action == "retrain" else None


@dataclass(frozen=True)
class Inbox:
    """The inbox of the alert bridge, counted."""

    waiting: int
    oldest: str | None  # when the one that has waited longest was received
    next_at: str | None  # when the next of those that are not due yet is tried
    retraining: str | None  # one that waits and asks for a retraining
    failed: int  # given up lately


class State:
    """The state store at ``uri``, made on first use, an older one brought forward. BallastError at a newer one.

    ``pooled`` keeps connections for the next transaction: for a process that lives long, has many, and never forks.
    """

    def __init__(self, uri: str | None = None, *, pooled: bool = False) -> None:
        self._engine = _engine(uri or places.state_uri(), pooled)
        self._turn = Lock()
        self._make_sure()

    def ledger(self) -> list[Entry]:
        """Every move of the champion, freeze, unfreeze and reset of the breaker, the oldest first."""
        with self._begin() as connection:
            return [Entry(**row) for row in connection.execute(select(_ledger).order_by(_ledger.c.seq)).mappings()]

    def append(
        self,
        kind: Move,
        to_version: int,
        *,
        head: str,
        reason: str,
        actor: str,
        as_of: date,
        record_sha256: str | None = None,
    ) -> Entry:
        """Make ``to_version`` champion after the move whose hash is ``head``.

        Raises Held if it is a promotion and promotion is frozen, and Conflict if another writer has moved the champion.
        """

        def check(ledger: list[Entry]) -> None:
            if kind == "promote" and (freeze := frozen(ledger)):
                raise Held(f"{freeze_words(freeze)}. v{to_version} waits for `ballast unfreeze --reason TEXT`")
            if head != GENESIS and head not in {entry.hash for entry in ledger}:
                raise Conflict(
                    f"The ledger has no entry {head[:12]}: it is not the ledger that was read before. Look again."
                )
            if head != head_of(ledger):
                now = ledger[-1].to_version
                raise Conflict(f"The champion has moved meanwhile (it is v{now} now). Look again, then decide again.")

        values = {"kind": kind, "to_version": to_version, "reason": reason, "actor": actor}
        return self._add(check, {**values, "as_of": as_of.isoformat(), "record_sha256": record_sha256})

    def note(
        self,
        kind: Note,
        check: Callable[[list[Entry]], None],
        *,
        reason: str,
        actor: str,
        record_sha256: str | None = None,
    ) -> Entry:
        """Write down what a person says; ``check`` raises if the ledger that it comes after does not allow it."""
        values = {"kind": kind, "reason": reason, "actor": actor, "record_sha256": record_sha256}
        return self._add(check, {**values, "as_of": today(self).isoformat()})

    def _add(self, check: Callable[[list[Entry]], None], values: dict[str, Any]) -> Entry:
        """Add an entry after the last one, whichever that is once nobody else comes in between."""
        while True:
            ledger = self.ledger()
            check(ledger)
            before = ledger[-1] if ledger else None
            champion = before.to_version if before else None
            place = {
                "seq": before.seq + 1 if before else 1,
                "prev_hash": before.hash if before else GENESIS,
                "at": self._after_all(_now()),
            }
            fields = {"from_version": champion, "to_version": champion, **place, **values}
            entry = Entry(hash=Entry(hash="", **fields).computed_hash(), **fields)
            try:
                with self._begin() as connection:
                    connection.execute(insert(_ledger), asdict(entry))
            except IntegrityError:  # another entry came first: look again
                if self.ledger()[-1:] == ledger[-1:]:
                    raise
            else:
                return entry

    def _after_all(self, now: str) -> str:
        """``now``, or just after what was said last: a clock that was set back turns no order round."""
        said = [select(func.max(column)) for column in (_ledger.c.at, _decisions.c.decided_at)]
        with self._begin() as connection:
            last = max(filter(None, map(connection.scalar, said)), default="")
        return now if not last or now > last else _stamp(datetime.fromisoformat(last) + timedelta(milliseconds=1))

    def head(self) -> str:
        """The hash of the last move of the champion: whoever moves it says which one it saw."""
        return head_of(self.ledger())

    def champion(self) -> int | None:
        """The version in production, by the ledger."""
        moved = moves(self.ledger())
        return moved[-1].to_version if moved else None

    def champion_at(self, day: date) -> int | None:
        """The version that served as ``day`` began, by the as-of dates of the ledger; None if none did yet.

        Whoever takes the place later may have learned from that day.
        """
        served = [move for move in moves(self.ledger()) if move.as_of and date.fromisoformat(move.as_of) <= day]
        return served[-1].to_version if served else None

    def previous_champion(self) -> int | None:
        """The version that a rollback goes back to."""
        standing = champions(self.ledger())
        return standing[-2] if len(standing) > 1 else None

    def verify(self) -> list[str]:
        """What is wrong with the ledger, one sentence each; nothing if it is as it was written."""
        problems: list[str] = []
        before: Entry | None = None
        for entry in self.ledger():
            problems += _faults(entry, before)
            before = entry
        return problems

    def remember(self, decision: Decision) -> None:
        """Keep what the gate said; promotion asks for it."""
        facts = None if decision.facts is None else canonical_json(decision.facts)
        values = {**asdict(decision), "facts": facts, "decided_at": self._after_all(decision.decided_at)}
        with self._begin() as connection:
            connection.execute(insert(_decisions), values)

    def decision(self, record_sha256: str) -> Decision | None:
        """The decision whose record has this hash."""
        return next((found for found in self.decisions() if found.record_sha256 == record_sha256), None)

    def decisions(self) -> list[Decision]:
        """Every decision of the gate, the oldest first."""
        query = select(_decisions).order_by(_decisions.c.decided_at)
        with self._begin() as connection:
            rows = connection.execute(query).mappings()
            return [Decision(**{**row, "facts": json.loads(row["facts"]) if row["facts"] else None}) for row in rows]

    def remember_window(self, window: Window) -> None:
        """Keep what the monitor saw of an interval; said again, it takes the place of what was said before."""
        with self._begin() as connection:
            _upsert(connection, _windows, {**asdict(window), "numbers": canonical_json(window.numbers)})

    def windows(self) -> list[Window]:
        """Every interval that the monitor has seen, the oldest first."""
        query = select(_windows).order_by(_windows.c.end, _windows.c.start)
        with self._begin() as connection:
            rows = connection.execute(query).mappings()
            return [Window(**{**row, "numbers": json.loads(row["numbers"])}) for row in rows]

    def ask_retraining(self, asked_by: str, as_of: date, kind: str = "drift") -> None:
        """Open a retraining that a run, or an alert, asks for; asked for again, it is the same one."""
        with self._begin() as connection:
            _ask(connection, asked_by, as_of, kind)

    def begin_retraining(self, run: str, as_of: date, kind: str, asked_by: Sequence[str] = ()) -> None:
        """Note that ``run`` retrains now, because of those who asked for it; begun again, it is under way again."""
        open_or_mine = _retrainings.c.run.is_(None) | (_retrainings.c.run == run)
        mine = _retrainings.c.asked_by.in_([run, *asked_by]) & open_or_mine
        began = {"run": run, "as_of": as_of.isoformat(), "kind": kind, "began_at": _now()}
        with self._begin() as connection:
            anew = update(_retrainings).where(mine).values(**began, ended_at=None, outcome=None)
            if not connection.execute(anew).rowcount:
                new = Retraining(asked_by=run, asked_at=str(began["began_at"]), **began)
                connection.execute(insert(_retrainings), asdict(new))

    def end_retraining(self, actor: str, outcome: str) -> None:
        """Note how the retraining of this run ended (of this asker, where none has begun it); none is no error."""
        unbegun = _retrainings.c.run.is_(None) & (_retrainings.c.asked_by == actor)
        ended = update(_retrainings).where((_retrainings.c.run == actor) | unbegun)
        with self._begin() as connection:
            connection.execute(ended.values(ended_at=_now(), outcome=outcome))

    def retrainings(self) -> list[Retraining]:
        """Every retraining, the oldest first. What several have asked for, and one run does, is one."""
        with self._begin() as connection:
            rows = connection.execute(select(_retrainings).order_by(_retrainings.c.asked_at)).mappings()
            return list({row["run"] or row["asked_by"]: Retraining(**row) for row in rows}.values())

    def take_alert(self, alert: Alert, against: Callable[[], str | None]) -> tuple[Alert, bool]:
        """Keep an alert that fires, and open the retraining it asks for; return how it stands, and whether that is new.

        ``against`` says why it must be held, if it must; it is asked while nobody else can take one. One that is held
        is asked about again each time it comes.
        """
        with self._alone() as connection:
            known = _known(connection, alert.run_id)
            if known and known.status != "held":
                return known, False
            if reason := against():
                since = known.received_at if known else alert.received_at
                held = replace(alert, status="held", outcome=reason, received_at=since)
                _put(connection, held)
                return held, known is None
            _put(connection, alert)
            if alert.asks:
                _ask(connection, alert.asks, date.fromisoformat(alert.payload["as_of"]), "alert")
            return alert, True

    def withdraw_alert(self, alert: Alert) -> Alert:
        """Take back one that is resolved, unless it has started; one that has not come yet will start nothing."""
        with self._alone() as connection:
            known = _known(connection, alert.run_id)
            if known and known.status not in ("waiting", "held"):
                return known
            words = "resolved before it started anything" if known else "resolved before its firing came"
            if known and known.outcome == ON_ITS_WAY:
                words = "resolved while it was on its way: it may still start"
            gone = replace(known or alert, status="withdrawn", settled_at=_now(), next_at=None, outcome=words)
            _put(connection, gone)
            _close(connection, gone)
            return gone

    def claim_alert(self, lease: timedelta) -> Alert | None:
        """The alert that is due and came first, for whoever calls alone until the lease ends; None if none is due."""
        now = datetime.now(UTC)
        due = _alerts.c.next_at.is_(None) | (_alerts.c.next_at <= _stamp(now))
        first = select(_alerts.c.run_id).where(_alerts.c.status == "waiting", due).limit(1)
        first = first.order_by(_alerts.c.received_at, _alerts.c.run_id)
        mine = update(_alerts).where(_alerts.c.run_id == first.scalar_subquery())
        mine = mine.values(next_at=_stamp(now + lease), outcome=ON_ITS_WAY)
        with self._alone() as connection:
            row = connection.execute(mine.returning(*_alerts.c)).mappings().first()
            return _alert(dict(row)) if row else None

    def settle_alert(self, alert: Alert, status: str, outcome: str) -> None:
        """Note what came of an alert: ``started`` or ``done``; ``failed`` closes the retraining that it asked for."""
        with self._alone() as connection:
            known = _known(connection, alert.run_id)
            _put(connection, replace(alert, status=status, outcome=outcome, settled_at=_now(), next_at=None))
            if status == "failed":
                _close(connection, alert)
            elif alert.asks and known and known.status == "withdrawn":  # too late: it was on its way
                _ask(connection, alert.asks, date.fromisoformat(alert.payload["as_of"]), "alert")

    def postpone_alert(self, alert: Alert, wait: timedelta, why: str) -> None:
        """Try an alert again later, unless it has been withdrawn meanwhile."""
        mine = (_alerts.c.run_id == alert.run_id) & (_alerts.c.status == "waiting")
        again = {"tries": alert.tries + 1, "next_at": _stamp(datetime.now(UTC) + wait), "outcome": why}
        with self._alone() as connection:
            connection.execute(update(_alerts).where(mine).values(**again))

    def alerts(self, *status: str, last: int | None = None) -> list[Alert]:
        """The inbox, the oldest first, or its ``last``, newest first; only those of a ``status``, if any is named."""
        order = (_alerts.c.received_at, _alerts.c.run_id)
        query = select(_alerts).order_by(*(column.desc() if last else column for column in order)).limit(last)
        with self._begin() as connection:
            found = connection.execute(query.where(_alerts.c.status.in_(status)) if status else query).mappings()
            return [_alert(dict(row)) for row in found]

    def inbox(self) -> Inbox:
        """How many alerts wait, and since when; no payload is read for it."""
        waits = _alerts.c.status == "waiting"
        retrains = case((_alerts.c.action == "retrain", _alerts.c.run_id))
        columns = (_alerts.c.received_at, _alerts.c.next_at, retrains)
        counted = select(func.count(), *map(func.min, columns)).where(waits)
        lately = _alerts.c.settled_at >= _stamp(datetime.now(UTC) - FAILED_SHOWN)
        failed = select(func.count()).where(_alerts.c.status == "failed", lately).scalar_subquery()
        with self._begin() as connection:
            return Inbox(*connection.execute(counted.add_columns(failed)).one())

    @contextmanager
    def _alone(self) -> Iterator[Connection]:
        """A transaction that keeps other ones of its kind out from its first read on.

        Threads of one process take turns: SQLite would let them sleep, and the unlucky one for seconds.
        """
        with self._turn, self._begin() as connection:
            connection.exec_driver_sql(_EXCLUSIVELY[self._engine.dialect.name])
            yield connection

    def clock(self) -> date | None:
        """The date of the example clock; None while the wall clock counts."""
        value = self._setting("clock")
        return date.fromisoformat(value) if value else None

    def set_clock(self, to: date | None) -> None:
        """Set the example clock; None gives the time back to the wall clock."""
        self._set("clock", to.isoformat() if to else None)

    def advance_clock(self, to: date) -> None:
        """Move the example clock forward to a monitored interval's end: never back, and not while it is not set."""
        now = self.clock()
        if now and now < to:
            self.set_clock(to)

    def projected(self) -> str | None:
        """The head of the ledger that the registry's aliases show, as far as we set them."""
        return self._setting("projected")

    def set_projected(self, head: str) -> None:
        """Note that the registry's aliases show the ledger up to ``head``."""
        self._set("projected", head)

    def _setting(self, name: str) -> str | None:
        with self._begin() as connection:
            value: str | None = connection.scalar(select(_settings.c.value).where(_settings.c.name == name))
            return value

    def _set(self, name: str, value: str | None) -> None:
        with self._begin() as connection:
            _upsert(connection, _settings, {"name": name, "value": value})

    def _make_sure(self) -> None:
        found = self._schema_version()
        if found is None:
            self._create()
        elif found > SCHEMA:
            raise BallastError(
                f"The state store has schema {found}, and this Ballast knows no newer than {SCHEMA}. "
                "Use a Ballast at least as new as the one that wrote it; nothing was changed."
            )
        elif found < SCHEMA:
            self._migrate()

    def _schema_version(self) -> int | None:
        with self._begin() as connection:
            if not inspect(connection).has_table(_schema.name):
                return None
            version: int | None = connection.scalar(select(_schema.c.version).order_by(_schema.c.version.desc()))
            return version

    def _create(self) -> None:
        """Make the tables; another process may be doing the same at this moment. The version comes last."""
        with self._begin() as connection:
            if self._engine.dialect.name == "postgresql":  # it looks for a table and makes it in two steps
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('ballast_schema'))")
            for table in metadata.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
            for index in _alerts.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))
        try:
            with self._begin() as connection:
                connection.execute(insert(_schema), {"version": SCHEMA})
        except IntegrityError:
            self._make_sure()

    def _migrate(self) -> None:
        """Bring an older store forward in one transaction: killed before its end, the store is as it was."""
        with self._begin() as connection:
            connection.exec_driver_sql(_EXCLUSIVELY[self._engine.dialect.name])
            found = connection.scalar(select(_schema.c.version).order_by(_schema.c.version.desc())) or SCHEMA
            for version in range(found, SCHEMA):  # none, if another process was first
                _MIGRATIONS[version](connection)
                connection.execute(insert(_schema), {"version": version + 1})

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise _trouble(self._engine, error) from None


def moves(ledger: list[Entry]) -> list[Entry]:
    """The entries that made a version champion."""
    return [entry for entry in ledger if entry.kind in MOVES]


def head_of(ledger: list[Entry]) -> str:
    """The hash of the last move of the champion. What else people say in the ledger leaves decisions as they are."""
    moved = moves(ledger)
    return moved[-1].hash if moved else GENESIS


def champions(ledger: list[Entry]) -> list[int]:
    """The champions that still count, the present one last: a rollback takes away those that came after its target."""
    standing: list[int] = []
    for entry in moves(ledger):
        assert entry.to_version is not None
        if entry.kind == "rollback" and entry.to_version in standing:
            while standing[-1] != entry.to_version:
                standing.pop()
        else:
            standing.append(entry.to_version)
    return standing


def frozen(ledger: list[Entry]) -> Entry | None:
    """The freeze that holds, if one does."""
    said = [entry for entry in ledger if entry.kind in ("freeze", "unfreeze")]
    return said[-1] if said and said[-1].kind == "freeze" else None


def quarantined(ledger: list[Entry]) -> dict[int, Entry]:
    """The versions that a rollback replaced, each with that rollback, until they are made champion again."""
    found: dict[int, Entry] = {}
    for entry in moves(ledger):
        assert entry.to_version is not None
        found.pop(entry.to_version, None)
        if entry.kind == "rollback" and entry.from_version:
            found[entry.from_version] = entry
    return found


def freeze_words(freeze: Entry) -> str:
    """A freeze in one line."""
    return f"frozen: {freeze.reason} ({said_by(freeze)})"


def said_by(entry: Entry) -> str:
    """Who is behind an entry, and since when it holds."""
    return f"by {entry.actor}, since {entry.at[:16].replace('T', ' ')} UTC"


def today(state: State | None = None) -> date:
    """The date of the clock: the example's own while it is set, else the wall clock's, UTC."""
    return (state or State()).clock() or datetime.now(UTC).date()


def _alert(row: Mapping[str, Any]) -> Alert:
    return Alert(**{**row, "payload": json.loads(row["payload"])})


def _known(connection: Connection, run_id: str) -> Alert | None:
    row = connection.execute(select(_alerts).where(_alerts.c.run_id == run_id)).mappings().first()
    return _alert(dict(row)) if row else None


def _put(connection: Connection, alert: Alert) -> None:
    """Write an alert; one that is new makes room for itself among those that are settled."""
    mine = delete(_alerts).where(_alerts.c.run_id == alert.run_id)
    if not connection.execute(mine).rowcount:
        settled, age = _alerts.c.status != "waiting", _alerts.c.received_at
        too_many = select(age).where(settled).order_by(age.desc()).offset(MOST_ALERTS_KEPT - 1).limit(1)
        old = (age < _stamp(datetime.now(UTC) - ALERTS_KEPT)) | (age <= too_many.scalar_subquery())
        connection.execute(delete(_alerts).where(settled, old))
    connection.execute(insert(_alerts), {**asdict(alert), "payload": canonical_json(alert.payload)})


def _ask(connection: Connection, asked_by: str, as_of: date, kind: str) -> None:
    mine = _retrainings.c.asked_by == asked_by
    connection.execute(delete(_retrainings).where(mine, _retrainings.c.run.is_(None)))
    if connection.scalar(select(_retrainings.c.asked_by).where(mine)) is None:
        connection.execute(insert(_retrainings), asdict(Retraining(asked_by, None, as_of.isoformat(), kind, _now())))


def _close(connection: Connection, alert: Alert) -> None:
    """Drop the retraining that an alert asked for and no run has begun: nothing waits for it any more."""
    connection.execute(delete(_retrainings).where(_retrainings.c.asked_by == alert.asks, _retrainings.c.run.is_(None)))


# One migration at a time, and nobody writes meanwhile. (SQLite's driver begins no transaction for DDL by itself.)
_EXCLUSIVELY = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE ballast_schema IN EXCLUSIVE MODE"}


def _to_2(connection: Connection) -> None:
    """An entry may stand that moves no champion while there is none; a decision keeps which data it was made on."""
    connection.exec_driver_sql("ALTER TABLE decisions ADD COLUMN data TEXT")
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql("ALTER TABLE ledger ALTER COLUMN to_version DROP NOT NULL")
        return
    columns = ", ".join(column.name for column in _ledger.columns)  # SQLite drops no constraint: the table is copied
    connection.exec_driver_sql("ALTER TABLE ledger RENAME TO ledger_1")
    connection.execute(CreateTable(_ledger))
    connection.exec_driver_sql(f"INSERT INTO ledger ({columns}) SELECT {columns} FROM ledger_1")
    connection.exec_driver_sql("DROP TABLE ledger_1")


def _to_3(_: Connection) -> None:
    """The tables stay; an older Ballast, which knows of no approval, must not promote what waits for one."""


def _to_4(connection: Connection) -> None:
    """What the monitor saw and which retrainings there were; a decision keeps the run that asked for it."""
    connection.exec_driver_sql("ALTER TABLE decisions ADD COLUMN run TEXT")
    for table in (_windows, _retrainings):
        connection.execute(CreateTable(table))


def _to_5(connection: Connection) -> None:
    """The inbox of the alert bridge; a decision keeps of its record what metrics count."""
    connection.execute(CreateTable(_alerts))
    for index in _alerts.indexes:
        connection.execute(CreateIndex(index))
    connection.exec_driver_sql("ALTER TABLE decisions ADD COLUMN facts TEXT")


def _upsert(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    """Write a row in the place of the one of its key, if there is one; of two writers at once the last one's stays."""
    dialect = {"sqlite": sqlite, "postgresql": postgresql}[connection.dialect.name]
    statement = dialect.insert(table).values(row)
    connection.execute(statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=row))


_MIGRATIONS: dict[int, Callable[[Connection], None]] = {1: _to_2, 2: _to_3, 3: _to_4, 4: _to_5}


def _faults(entry: Entry, before: Entry | None) -> list[str]:
    """What is wrong with one entry, given the one before it."""
    faults = []
    if entry.computed_hash() != entry.hash:
        faults.append(f"Entry {entry.seq} was changed: its hash does not fit what it says.")
    if entry.seq != (before.seq + 1 if before else 1):
        faults.append(f"Entries are missing before entry {entry.seq}.")
    if entry.prev_hash != (before.hash if before else GENESIS):
        faults.append(f"Entry {entry.seq} does not follow the entry before it: one of them was replaced.")
    if entry.from_version != (before.to_version if before else None):
        faults.append(f"Entry {entry.seq} starts from another champion than the one before it left.")
    return faults


def _engine(uri: str, pooled: bool) -> Engine:
    """An engine; without a pool a connection lives as long as its transaction, and no process inherits one."""
    pool: dict[str, Any] = {"pool_pre_ping": True} if pooled else {"poolclass": NullPool}
    try:
        url = make_url(uri)
        if url.get_backend_name() == "postgresql":
            return create_engine(url, connect_args=GIVE_UP, **pool)
        if url.get_backend_name() != "sqlite":
            raise ArgumentError(f"It must be SQLite or PostgreSQL (found {url.get_backend_name()}).")
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, **pool)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise BallastError(f"BALLAST_STATE_URI is no database that can be used: {error}") from None
    except OSError as error:
        raise BallastError(
            f"There can be no state store at {uri}: {error}. Set BALLAST_STATE_URI or BALLAST_VAR."
        ) from None
    event.listen(engine, "connect", _write_ahead)
    return engine


def _write_ahead(connection: Any, _: object) -> None:
    """SQLite's write-ahead log: readers and a writer do not wait for each other.

    The change to it, which a new file needs once, does not wait for others that make it: SQLite says at once that it is
    locked.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _trouble(engine: Engine, error: DBAPIError) -> BallastError:
    where = engine.url.render_as_string(hide_password=True)
    if engine.dialect.name == "sqlite" and "locked" in str(error.orig):
        return TryAgain(f"The state store {where} is locked by another process for over {BUSY_TIMEOUT_S} s. Try again.")
    if engine.dialect.name != "sqlite" and isinstance(error, OperationalError):
        return TryAgain(f"The state store {where} does not answer ({error.orig}). Start it, then try again.")
    if engine.dialect.name == "sqlite" and re.search("malformed|not a database", str(error.orig)):
        return BallastError(
            f"The state store {where} is damaged: {error.orig}. Put it back from a backup: the ledger is nowhere else."
        )
    return BallastError(
        f"The state store {where} cannot be used: {error.orig}. "
        "Check that the file and its folder can be written, or set BALLAST_STATE_URI."
    )


def _now() -> str:
    return _stamp(datetime.now(UTC))


def _stamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def _date(text: str) -> date | None:
    try:
        return None if text == "wall" else date.fromisoformat(text)
    except ValueError:
        raise BallastError(f"The clock's date must look like 2013-04-01, or be `wall` (found {text!r}).") from None


def main() -> None:
    """Print the clock's date, after setting it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.state")
    clock = parser.add_subparsers(required=True).add_parser("clock", help="the date of a run with no date of its own")
    clock.add_argument("--set", metavar="DATE", help="a date such as 2013-04-01, or wall for the wall clock")
    options = parser.parse_args()
    if options.set:
        State().set_clock(_date(options.set))
    print(today().isoformat())


if __name__ == "__main__":
    exit_with(main)
