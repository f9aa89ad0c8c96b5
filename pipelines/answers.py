"""The four questions about a window, each answered apart, in a word and in a sentence with its numbers.

What an older verdict has not got is not judged: see windows.complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.windows import Verdict, entry, excess, own, window_name

Tone = Literal["good", "watch", "bad", "unknown"]


@dataclass(frozen=True)
class Answer:
    """One of the four questions: its answer in a word, in a sentence with the numbers, and what to know beside it."""

    question: str
    short: str
    sentence: str
    tone: Tone
    aside: str = ""


def answers(verdict: Verdict, realised: Verdict | None = None) -> list[Answer]:
    """The four, of a complete verdict; ``realised`` is what is known by now of the window's labels."""
    return [
        _data(verdict["data"]),
        _inputs(verdict["inputs"]),
        _predictions(verdict),
        _model(verdict, realised),
    ]


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None) -> str:
    """``0.470 ± 0.020``, or the number alone where its standard error is not known."""
    return fixed(value) + ("" if error is None or value is None else f"\u00a0±\u00a0{error:.3f}")


def _data(found: Verdict) -> Answer:
    question = "Is the data broken?"
    if found["rejected"]:
        return Answer(question, "Yes", "Validation rejected it.", "bad")
    if found["empty"]:
        return Answer(question, "Yes", f"Not one value came for {', '.join(found['empty'])}.", "bad")
    if found["out_of_scale"]:
        names = ", ".join(found["out_of_scale"])
        return Answer(question, "Yes", f"As after a change of unit, far too large: {names}.", "bad")
    if not found["validated"]:
        return Answer(question, "Not checked", "No verdict of validation lies beside this batch.", "unknown")
    checked = f"{found['expectations']} expectations checked" if found["expectations"] else "It passed validation"
    aside = f"{_count(found['warnings'], 'warning')}, {_count(found['quarantined'], 'row')} in quarantine"
    return Answer(question, "No", f"{checked}: {aside}.", "good")


def _inputs(found: Verdict) -> Answer:
    question = "Have the inputs moved?"
    columns, judged = found["columns"], found["judged"]
    unmeasured = f"{len(columns) - judged} could not be measured." if judged < len(columns) else ""
    if found["moved"] is None:
        return Answer(question, "Not measured", unmeasured or "There is nothing to compare with.", "unknown")
    scored = {name: far for name, column in columns.items() if (far := excess(column)) is not None}
    most = max(scored, key=lambda name: scored[name], default=None)
    furthest = f"Furthest: {most} with {columns[most]['words']}." if most else ""
    aside = " ".join(part for part in (furthest, unmeasured) if part)
    if not found["moved"]:
        return Answer(question, "No", f"None of {_count(judged, 'column')}.", "good", aside)
    moved = f"{len(found['moved_columns'])} of {_count(judged, 'column')}"
    return Answer(question, "Yes", f"{moved}{_importance(found)}", "watch", aside)


def _importance(found: Verdict) -> str:
    """What has moved, by what the champion makes of it."""
    if found["weighted_share"] is None:
        return "."
    names = ", ".join(found["critical_moved"])
    critical = f"; critical: {names}" if names else ""
    raises = {True: " Enough to raise.", False: " Too little to raise.", None: ""}[found["raises"]]
    return f", {found['weighted_share']:.0%} of the model's importance{critical}.{raises}"


def _predictions(verdict: Verdict) -> Answer:
    question, found = "Have the predictions moved?", verdict["predictions"]
    if found["moved"] is None:
        return Answer(question, "Not measured", found["words"] or "There is nothing to compare with.", "unknown")
    means = f"Mean probability {fixed(found['mean'])}, was {fixed(found['reference_mean'])}."
    distance = f"Distance {fixed(found['score'], 2)}, bound {fixed(found['threshold'], 2)}."
    rate, rows = verdict["performance"]["label_rate"], verdict["performance"]["labelled_rows"]
    aside = f"Came true: {fixed(rate)} of {rows:,} labelled rows." if own(verdict) and rate is not None else ""
    short: tuple[str, Tone] = ("Yes", "watch") if found["moved"] else ("No", "good")
    return Answer(question, short[0], f"{means} {distance}", short[1], aside)


def _model(verdict: Verdict, realised: Verdict | None) -> Answer:
    """By the window's own labels; before they have come by the estimate, unless the newest labels say that it is."""
    question, found, estimate = "Is the model worse?", verdict["performance"], verdict["estimate"]
    record = _record(estimate)
    if own(verdict):
        before = f"Estimated {_estimated(estimate)} before the labels." if estimate["measured"] else ""
        return Answer(question, *_judged(found, [_labels(verdict)]), _join([_avoidable(found), before, record]))
    since = f"Realised since then: {with_error(realised['log_loss'], realised['standard_error'])}." if realised else ""
    if not estimate["measured"] and not found["measured"]:
        return Answer(question, "Not judged", found["words"] or "There is no champion yet.", "unknown", since)
    said = [_expectation(estimate)] if estimate["measured"] else []
    if found["measured"]:
        said.insert(0 if found["worse"] else 1, _labels(verdict))
    judged = _judged(found, said) if found["worse"] or not estimate["measured"] else _expected(estimate, said)
    return Answer(question, *judged, _join([_avoidable(found), since, record]))


def _judged(found: Verdict, said: list[str]) -> tuple[str, str, Tone]:
    if found["standard_error"] is None:
        return "Not judged", _join(said), "unknown"
    if found["worse"]:
        return "Yes", _join(said), "bad"
    certain: tuple[str, Tone] = (
        ("No", "good") if found["rise"] <= found["standard_error"] else ("Not certainly", "watch")
    )
    return certain[0], _join(said), certain[1]


def _expected(estimate: Verdict, said: list[str]) -> tuple[str, str, Tone]:
    """Before the labels have come nothing is certain."""
    if estimate["worse"] is None:
        return "Not judged", _join(said), "unknown"
    return ("Probably", _join(said), "watch") if estimate["worse"] else ("Probably not", _join(said), "good")


def _labels(verdict: Verdict) -> str:
    """What the newest labels say, and of which window they are if not of this one."""
    found, of = verdict["performance"], entry(verdict) if own(verdict) else None
    name = "" if own(verdict) else f"Newest labels, of {window_name(found['start'], found['end'])}: "
    loss = with_error(found["log_loss"], of["standard_error"] if of else None)
    losses = f"Log loss {loss}, was {fixed(found['reference_log_loss'])}: {_change(found)}"
    auc = (
        f" AUC {found['auc']:.3f}, was {found['reference_auc']:.3f}." if found["auc"] and found["reference_auc"] else ""
    )
    alone = " Too few days to tell." if found["standard_error"] is None else ""
    sentence = f"{losses} on {found['labelled_rows']:,} labelled rows.{auc}{alone}"
    return name + (sentence[0].lower() + sentence[1:] if name else sentence)


def _avoidable(found: Verdict) -> str:
    """How much of the loss a retraining could have saved, as far as labels tell."""
    words: str = found["avoidable"]["words"]
    return words[:1].upper() + words[1:] + "." if words else ""


def _expectation(estimate: Verdict) -> str:
    was = fixed(estimate["reference_log_loss"])
    return f"Estimated log loss {_estimated(estimate)} before the labels, was {was}: {_change(estimate)}."


def _estimated(estimate: Verdict) -> str:
    return with_error(estimate["log_loss"], estimate["log_loss_standard_error"])


def _change(found: Verdict) -> str:
    return f"{'worse' if found['rise'] > 0 else 'better'} by {with_error(abs(found['rise']), found['standard_error'])}"


def _record(estimate: Verdict) -> str:
    """How far the champion's estimates were off, as far as their labels have come."""
    errors = [one["error"] for one in estimate["tracked"]]
    if not errors:
        return ""
    off, bias = sum(map(abs, errors)) / len(errors), sum(errors) / len(errors)
    way = "low" if bias < 0 else "high"
    return f"Estimates so far were off by {off:.3f}, too {way} by {abs(bias):.3f} ({_count(len(errors), 'window')})."


def _join(sentences: list[str]) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
