"""Options that every command shares, as one decorator, and what they become: an `App`.

`--store`, `--json`, `--quiet` may stand before or after the command's name. Nothing here imports the
manager before a command runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from snapshotter.cli.output import Output

if TYPE_CHECKING:
    from snapshotter.manager.session import Session


def _default_session(flag_store: str | None, flag_owner: str | None = None) -> Session:
    from snapshotter.manager import config
    from snapshotter.manager.session import Session

    return Session(config.load(flag_store, flag_owner))


open_session: Callable[..., Session] = _default_session
"""Replaced by tests that bring a fake engine and store."""


STORE_OWNER_HELP = (
    "Use the store of USER, who is then trusted like you: what is in it may run with your rights."
)


@dataclass(frozen=True, slots=True)
class App:
    """What a command gets: where to print, and the manager's session."""

    out: Output
    flag_store: str | None
    flag_owner: str | None = None

    def session(self, *, max_frozen_s: float | None = None, tracker: str = "auto") -> Session:
        """A new session; use it in a `with`. The arguments: what the command line says of them."""
        session = open_session(self.flag_store, self.flag_owner)
        session.config = dataclasses.replace(session.config, tracker=tracker)
        if max_frozen_s is not None:
            session.config = dataclasses.replace(session.config, max_frozen_s=max_frozen_s)
        return session


class _Seconds(click.FloatRange):
    """A range that has no NaN in it: no comparison finds it outside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; a usage error for NaN too."""
        number = super().convert(value, param, ctx)
        if number != number:  # noqa: PLR0124 (NaN alone differs from itself)
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return number


def max_frozen(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --max-frozen, as `max_frozen_s`."""
    return click.option(
        "--max-frozen",
        "max_frozen_s",
        type=_Seconds(min=0, max=1e6, max_open=True),
        metavar="SECONDS",
        help="Let a job that stood still for so long go, and fail (default: SNAP_MAX_FROZEN, config, 5; 0: never).",
    )(command)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --store, --json and --quiet to a command; it gets an `App` as its first argument."""

    @click.option("--store", "flag_store", metavar="DIR", help="Store to use (default: SNAP_STORE, config).")
    @click.option("--store-owner", "flag_owner", metavar="USER", help=STORE_OWNER_HELP)
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only ids, warnings and errors.")
    @click.pass_context
    @functools.wraps(command)
    def wrapper(
        context: click.Context,
        /,
        *args: Any,
        flag_store: str | None,
        flag_owner: str | None,
        as_json: bool,
        quiet: bool,
        **kwargs: Any,
    ) -> Any:
        above: dict[str, Any] = context.find_root().obj or {}
        out = Output(as_json=as_json or bool(above.get("as_json")), quiet=quiet or bool(above.get("quiet")))
        app = App(out, flag_store or above.get("flag_store"), flag_owner or above.get("flag_owner"))
        return command(app, *args, **kwargs)

    return wrapper
