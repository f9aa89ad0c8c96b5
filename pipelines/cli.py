"""The command ``ballast``: what serves and why, the ledger, one version explained, what people may do, better settings.

Everything heavy is imported by the command that needs it: ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import socket
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipelines.errors import BallastError, exit_with

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.state import Entry, State

app = typer.Typer(
    help="Ballast keeps a model good while its data moves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
LAST_DECISIONS = 3


# --- status


@app.command(epilog="Example: ballast status --json | jq .champion.version")
def status(
    as_json: AsJson = False,
    repair: Annotated[bool, typer.Option(help="Set aliases that were moved by hand to what the ledger says.")] = False,
) -> None:
    """The champion, since when and why; what is frozen, in quarantine or paused; the last verdicts; what is up."""
    from pipelines import approval
    from pipelines import breaker as breakers
    from pipelines.freeze import shown
    from pipelines.state import State, frozen, quarantined

    state = State()
    inbox = state.inbox()
    registry = _registry(state, repair)
    ledger, problems = state.ledger(), state.verify()
    found = {
        "champion": _champion(ledger),
        "previous": state.previous_champion(),
        "frozen": shown(frozen(ledger)),
        "waiting": [_waiting(entry, state) for entry in approval.waiting(ledger)],
        "breaker": (stands := breakers.read(state, breakers.settings().refusals)).shown(),
        "quarantined": {version: shown(entry) for version, entry in quarantined(ledger).items()},
        "decisions": [_public(decision) for decision in state.decisions()[-LAST_DECISIONS:][::-1]],
        "ledger": {"entries": len(ledger), "problems": problems},
        "registry": registry,
        "alerts": {"waiting": inbox.waiting, "oldest": inbox.oldest, "failed": inbox.failed},
        "clock": str(state.clock() or "wall"),
        "services": (services := {name: _is_up(*at) for name, at in _addresses().items()}),
        "runs": _last_runs() if services["airflow"] else {},
    }
    _print_json(found) if as_json else _show_status(found, stands.words)


def _registry(state: State, repair: bool) -> dict[str, Any]:
    """Whether the aliases agree with the ledger. What a killed promotion left undone is done here."""
    from pipelines import champion

    try:
        completed = champion.behind(state)
        odds = champion.moved_by_hand(state)
        if completed or (repair and odds):
            champion.project(state)
        return {"agrees": repair or not odds, "completed": completed, "odds": None if repair else odds, "away": None}
    except BallastError as error:
        return {"agrees": None, "completed": False, "odds": None, "away": str(error)}


def _champion(ledger: list[Entry]) -> dict[str, Any] | None:
    from pipelines.state import moves

    if not (moved := moves(ledger)):
        return None
    last = moved[-1]
    return {
        "version": last.to_version,
        "since": last.at,
        "as_of": last.as_of,
        "by": last.kind,
        "reason": last.reason,
        "actor": last.actor,
        "record_sha256": last.record_sha256,
    }


def _waiting(entry: Entry, state: State) -> dict[str, Any]:
    """A decision that waits for a person: which, why, since when, and where it is answered."""
    from urllib.parse import quote

    from pipelines import embedded

    decision, (dag, _, run) = state.decision(str(entry.record_sha256)), entry.actor.partition("/")
    form = (
        f"{embedded.people_s_airflow_url()}/dags/{quote(dag)}/runs/{quote(run, safe='')}/tasks/approve/required_actions"
    )
    version = decision.version if decision else None
    return {
        "version": version,
        "reason": entry.reason,
        "since": entry.at,
        "record_sha256": entry.record_sha256,
        "form": form,
    }


def _addresses() -> dict[str, tuple[str, int]]:
    """Host and port of the services: those that we are told to use, else the embedded ones."""
    from urllib.parse import urlsplit

    from pipelines import embedded

    told = {"airflow": os.environ.get("BALLAST_AIRFLOW_URL", ""), "mlflow": os.environ.get("MLFLOW_TRACKING_URI", "")}
    ports = {"airflow": embedded.airflow_port(), "mlflow": embedded.mlflow_port()}
    found = {}
    for name, url in told.items():
        parts = urlsplit(url if url.startswith("http") else f"http://127.0.0.1:{ports[name]}")
        found[name] = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    return found


def _last_runs() -> dict[str, dict[str, str]]:
    """The last run of each DAG that has one; none if Airflow is not up, or is not ours to ask."""
    from pipelines import embedded

    try:
        client = embedded.connect()
        runs = {dag["dag_id"]: client.last_run(dag["dag_id"]) for dag in client.dags()}
    except BallastError:
        return {}
    return {
        dag: {"run": run.run_id, "state": run.state, "ended": run.ended.isoformat() if run.ended else ""}
        for dag, run in sorted(runs.items())
        if run
    }


def _is_up(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=0.3).close()
        return True
    except OSError:
        return False


def _show_status(found: dict[str, Any], breaker: str) -> None:
    out, champion, registry = _console(), found["champion"], found["registry"]
    if champion:
        since = f"since {_when(champion['since'])} (as of {champion['as_of']}), by {champion['actor']}"
        _line(out, "champion", f"[bold]v{champion['version']}[/bold] {since}")
        _line(out, "", f"{_done(champion['by'])}: {_plain(champion['reason'])}")
        _line(out, "previous", f"v{found['previous']}" if found["previous"] else "none")
    else:
        _line(out, "champion", "none yet")
    _show_freeze(out, found["frozen"])
    for waits in found["waiting"]:
        said = f"v{waits['version']} waits since {_when(waits['since'])}: {_plain(waits['reason'])}"
        _line(out, "[bold yellow]APPROVAL[/bold yellow]  ", said)
        _line(out, "", f"Answer it in Airflow: {waits['form']}")
    for version, held in found["quarantined"].items():
        _line(out, "quarantine", f"v{version} {_held_words(held)}")
    if found["breaker"]["refusals"]:
        style = "bold red" if found["breaker"]["open"] else "default"
        _line(out, "breaker", f"[{style}]{_plain(breaker.removeprefix('breaker '))}[/{style}]")
    for number, decision in enumerate(found["decisions"]):
        said = f"v{decision['version']} as of {decision['as_of']}: {_plain(decision['summary'])}"
        _line(out, "" if number else "verdicts", said)
    problems = found["ledger"]["problems"]
    _line(
        out,
        "ledger",
        "[bold red]TAMPERED WITH[/bold red]" if problems else f"{found['ledger']['entries']} entries, whole",
    )
    for problem in problems:
        _line(out, "", f"[red]{_plain(problem)}[/red]")
    _line(out, "registry", _registry_words(registry))
    if said := _inbox_words(found["alerts"]):
        _line(out, "alerts", f"[yellow]{said}[/yellow]: ballast alerts")
    if found["clock"] != "wall":
        _line(out, "clock", f"{found['clock']} (the example's)")
    for number, (dag, run) in enumerate(found["runs"].items()):
        ended = f", {_when(run['ended'])}" if run["ended"] else ""
        _line(out, "" if number else "last runs", f"{dag}: {run['state']}{ended}")
    at = {name: f"on {'' if host in _HERE else host}:{port}" for name, (host, port) in _addresses().items()}
    up = [f"{_NAMES[name]} {'up' if is_up else 'not up'} {at[name]}" for name, is_up in found["services"].items()]
    _line(out, "services", " · ".join(up))


def _inbox_words(alerts: dict[str, Any]) -> str:
    """The alerts that a person may have to see to."""
    waiting, failed = alerts["waiting"], alerts["failed"]
    waits = f"{waiting} wait{'s' * (waiting == 1)} for Airflow, since {_when(alerts['oldest'])}" if waiting else ""
    return " · ".join(filter(None, [waits, f"{failed} failed for good" if failed else ""]))


def _show_freeze(out: Console, frozen: dict[str, Any] | None) -> None:
    if frozen:
        _line(
            out, "[bold red]FROZEN[/bold red]     ", f"{_held_words(frozen)}. Lift it: ballast unfreeze --reason TEXT"
        )


def _held_words(held: dict[str, Any]) -> str:
    return f"{_plain(held['reason'])}, by {_plain(held['actor'])}, since {_when(held['since'])}"


_NAMES = {"airflow": "Airflow", "mlflow": "MLflow"}
_HERE = ("127.0.0.1", "localhost")


def _registry_words(registry: dict[str, Any]) -> str:
    if registry["away"]:
        return f"[yellow]{_plain(registry['away'])}[/yellow]"
    if registry["odds"]:
        return f"[bold red]moved by hand[/bold red]: {registry['odds']}. Put it right: ballast status --repair"
    return "agrees with the ledger" + (" (a promotion that was cut off is completed)" if registry["completed"] else "")


# --- alerts


@app.command(epilog="Example: ballast alerts --last 100 --json | jq '.alerts[] | select(.status == \"failed\")'")
def alerts(
    last: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """What the alert bridge was asked for and what came of it, the newest first."""
    from dataclasses import asdict

    from pipelines.state import State

    found = State().alerts(last=last)
    if as_json:
        _print_json({"alerts": [asdict(alert) for alert in found]})
        return
    out = _console()
    if not found:
        out.print("The inbox is empty: no alert has come.")
    for alert in found:
        style = {"failed": "bold red", "waiting": "yellow"}.get(alert.status, "default")
        status = f"[{style}]{alert.status:<9}[/{style}]"
        words = " ".join(f"{alert.payload['reason']} · {alert.outcome or 'accepted'}".split())
        out.print(f"{_when(alert.received_at)}  {alert.action:<8}  {status}  {_plain(alert.run_id)}  {_plain(words)}")


# --- history


@app.command(epilog="Example: ballast history --json | jq '.entries[-1]'")
def history(as_json: AsJson = False) -> None:
    """The ledger, one line an event; exit code 1 if it was tampered with."""
    from dataclasses import asdict

    from pipelines.state import State

    state = State()
    ledger, problems = state.ledger(), state.verify()
    registry = _registry(state, repair=False)
    if as_json:
        _print_json({"entries": [asdict(entry) for entry in ledger], "problems": problems, "registry": registry})
    else:
        _show_history(ledger, problems, registry)
    if problems:
        raise typer.Exit(1)


def _show_history(ledger: list[Entry], problems: list[str], registry: dict[str, Any]) -> None:
    from pipelines.state import MOVES

    out = _console()
    if not ledger and not problems:
        out.print("The ledger is empty: no model was promoted yet.")
    for entry in ledger:
        before = f"v{entry.from_version}" if entry.from_version else "none"
        moved = f"{before} → v{entry.to_version}" if entry.kind in MOVES else before
        about = f"{_plain(entry.reason)}  [dim]{_plain(entry.actor)}[/dim]"
        kind = f"[bold red]{'FORCE':<8}[/bold red]" if entry.kind == "force" else f"{entry.kind:<8}"
        out.print(f"{entry.seq:>3}  {_when(entry.at)}  as of {entry.as_of}  {kind}  {moved:<10}  {about}")
    for problem in problems:
        out.print(f"[bold red]TAMPERED WITH[/bold red]  {_plain(problem)}")
    if registry["odds"]:
        out.print(_registry_words(registry))


# --- explain


@app.command(epilog="Example: ballast explain 2, or: ballast explain --data flights/2013-02-03")
def explain(
    version: Annotated[int | None, typer.Argument(help="The number of a registered version.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Which versions saw this partition: its file, or TABLE/PARTITION.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Why a version serves or not: data, code, settings, verdicts, what started it, when it served. Or who saw data."""
    from pipelines.state import State

    if version is not None and data is None:
        from pipelines.explain import explain as explained

        found = explained(version, State())
        _print_json(found) if as_json else _show_version(found)
    elif data is not None and version is None:
        from pipelines.lineage import seen

        found = seen(data, State())
        _print_json(found) if as_json else _show_partition(found)
    else:
        raise BallastError(
            "Name a version or a partition: `ballast explain 2`, or `ballast explain --data flights/2013-02-03`."
        )


def _show_version(found: dict[str, Any]) -> None:
    out = _console()
    out.print(f"[bold]{found['model']} v{found['version']}[/bold] · {found['kind']} · model {found['digest'][:12]}")
    for number, time in enumerate(found["served"]):
        _line(out, "" if number else "served", _served_words(time))
    if not found["served"]:
        _line(out, "served", "never")
    if found["quarantined"]:
        _line(out, "quarantine", f"rolled back: {_held_words(found['quarantined'])}")
    _show_freeze(out, found["frozen"])
    for decision in found["decisions"]:
        _show_decision(out, decision)
    if not found["decisions"]:
        _line(out, "decision", "none: the gate has not seen it")
    for number, (name, window) in enumerate(found["data"]["windows"].items()):
        said = f"{name:<10} {window['start'][:10]} → {window['end'][:10]}  {window['rows']:,} rows"
        _line(out, "" if number else "data", f"{said}, {window['label_rate']:.1%} positive")
    _line(out, "", f"as of {found['data']['as_of']} · dvc.lock {found['data']['lock'][:12] or 'none'}")
    _show_records(out, found)
    _line(out, "code", f"commit {found['code']['commit']}")
    started = found["started_by"]
    said = " · ".join(str(started[key]) for key in ("kind", "reason", "actor") if started.get(key))
    _line(out, "started by", _plain(said))
    if alert := found["alert"]:
        from pipelines.record import alert_words

        _line(out, "alert", _plain(alert_words(alert)))
    tests = {key[5:]: value for key, value in found["metrics"].items() if key.startswith("test_")}
    _line(out, "test", " · ".join(f"{key.replace('_', ' ')} {value:,.4g}" for key, value in sorted(tests.items())))
    _line(out, "parameters", _plain(", ".join(f"{key} {value}" for key, value in sorted(found["params"].items()))))
    _line(out, "MLflow run", found["run_id"])


def _show_records(out: Console, found: dict[str, Any]) -> None:
    from pipelines.lineage import MANIFEST, UV_LOCK, VERDICT

    missing = {name: _missing_words(why) for name, why in found["missing"].items()}
    tables = found["data"]["tables"]
    said = [_table_words(name, table) for name, table in tables.items()] if tables else [missing[MANIFEST]]
    for number, words in enumerate(said):
        _line(out, "" if number else "partitions", words)
    verdict = found["validation"]
    _line(out, "validation", _verdict_words(verdict) if verdict else missing[VERDICT])
    for warning in verdict["warnings"] if verdict else []:
        _line(out, "", f"[yellow]warned[/yellow]  {_plain(warning['message'])}")
    environment = {name: value for name, value in found["environment"].items() if value is not None}
    md5 = environment.get("uv_lock_md5")
    lock = f"uv.lock {md5[:12]} (MD5)" if md5 else f"uv.lock {missing[UV_LOCK]}"
    said = [_plain(f"{name.replace('_', ' ')} {environment[name]}") for name in _ENVIRONMENT if name in environment]
    _line(out, "environment", " · ".join([lock, *said]))


_ENVIRONMENT = ("python", "torch", "threads", "machine", "cpu_capability", "gpu", "image")


def _missing_words(why: str) -> str:
    return f"[yellow]not on record[/yellow]: {_plain(why)}"


def _table_words(name: str, table: dict[str, Any]) -> str:
    count, first, last = len(table["partitions"]), table["first"], table["last"]
    span = first if count == 1 else f"{count} partitions, {first} to {last}"
    return f"{name:<10} {span}, {table['rows']:,} rows  [dim]{table['sha256'][:12]}[/dim]"


def _verdict_words(verdict: dict[str, Any]) -> str:
    passed = "passed" if verdict["passed"] else "[red]REJECTED[/red]"
    warnings, aside = len(verdict["warnings"]), sum(verdict["quarantined"].values())
    counts = f"{verdict['expectations']} expectations · {warnings} warning{'s' * (warnings != 1)}"
    return f"{passed} · {counts}, {aside:,} row{'s' * (aside != 1)} in quarantine"


def _show_partition(found: dict[str, Any]) -> None:
    out = _console()
    bytes_here = f"SHA-256 {found['sha256'][:12]}" if found["sha256"] else "its file is not here"
    out.print(f"[bold]{_plain(found['table'])}/{_plain(found['partition'])}[/bold] · {bytes_here}")
    for one in found["versions"]:
        said = [_missing_words(one["missing"]) if one["missing"] else _saw_words(one), f"as of {one['as_of']}"]
        champion = ["[bold]champion[/bold]"] if one["champion"] else []
        _line(out, f"v{one['version']}", " · ".join([*said, *champion]))
    if not found["versions"]:
        out.print("  No version is registered yet.")


def _saw_words(one: dict[str, Any]) -> str:
    if not one["sha256"]:
        return "no such partition"
    colour = {"these bytes": "green", "another revision": "yellow"}.get(one["saw"], "default")
    hashes = " + ".join(digest[:12] for digest in one["sha256"])
    return f"[{colour}]{one['saw']}[/{colour}] {hashes}, {one['rows']:,} rows · {_use_words(one)}"


def _use_words(one: dict[str, Any]) -> str:
    if one["used_as"] == ["reference"]:
        return "reference table"
    refit = " (refitted on it)" if one["refit"] and "validation" in one["used_as"] else ""
    return f"{' and '.join(one['used_as'])} window{refit}" if one["used_as"] else "landed, in no window"


def _served_words(time: dict[str, Any]) -> str:
    since = f"since {_when(time['since'])}, {_done(time['by'])}: {_plain(time['reason'])}"
    if time["until"] is None:
        return f"[bold]champion[/bold] {since}"
    until = f"until {_when(time['until'])}, replaced by v{time['replaced_by']} ({_plain(time['replaced_because'])})"
    return f"{since}; {until}"


def _show_decision(out: Console, decision: dict[str, Any]) -> None:
    _line(out, "decision", f"{_plain(decision['summary'])}  [dim]record {decision['record_sha256'][:12]}[/dim]")
    if decision["missing"]:
        _line(out, "", f"[red]{_plain(decision['missing'])}[/red]")
        return
    for word in decision["approval"]:
        _line(out, "", f"[bold]{_plain(word)}[/bold]")
    for rule in decision["record"]["rules"]:
        failed = "[red]blocked[/red]" if rule["severity"] == "block" else "[yellow]warned[/yellow]"
        mark = "[green]passed[/green]" if rule["passed"] else failed
        _line(out, "", f"{mark}  {_plain(rule['rule'])}: {_plain(rule['words'])}")


# --- promote, freeze, rollback

Reason = Annotated[str, typer.Option(help="Why; it stays in the ledger.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command(
    epilog="Example: ballast promote 3, or with the gate wrong and the house on fire: "
    'ballast promote 3 --force --reason "the champion predicts NaN since 9:00"'
)
def promote(
    version: Annotated[int, typer.Argument(help="The number of a registered version.")],
    force: Annotated[bool, typer.Option("--force", help="Round gate, freeze and quarantine. Asks once.")] = False,
    reason: Annotated[str, typer.Option(help="Why by force; it stays in the ledger.")] = "",
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a version champion on the gate's newest decision on it. Exit code 1 if it is held."""
    from pipelines import promote as promotion
    from pipelines.state import State

    if reason and not force:
        raise BallastError("`--reason` goes with `--force`: without it, the reason in the ledger is the gate's.")
    state = State()
    found = _forced(version, reason, state, yes) if force else promotion.promote_newest(version, state)
    _print_json(found) if as_json else typer.echo(found["summary"])
    if found["verdict"] == "held":
        raise typer.Exit(1)


def _forced(version: int, reason: str, state: State, yes: bool) -> dict[str, Any]:
    """Say what stands against a version, ask, and promote it all the same."""
    from pipelines import promote as promotion
    from pipelines import provenance

    provenance.stated(reason, "A promotion by force")
    head, standing = state.head(), promotion.against(version, state)
    for words in standing or ["nothing: its record holds"]:
        typer.secho(f"against v{version}: {words}", fg="red", err=True)
    if not yes:
        now = f"v{state.champion()}" if state.champion() else "none"
        typer.confirm(f"The champion is {now}. Promote v{version} BY FORCE? It stays in the ledger.", abort=True)
    return promotion.force(version, reason, state, head)


@app.command(epilog='Example: ballast freeze --reason "the peak season: no new model until January"')
def freeze(reason: Reason, as_json: AsJson = False) -> None:
    """Stop automatic promotion: retraining goes on, and what passes the gate waits. A rollback is still possible."""
    from pipelines import freeze as freezing
    from pipelines.state import State

    found = freezing.freeze(State(), reason)
    _print_json(found) if as_json else typer.echo(found["summary"])


@app.command(epilog='Example: ballast unfreeze --reason "the season is over"')
def unfreeze(reason: Reason, as_json: AsJson = False) -> None:
    """Let versions be promoted again."""
    from pipelines import freeze as freezing
    from pipelines.state import State

    found = freezing.unfreeze(State(), reason)
    _print_json(found) if as_json else typer.echo(found["summary"])


@app.command(epilog='Example: ballast rollback --reason "complaints from the control room"')
def rollback(
    reason: Reason,
    to: Annotated[int | None, typer.Option(help="A version that was champion once; else the champion before.")] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Back to the champion before, frozen or not. Asks once. No machine promotes the replaced model again."""
    from pipelines import rollback as back
    from pipelines.state import State, head_of

    state = State()
    ledger = state.ledger()
    goal = back.target(ledger, to)
    if not yes:
        typer.confirm(f"The champion is v{ledger[-1].to_version}. Go back to v{goal}?", abort=True)
    found = back.rollback(state, reason, goal, head=head_of(ledger))
    _print_json(found) if as_json else typer.echo(found["summary"])


# --- breaker


breaker = typer.Typer(
    help="The circuit breaker, which pauses automatic retraining after too many refusals in a row.",
    epilog='Example: ballast breaker reset --reason "the features are mended"',
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(breaker, name="breaker")


@breaker.command(epilog='Example: ballast breaker reset --reason "the features are mended"')
def reset(reason: Reason, as_json: AsJson = False) -> None:
    """Close it: automatic retraining goes on, and the refusals are counted anew. `ballast status` shows it."""
    from pipelines import breaker as breakers
    from pipelines.state import State

    found = breakers.reset(State(), reason, breakers.settings().refusals)
    _print_json(found) if as_json else typer.echo(found["summary"])


# --- card


@app.command(epilog="Example: ballast card 2 --html card.html")
def card(
    version: Annotated[int, typer.Argument(help="The number of a registered version.")],
    html: Annotated[Path | None, typer.Option(help="Write it as a page, with its plots, to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """The model card of a version, as of now: intended use, data, worth, slices, limits, and where it comes from."""
    from pipelines import card as cards
    from pipelines.files import whole_file
    from pipelines.state import State

    found = cards.facts(version, State())
    if html:
        with whole_file(html) as part:
            part.write_text(cards.html(found), encoding="utf-8")
    if as_json:
        _print_json(found)
    else:
        typer.echo(f"written to {html}" if html else cards.markdown(found).strip())


# --- reproduce


@app.command(epilog="Example: ballast reproduce 2")
def reproduce(
    version: Annotated[int, typer.Argument(help="The number of a registered version.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="The largest difference of a prediction that still counts as equal.")
    ] = 0.01,
    build: Annotated[bool, typer.Option(help="Install the recorded environment where this is another.")] = True,
    as_json: AsJson = False,
) -> None:
    """The same model again, from its records. Exit code: 0 identical, 3 equal within the tolerance, 4 different."""
    from pipelines import reproduce as again

    out = _console()

    def say(name: str, text: str) -> None:
        if not as_json:
            _line(out, name, _plain(text))

    found = again.reproduce(version, tolerance, build, say)
    _print_json(found) if as_json else _show_reproduction(found)
    raise typer.Exit(again.EXIT_CODES[found["outcome"]])


def _show_reproduction(found: dict[str, Any]) -> None:
    out, digest, predictions = _console(), found["digest"], found["predictions"]
    name, rows = f"{found['model']} v{found['version']}", f"{predictions['rows']:,} test rows"
    if found["outcome"] == "identical":
        same = f"model {digest['reproduced'][:12]} and its predictions on {rows} are those of {name}, to the last bit"
        _line(out, "IDENTICAL", f"[green]{same}[/green]")
        return
    models = f"model {digest['reproduced'][:12]}, registered as {digest['registered'][:12]}"
    differing = f"{predictions['differing']:,} of {rows} are predicted otherwise"
    largest = f"by at most {predictions['max_difference']:.2g} (tolerance {found['tolerance']:g})"
    _line(out, found["outcome"].upper(), f"[yellow]{models}; {differing}, {largest}[/yellow]")
    for reason in found["reasons"]:
        _line(out, "", _plain(reason))


# --- gc


@app.command(epilog="Example: ballast gc --days 30 --yes")
def gc(
    keep: Annotated[
        int,
        typer.Option(
            min=0, envvar="BALLAST_KEEP_RUNS", help="Of each DAG: the workspaces of the last runs that ended well."
        ),
    ] = 3,
    days: Annotated[
        int,
        typer.Option(
            min=0,
            envvar="BALLAST_KEEP_FAILED_DAYS",
            help="For so long stay a failed run's workspace, a refused model, data nobody names.",
        ),
    ] = 14,
    reports: Annotated[int, typer.Option(min=0, help="Evidently's reports on the last windows.")] = 12,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without it nothing is touched.")] = False,
    as_json: AsJson = False,
) -> None:
    """What can go: old workspaces, refused models, old reports, unnamed data. It goes only with --yes."""
    from pipelines import gc as collecting

    found = (collecting.collect if yes else collecting.plan)(keep, days, reports)
    total = sum(waste.bytes for waste in found)
    if as_json:
        shown = [{"kind": one.kind, "name": one.name, "why": one.why, "bytes": one.bytes} for one in found]
        _print_json({"removed": yes, "bytes": total, "waste": shown})
        return
    out = _console()
    for one in found:
        _line(out, one.kind, f"{_plain(one.name):<48} {_megabytes(one.bytes):>10}   {_plain(one.why)}")
    ends = "removed" if yes else "would go; nothing was touched. `ballast gc --yes` removes it"
    _line(out, "together", f"{_megabytes(total)} {ends}" if found else "nothing can go")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# --- replay


@app.command(
    epilog="Example: ballast replay --from 2013-04 --to 2013-12 --policy never --policy schedule --policy drift"
)
def replay(
    first: Annotated[str, typer.Option("--from", help="The first month; a champion is trained as of its first day.")],
    last: Annotated[str, typer.Option("--to", help="The last month.")],
    policy: Annotated[
        list[str],
        typer.Option(
            help="Again for each: never, schedule (each month), params (all of it), or the only kind of trigger left: "
            "drift, performance, estimated_performance, avoidable_loss."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """What each retraining policy would have done with the past. Goes on where an earlier call ended."""
    from pipelines import replay as replaying
    from pipelines import worth

    months = replaying.month(first), replaying.month(last)
    with replaying.watched(*months, policy) as show:
        found = replaying.replay(*months, policy, show)
    _print_json(found) if as_json else _show_replay(found, worth.table(found))


def _show_replay(found: dict[str, Any], table: str) -> None:
    out = _console()
    out.print(_plain(f"\n{table}\n"))
    steps = " · ".join(f"{step} {seconds:.0f}" for step, seconds in found["seconds"].items())
    _line(out, "seconds", f"{sum(found['seconds'].values()):.0f}: {steps}")
    _line(out, "page", _plain(f"{found['folder']}/index.html"))


# --- tune


@app.command(epilog="Example: ballast tune --kind tabm --trials 40 --budget 30m")
def tune(
    kind: Annotated[
        Literal["tabm", "hgb", "logistic"] | None, typer.Option(help="What is tuned; else the first of the candidates.")
    ] = None,
    sampler: Annotated[Literal["tpe", "random", "grid"], typer.Option(help="How settings are drawn.")] = "tpe",
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many there are to be in the study: else 30, or the whole grid.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="The longest that it may take: 90s, 10m, 1h30m.")] = None,
    folds: Annotated[int, typer.Option(min=1, help="How many origins of time, each with its validation days.")] = 3,
    study: Annotated[
        str | None, typer.Option(help="Its name: one that is there goes on. Else the kind and the as-of date.")
    ] = None,
    space: Annotated[Path | None, typer.Option(help="The search space; else pipelines/tune.yaml.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Better settings for one kind of candidate, as a diff for params.yaml. Goes on where an earlier run ended."""
    began, budget_s = monotonic(), _seconds(budget) if budget else float("inf")
    from pipelines import tune as tuning

    budget_s -= monotonic() - began  # the imports take seconds

    asked = tuning.Asked(kind, sampler, trials, budget_s, folds, study, space or tuning.SPACE, seed)
    found = tuning.tune(Path("data/prepare"), Path("params.yaml"), asked)
    _print_json(found) if as_json else _show_tuning(found)
    if found["ended"] in _EXIT_CODES:
        raise typer.Exit(_EXIT_CODES[found["ended"]])
    if not found["present"]:
        raise BallastError("The budget was used up before the present settings were measured. Give it more.")


def _seconds(budget: str) -> float:
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", budget)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise BallastError(f"--budget must be a time such as 90s, 10m or 1h30m (found {budget!r}).")
    return float(total)


def _show_tuning(found: dict[str, Any]) -> None:
    from pipelines.tune import words

    out, trials, best = _console(), found["trials"], found["best"]
    counts = f"{trials['complete']} complete, {trials['pruned']} pruned, of {trials['asked']}"
    _line(out, "study", f"{found['study']}: {counts}{_ENDED[found['ended']]}")
    for number, trial in enumerate(best):
        by_fold = " ".join(f"{loss:.4f}" for loss in trial["by_fold"])
        said = f"{trial['log_loss']:.4f}  [dim]{by_fold}[/dim]  {_plain(words(trial['changed']))}"
        _line(out, "" if number else "best", said)
    if found["present"] and found["present"] not in best:
        _line(out, "present", f"{found['present']['log_loss']:.4f}")
    for number, (name, share) in enumerate(found["importance"].items()):
        _line(out, "" if number else "importance", f"{share:>4.0%}  {name}")
    if found["diff"]:
        _show_gain(out, found)
    elif best and found["gain"]:
        _line(out, "result", "nothing better than the present settings was found")


_ENDED = {
    "trials": "",
    "budget": "; the budget is used up",
    "interrupted": "; interrupted, the same call goes on",
    "terminated": "; terminated, the same call goes on",
}
_EXIT_CODES = {"interrupted": 130, "terminated": 143}


def _show_gain(out: Console, found: dict[str, Any]) -> None:
    gain = found["gain"]
    error = f" ± {gain['standard_error']:.4f}" if gain["standard_error"] is not None else ""
    by_fold = ", ".join(f"{fold:+.4f}" for fold in gain["by_fold"])
    said = f"[bold]better by {gain['log_loss']:.4f}{error}[/bold] than the present settings (by fold {by_fold})"
    _line(out, "result", said)
    if gain["log_loss"] <= (gain["standard_error"] or 0.0):
        _line(out, "", "[yellow]no more than its standard error over the folds: hardly a difference[/yellow]")
    if not found["competes"]:
        _line(out, "", f"{found['kind']} does not compete yet: add it to `train.candidates`")
    for line in found["diff"].splitlines():
        colour = {"+": "green", "-": "red"}.get(line[:1])
        out.print(f"[{colour}]{_plain(line)}[/{colour}]" if colour else _plain(line))
    _line(out, "apply", f"git apply {_plain(found['diff_file'])}")


# --- output


def _console() -> Console:
    """Plain text where nobody is at a terminal; no line is broken."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _line(out: Console, name: str, text: str) -> None:
    out.print(f"  {name:<10} {text}")


def _plain(text: str) -> str:
    """Text from outside, whose brackets are no markup."""
    from rich.markup import escape

    return escape(text)


def _when(at: str) -> str:
    return f"{datetime.fromisoformat(at):%Y-%m-%d %H:%M} UTC"


def _done(kind: str) -> str:
    return {"promote": "promoted", "rollback": "rolled back to", "force": "promoted BY FORCE"}.get(kind, kind)


def _public(decision: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(decision)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """The entry point of ``ballast``."""
    exit_with(app)


if __name__ == "__main__":
    main()
