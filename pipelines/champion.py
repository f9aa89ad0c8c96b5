"""The champion's place: the ledger is its truth; the registry's aliases, and the marks on the pages, its projection."""

from __future__ import annotations

from pipelines import registry, timeline
from pipelines.errors import BallastError
from pipelines.state import GENESIS, State, champions, head_of


def project(state: State) -> None:
    """Set the aliases to what the ledger says; look again if it moved meanwhile, so that the last word is shown."""
    shown = GENESIS
    while (head := head_of(ledger := state.ledger())) != shown:
        standing = champions(ledger)
        registry.project(standing[-1], standing[-2] if len(standing) > 1 else None)
        state.set_projected(shown := head)
    timeline.show(state)


def behind(state: State) -> bool:
    """Whether the aliases were not set after the last move: the process that wrote it was killed in between."""
    return (head := state.head()) != GENESIS and state.projected() != head


def refuse_strangers(state: State) -> None:
    """Raise BallastError where ledger and registry are not of one another: one is empty, or of another project.

    Judged by such a pair, the next challenger would take a champion's place as if there had been none.
    """
    model, said = registry.name(), registry.aliases().get("champion")
    standing = champions(state.ledger())  # after the aliases, which come second where a champion moves
    if not standing and said:
        raise BallastError(
            f"The registry says that {model} v{said} is the champion, and the ledger knows of none: it was lost, or is "
            "not this registry's. Put the state store back from a backup, or name the right one by BALLAST_STATE_URI. "
            f"(Lost for good? `ballast promote {said} --force --reason TEXT` begins a new one.)"
        )
    if standing and standing[-1] not in (there := {version.number for version in registry.versions()}):
        anew = "`ballast promote VERSION --force --reason TEXT`" if there else "a new ledger, by BALLAST_STATE_URI"
        raise BallastError(
            f"The ledger says that {model} v{standing[-1]} is the champion, and the registry has no such version: it "
            "was lost, or is not this ledger's. Put MLflow's database back from a backup, or name the right one by "
            f"MLFLOW_TRACKING_URI. (Lost for good? Begin anew: {anew}.)"
        )


def moved_by_hand(state: State) -> str | None:
    """What the aliases say against the ledger, if someone moved them behind its back."""
    standing = champions(state.ledger())
    wanted = dict(zip(("champion", "previous"), reversed(standing), strict=False))
    found = {alias: number for alias, number in registry.aliases().items() if alias in ("champion", "previous")}
    if found == wanted or behind(state):
        return None
    return f"the registry says {_words(found)}, and the ledger {_words(wanted)}"


def _words(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias} v{number}" for alias, number in sorted(aliases.items())) or "no champion"
