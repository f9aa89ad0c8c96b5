"""The champion's place: the ledger is its truth; the registry's aliases, and the marks on the pages, its projection."""

from __future__ import annotations

from pipelines import registry, timeline
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
