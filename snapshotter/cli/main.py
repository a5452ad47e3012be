"""Entry point of `snap`: finds the command's module, turns every error into one message and exit status.

Command modules are imported when asked for, and import the manager when they run, so that `snap --help`
and shell completion are quick and `snap list` never loads the engine.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from snapshotter import __version__
from snapshotter.base.errors import InterruptedByUserError, SnapshotterError, UsageError
from snapshotter.cli.options import STORE_OWNER_HELP
from snapshotter.cli.output import (
    ReaderGoneError,
    UnprintableError,
    flush,
    guard_tracebacks,
    show_error,
    write_error,
    write_traceback,
)

COMMANDS = {
    "take": "Take a point of a running job.",
    "list": "List points.",
    "show": "Show what a point holds.",
    "rollback": "Bring a job back as it was at a point.",
    "verify": "Check that points can be read back whole.",
    "check": "Say whether a job can be taken, without touching it.",
    "doctor": "Say what this machine, user and store are fit for.",
    "forget": "Remove points from the list; prune frees their space.",
    "prune": "Free the space of forgotten points.",
}
"""Name -> first line of help, in the order of `snap --help`; each is `snapshotter.cli.<name>:command`."""

_MODULES = {"list": "list_"}

_HANDLE_PAGES = frozenset({"take", "show", "rollback", "verify", "check", "prune", "doctor"})
_LEAST_ADDRESS_SPACE = 160 << 20
"""What numpy's libraries, threads and our buffers need; with less, OpenBLAS ends the process with a message of its own."""


class LazyGroup(click.Group):
    """A group whose commands are modules imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, by its full name."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in _HANDLE_PAGES:
            _require_address_space(cmd_name)
        module = import_module(f"snapshotter.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="snap")
@click.option("--store", "flag_store", metavar="DIR", help="Store to use (default: SNAP_STORE, config).")
@click.option("--store-owner", "flag_owner", metavar="USER", help=STORE_OWNER_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print only ids, warnings and errors.")
@click.pass_context
def cli(
    ctx: click.Context, flag_store: str | None, flag_owner: str | None, as_json: bool, quiet: bool
) -> None:
    """Take points in time of running Linux jobs, and roll them back.

    A POINT is named by its id (any unique beginning of 4 or more digits), `latest`, `latest~2`,
    the JOB's name (its latest point) or `JOB~3`.
    """
    ctx.obj = {"flag_store": flag_store, "flag_owner": flag_owner, "as_json": as_json, "quiet": quiet}


def _require_address_space(command: str) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LEAST_ADDRESS_SPACE:
        raise SnapshotterError(
            f"out of memory: `ulimit -v` allows {limit >> 10} KiB, `snap {command}` needs at least "
            f"{_LEAST_ADDRESS_SPACE >> 10} KiB",
            hint="raise it: ulimit -v unlimited",
        )


class _TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived; not an Exception, so that nothing in between swallows it."""


def _on_signal(signum: int, frame: Any) -> NoReturn:
    raise _TerminatedError(signal.Signals(signum).name)


def run(args: Sequence[str]) -> int:
    """Run one command line; returns the exit status. Prints errors, never raises."""
    as_json = _wants_json(args)
    try:
        try:
            status = cli.main(args=list(args), prog_name="snap", standalone_mode=False)
            flush()
        except click.exceptions.Exit as error:
            flush()
            return int(error.exit_code)
        except click.Abort:
            raise KeyboardInterrupt from None
        except click.exceptions.NoArgsIsHelpError as error:
            if as_json:
                raise UsageError("which command?", hint="snap --help") from error
            for line in (error.ctx.get_help() if error.ctx else "").split("\n"):
                write_error(line)
            return UsageError.exit_status
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx is not None else "snap"
            raise UsageError(error.format_message().rstrip("."), hint=f"{path} --help") from error
        except click.ClickException as error:
            raise UsageError(error.format_message()) from error
        return status if isinstance(status, int) else 0
    except ReaderGoneError as error:
        return error.exit_status
    except SnapshotterError as error:
        return _fail(error, as_json)
    except (KeyboardInterrupt, _TerminatedError) as error:
        # A second Ctrl-C must not print a traceback over the message.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        name = str(error) or "SIGINT"
        return _fail(
            InterruptedByUserError(
                f"interrupted by {name}", hint="points taken before are untouched; run it again"
            ),
            as_json,
        )
    except Exception as error:
        return _fail(_internal(error), as_json)


def _fail(error: SnapshotterError, as_json: bool) -> int:
    if os.environ.get("SNAP_DEBUG"):
        cause = sys.exception() or error
        write_traceback(type(cause), cause, cause.__traceback__)
    try:
        show_error(error, as_json=as_json and not isinstance(error, UnprintableError))
        flush()
    except SnapshotterError:  # stdout itself is what fails
        write_error(f"snap: {error}")
    return error.exit_status


def _internal(error: Exception) -> SnapshotterError:
    """A bug, or a kernel refusal that nobody gave a sentence to."""
    if isinstance(error, OSError) and error.errno:
        from snapshotter.base.errors import wrap_os_error

        return wrap_os_error(error, "an operation failed", where=str(error.filename or ""))
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and "map segment" in str(error)):
        return SnapshotterError("out of memory", hint="free some, or raise the limit (ulimit -v)")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return SnapshotterError(
            "no thread can be started: out of memory, or of processes",
            hint="raise the limits (ulimit -v, ulimit -u, pids.max of the control group)",
        )
    return SnapshotterError(
        f"internal error: {type(error).__name__}: {error}", hint="SNAP_DEBUG=1 shows where; please report it"
    )


def _wants_json(args: Sequence[str]) -> bool:
    """Whether errors go to stdout as JSON; needed before the command line was understood."""
    words = list(args)
    if "--" in words:
        words = words[: words.index("--")]
    return "--json" in words


def _have_standard_descriptors() -> None:
    """A closed 0, 1 or 2 would become the number of the next file that is opened, and messages would go there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


_GC_THRESHOLD = 200_000
_SWITCH_INTERVAL_S = 0.001


def main() -> NoReturn:
    """The `snap` command. Cron starts it again and again, so what it does not need is not done."""
    _have_standard_descriptors()
    guard_tracebacks()
    # Importing makes some 120,000 objects that stay: looking through them again and again is a fifth of the start.
    gc.set_threshold(_GC_THRESHOLD)
    # The threads that compress need the interpreter for a moment at a time, and would wait 5 ms for it.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Linear algebra is all that numpy would start threads for, and there is none here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Whoever started us may ignore it, which is inherited; then none of our children could be waited for.
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, _on_signal)
    status = run(sys.argv[1:])
    # Everything is written and closed: taking hundreds of modules apart would change nothing but the time.
    os._exit(status)


if __name__ == "__main__":
    main()
