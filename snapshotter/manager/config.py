"""Where settings come from: flag > SNAP_* variables > ~/.config/snap/config.toml > /etc/snap/config.toml.

Owns the names of the settings and the default place of the store. Reads files, creates nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snapshotter.base.errors import UsageError, wrap_os_error

SYSTEM_CONFIG = Path("/etc/snap/config.toml")
ROOT_STORE = Path("/var/lib/snap")


@dataclass(frozen=True, slots=True)
class Config:
    """Settings after all sources were merged."""

    store: Path
    store_from: str
    """Which source named the store: "--store", "SNAP_STORE", a config file's path, or "default"."""
    lock_wait_s: float = 10.0
    """How long rollback, forget and prune wait for a take that is under way."""


def user_config_path(env: Mapping[str, str]) -> Path:
    """~/.config/snap/config.toml, or below XDG_CONFIG_HOME."""
    base = env.get("XDG_CONFIG_HOME", "")
    home = Path(base) if base.startswith("/") else Path(env.get("HOME") or Path.home()) / ".config"
    return home / "snap" / "config.toml"


def default_store(env: Mapping[str, str], uid: int) -> Path:
    """/var/lib/snap for root, else snap/ in the XDG data directory."""
    if uid == 0:
        return ROOT_STORE
    base = env.get("XDG_DATA_HOME", "")
    home = Path(base) if base.startswith("/") else Path(env.get("HOME") or Path.home()) / ".local" / "share"
    return home / "snap"


def load(
    flag_store: str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    uid: int | None = None,
    system_config: Path = SYSTEM_CONFIG,
) -> Config:
    """Merge every source. Raises UsageError for a config file that cannot be understood."""
    env = os.environ if env is None else env
    uid = os.geteuid() if uid is None else uid
    store, store_from = default_store(env, uid), "default"
    lock_wait_s = 10.0
    for path in (system_config, user_config_path(env)):
        values = _read_file(path)
        if "store" in values:
            store, store_from = Path(_absolute(str(values["store"]), path, env)), str(path)
        if "lock_wait_s" in values:
            lock_wait_s = _number("lock_wait_s", values["lock_wait_s"], where=str(path))
    if env.get("SNAP_LOCK_WAIT_S"):
        lock_wait_s = _number("SNAP_LOCK_WAIT_S", env["SNAP_LOCK_WAIT_S"])
    if env.get("SNAP_STORE"):
        store, store_from = Path(env["SNAP_STORE"]).absolute(), "SNAP_STORE"
    if flag_store:
        store, store_from = Path(flag_store).absolute(), "--store"
    return Config(store=store, store_from=store_from, lock_wait_s=lock_wait_s)


def _absolute(text: str, config: Path, env: Mapping[str, str]) -> str:
    if text.startswith("~/"):
        text = f"{env.get('HOME') or Path.home()}/{text[2:]}"
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
    try:
        data = path.read_bytes()
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
    kinds: dict[str, tuple[type, ...]] = {"store": (str,), "lock_wait_s": (int, float)}
    for key, value in values.items():
        if key not in kinds:
            raise UsageError(
                f"unknown setting {key!r}", where=str(path), hint=f"known are {', '.join(kinds)}"
            )
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UsageError(f"setting {key!r} has the wrong type", where=str(path))
    return values
