"""Notifications out: what a step came to, or that a run failed, to a Slack-compatible webhook and by e-mail.

Off until the environment names a connection: docs/notifications.md. Airflow calls a notifier once the task's state is
stored, so a receiver that is down, slow or wrong changes nothing and holds nobody up; the task's log says so.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from functools import cached_property

from airflow.sdk import BaseNotifier, Context

PATIENCE_S = 10  # for a receiver
EVENTS = {
    "promotion": "Promoted",
    "refusal": "Refused",
    "rollback": "Rolled back",
    "approval": "Waits for approval",
    "breaker": "Retraining paused",
    "failure": "Failed",
}
VERDICTS = {
    ("decide", "refuse"): "refusal",
    ("admit", "pause"): "breaker",
    ("review", "ask"): "approval",
    ("review", "refuse"): "refusal",
    ("answer", "refuse"): "refusal",
    ("promote", "promoted"): "promotion",
    ("rollback", None): "rollback",
}
"""What each step's verdict is told as; of all others nothing is told."""


class BallastNotifier(BaseNotifier):
    """Tell every receiver of what a person should hear of."""

    template_fields = ()  # words come from data: nothing in them is a template

    def __init__(self, slack: str, smtp: str, mail_to: str, wanted: frozenset[str]) -> None:
        super().__init__()
        self.slack, self.smtp, self.mail_to, self.wanted = slack, smtp, mail_to, wanted

    def notify(self, context: Context) -> None:
        """Send one message to each receiver, if this is of interest; one that fails leaves a warning in the log."""
        event = event_of(context)
        if event not in self.wanted:
            return
        title, lines = message(event, context)
        for name, send in (("Slack", self._send_slack), ("e-mail", self._send_mail)):
            try:
                send(title, lines, context)
            except Exception as error:  # whatever it is: the run goes on without it
                self.log.warning("The notification by %s was not sent (%s: %s).", name, type(error).__name__, error)

    def _send_slack(self, title: str, lines: list[str], context: Context) -> None:
        if self.slack:
            from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier

            text = "\n".join([f"*{_slack(title)}*", *map(_slack, lines)])
            to = SlackWebhookNotifier(slack_webhook_conn_id=self.slack, text=text, timeout=PATIENCE_S)
            to.notify(context)  # type: ignore[no-untyped-call]

    def _send_mail(self, title: str, lines: list[str], context: Context) -> None:
        if self.smtp:
            from airflow.providers.smtp.hooks.smtp import SmtpHook
            from airflow.providers.smtp.notifications.smtp import SmtpNotifier

            class Hook(SmtpHook):
                timeout = PATIENCE_S  # the connection's 30 s six times would keep the worker's slot for minutes
                smtp_retry_limit = 1

            class Notifier(SmtpNotifier):
                @cached_property
                def hook(self) -> SmtpHook:
                    return Hook(smtp_conn_id=self.smtp_conn_id)

            body = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
            Notifier(to=self.mail_to, subject=title, html_content=body, smtp_conn_id=self.smtp).notify(context)


def callbacks(environment: Mapping[str, str] = os.environ) -> list[BallastNotifier]:
    """The notifier that the environment asks for, if it names a receiver; raises ValueError for half a setting."""
    slack, smtp, mail_to, events = (
        environment.get(f"BALLAST_NOTIFY_{name}", "").strip()
        for name in ("SLACK_CONN", "SMTP_CONN", "MAIL_TO", "EVENTS")
    )
    if bool(smtp) != bool(mail_to):
        raise ValueError(
            f"BALLAST_NOTIFY_SMTP_CONN is {smtp!r} and BALLAST_NOTIFY_MAIL_TO is {mail_to!r}: set both, or neither."
        )
    wanted = frozenset(name.strip() for name in events.split(",") if name.strip()) or frozenset(EVENTS)
    if unknown := sorted(wanted - set(EVENTS)):
        raise ValueError(f"BALLAST_NOTIFY_EVENTS may name {', '.join(EVENTS)} (found {', '.join(unknown)}).")
    return [BallastNotifier(slack, smtp, mail_to, wanted)] if slack or smtp else []


def event_of(context: Context) -> str | None:
    """What has happened, in a word of EVENTS; None where nobody need hear of it."""
    if context.get("exception") or context["ti"].state == "failed":
        return "failure"
    task = context["ti"].task
    result = getattr(task, "result", None) or {}
    if result.get("moved") is False:  # promoted before: this run was only repeated
        return None
    return VERDICTS.get((getattr(task, "step", ""), result.get("verdict")))


def message(event: str, context: Context) -> tuple[str, list[str]]:
    """A title and the lines below it: what happened, in which run, and where to look."""
    ti, run = context["ti"], context["dag_run"]
    if event == "failure":
        error = context.get("exception")
        said = str(error) if error else "The task was ended before it could say why; its log has the last lines."
    else:
        said = getattr(ti.task, "result")["summary"]  # noqa: B009 - a StepOperator's
    title = f"Ballast · {EVENTS[event]} · {run.dag_id}" + (f".{ti.task_id}" if event == "failure" else "")
    return title, [said, f"Run {run.run_id}", str(getattr(ti, "log_url", "") or "")]


def _slack(text: str) -> str:
    """Slack's three control characters, escaped: data cannot mention a channel or make a link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
