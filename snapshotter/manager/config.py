"""Where settings come from: flag > SNAP_* variables > ~/.config/snap/config.toml > /etc/snap/config.toml.

Owns the names of the settings and the default place of the store. Reads files, creates nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snapshotter.base import trust
from snapshotter.base.errors import UsageError, wrap_os_error

SYSTEM_CONFIG = Path("/etc/snap/config.toml")
ROOT_STORE = Path("/var/lib/snap")
_MAX_BYTES = 1 << 16
_HINT = "whoever writes the configuration chooses where the store is: use your own (sudo -H), or XDG_CONFIG_HOME=/root/.config"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings after all sources were merged."""

    store: Path
    store_from: str
    """Which source named the store: "--store", "SNAP_STORE", a config file's path, or "default"."""
    store_owner: int | None = None
    """Who besides root and the caller is trusted with the store (--store-owner)."""
    lock_wait_s: float = 10.0
    """How long rollback, forget and prune wait for a take that is under way."""
    max_frozen_s: float = 5.0
    """How long a job may stand still before it is let go and the command fails; 0: as long as it takes."""
    tracker: str = "auto"
    """How takes find written pages; from the command line only."""


def user_config_path(env: Mapping[str, str]) -> Path:
    """~/.config/snap/config.toml, or below XDG_CONFIG_HOME."""
    base = env.get("XDG_CONFIG_HOME", "")
    home = Path(base) if base.startswith("/") else _home(env) / ".config"
    return home / "snap" / "config.toml"


def _home(env: Mapping[str, str]) -> Path:
    """The user's; for one that no table knows, a directory that does not exist."""
    try:
        return Path(env.get("HOME") or Path.home())
    except RuntimeError:
        return Path("/nonexistent")


def default_store(env: Mapping[str, str], uid: int) -> Path:
    """/var/lib/snap for root, else snap/ in the XDG data directory."""
    if uid == 0:
        return ROOT_STORE
    base = env.get("XDG_DATA_HOME", "")
    home = Path(base) if base.startswith("/") else _home(env) / ".local" / "share"
    return home / "snap"


def load(
    flag_store: str | None = None,
    flag_owner: str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    uid: int | None = None,
    system_config: Path = SYSTEM_CONFIG,
) -> Config:
    """Merge every source.

    Raises:
        UsageError: a config file cannot be understood, or there is no such user.
        PermissionDeniedError: a config file is in the hands of somebody that the caller need not trust (sudo -E).
    """
    env = os.environ if env is None else env
    uid = os.geteuid() if uid is None else uid
    store, store_from = default_store(env, uid), "default"
    lock_wait_s, frozen_s = 10.0, 5.0
    for path in (system_config, user_config_path(env)):
        values = _read_file(path)
        if "store" in values:
            store, store_from = Path(_absolute(str(values["store"]), path, env)), str(path)
        if "lock_wait_s" in values:
            lock_wait_s = _number("lock_wait_s", values["lock_wait_s"], where=str(path))
        if "max_frozen_s" in values:
            frozen_s = _number("max_frozen_s", values["max_frozen_s"], where=str(path))
    if env.get("SNAP_MAX_FROZEN"):
        frozen_s = _number("SNAP_MAX_FROZEN", env["SNAP_MAX_FROZEN"])
    if env.get("SNAP_LOCK_WAIT_S"):
        lock_wait_s = _number("SNAP_LOCK_WAIT_S", env["SNAP_LOCK_WAIT_S"])
    if env.get("SNAP_STORE"):
        store, store_from = Path(env["SNAP_STORE"]).absolute(), "SNAP_STORE"
    if flag_store:
        store, store_from = Path(flag_store).absolute(), "--store"
    owner = None if flag_owner is None else _uid(flag_owner)
    return Config(
        store=store, store_from=store_from, store_owner=owner, lock_wait_s=lock_wait_s, max_frozen_s=frozen_s
    )


def _uid(user: str) -> int:
    import pwd

    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError) as error:
        raise UsageError(f"--store-owner: there is no user {user!r}", hint="a name or a number") from error


def _absolute(text: str, config: Path, env: Mapping[str, str]) -> str:
    if text.startswith("~/"):
        text = f"{_home(env)}/{text[2:]}"
    if not text.startswith("/"):
        raise UsageError("`store` must be an absolute path", where=str(config))
    return text


def _number(name: str, given: str | float, *, where: str = "") -> float:
    try:
        value = float(given)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name}={given!r} is not a number of seconds", where=where) from error
    if not 0 <= value < 1e6:  # nan is not either
        raise UsageError(f"{name}={given!r} is out of range", where=where, hint="seconds, from 0 on")
    return value


def _read_file(path: Path) -> dict[str, str | float]:
    if not os.path.lexists(path):
        return {}  # whoever owns the directories: nothing is read
    try:
        data = trust.read(path, trust.callers(), limit=_MAX_BYTES, hint=_HINT).data
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise wrap_os_error(error, "cannot read the configuration", where=str(path)) from error
    # 4 ms of import that most runs, which have no file, need not pay.
    import tomllib

    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from error
    kinds: dict[str, tuple[type, ...]] = {
        "store": (str,),
        "lock_wait_s": (int, float),
        "max_frozen_s": (int, float),
    }
    for key, value in values.items():
        if key not in kinds:
            raise UsageError(
                f"unknown setting {key!r}", where=str(path), hint=f"known are {', '.join(kinds)}"
            )
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UsageError(f"setting {key!r} has the wrong type", where=str(path))
    return values
