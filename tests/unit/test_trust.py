"""Paths that a stranger could turn are refused: pid files, stores, configurations. Users are chowned, not logged in."""

import os
import shutil
import tempfile
import threading
import traceback
from pathlib import Path

import pytest

from snapshotter.base import trust
from snapshotter.base.errors import PermissionDeniedError, SnapshotterError, TargetGoneError, UsageError
from snapshotter.manager import config, pidfile
from snapshotter.manager.ports import Identity
from snapshotter.manager.session import Session
from snapshotter.manager.take import take as take_point
from store import Store
from tests.fakes import FakeEngine, FakeStore
from tests.unit.store_helpers import page, restored, take

pytestmark = pytest.mark.requires("root")
NOBODY, DAEMON = 65534, 1


@pytest.fixture
def folder(tmp_path):
    """/.../mine, of root and 0755."""
    made = tmp_path / "mine"
    made.mkdir(mode=0o755)
    return made


def own(path, uid, mode=None):
    os.lchown(path, uid, uid)
    if mode is not None:
        path.chmod(mode)
    return path


def read(path, **options):
    return trust.read(path, {0}, limit=100, hint="h", **options)


WAYS = {
    # owner and mode of the directory, of the file
    "its directory belongs to another": (NOBODY, 0o755, 0, 0o644),
    "others may write its directory": (0, 0o757, 0, 0o644),
    "a group may write its directory": (0, 0o775, 0, 0o644),
    "it belongs to another": (0, 0o755, NOBODY, 0o644),
    "others may write it": (0, 0o755, 0, 0o646),
    "a group may write it": (0, 0o755, 0, 0o664),
    "it lies in a sticky directory and belongs to another": (0, 0o1777, NOBODY, 0o644),
    "a sticky directory belongs to another": (NOBODY, 0o1777, 0, 0o644),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_stranger_could_have_written_is_refused(folder, way):
    file = folder / "file"
    file.write_text("5")
    assert read(file).data == b"5"
    folders, folder_mode, files, file_mode = WAYS[way]
    own(folder, folders, folder_mode)
    own(file, files, file_mode)
    with pytest.raises(PermissionDeniedError) as caught:
        read(file)
    assert caught.value.where in {str(file), str(folder)}
    assert caught.value.hint


@pytest.mark.parametrize("above", [1, 2])
def test_each_directory_on_the_way_counts(folder, above):
    file = folder / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.write_text("5")
    own(file.parents[above], NOBODY)
    with pytest.raises(PermissionDeniedError):
        read(file)


def test_links(folder, tmp_path):
    (folder / "file").write_text("5")
    (folder / "near").symlink_to("file")
    (folder / "far").symlink_to(f"{tmp_path}/mine/../mine/near")
    assert read(folder / "far").data == b"5"
    own(folder / "near", NOBODY)
    with pytest.raises(PermissionDeniedError):
        read(folder / "far")
    own(folder / "near", 0)
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    (tmp / "link").symlink_to(folder / "file")
    with pytest.raises(PermissionDeniedError, match="symbolic link"):
        read(tmp / "link")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(PermissionDeniedError, match="too many"):
        read(folder / "loop")


def test_a_link_of_a_strangers_directory_is_not_followed(folder, tmp_path):
    """The link leads to what root owns; who made it is what counts."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "real" / "file").write_text("5")
    own(folder, NOBODY)
    (folder / "way").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionDeniedError):
        read(folder / "way" / "file")
    with pytest.raises(PermissionDeniedError):
        Store.open(folder / "way", create=True)
    assert os.listdir(tmp_path / "real") == ["file"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket"])
def test_what_is_no_file_is_not_even_opened(folder, kind):
    path = folder / "odd"
    make = {
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "device": lambda: os.mknod(path, 0o20600, os.makedev(1, 5)),
        "socket": lambda: os.mknod(path, 0o140600),
    }
    make[kind]()
    done = threading.Event()

    def look():
        with pytest.raises(SnapshotterError, match="regular"):
            read(path)
        done.set()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    assert done.wait(10), "it waits for a writer"


def test_a_long_file_is_refused(folder):
    (folder / "file").write_text("5" * 101)
    with pytest.raises(SnapshotterError, match="longer"):
        read(folder / "file")


def identity(*uids):
    return Identity(7, 100, "boot", "sim", 1.0, 2.0, 3.0, frozenset(uids))


@pytest.mark.parametrize(
    ("owner", "uids", "right"),
    [
        (NOBODY, {NOBODY}, True),
        (NOBODY, {0}, False),
        (NOBODY, {NOBODY, 0}, False),  # a set-uid program of theirs
        (NOBODY, {DAEMON}, False),
        (0, {0}, True),
        (0, {NOBODY}, True),
        (0, {DAEMON, NOBODY}, True),
    ],
)
@pytest.mark.parametrize("which", ["file", "directory"])
def test_a_pid_file_names_processes_of_its_owner_only(folder, owner, uids, right, which):
    file = folder / "pid"
    file.write_text("7\n")
    own(file if which == "file" else folder, owner)
    found = pidfile.read(file)
    if right:
        pidfile.require_right(found, identity(*uids))
        return
    with pytest.raises(PermissionDeniedError, match="may only name"):
        pidfile.require_right(found, identity(*uids))


def test_a_pid_file_of_two_users_names_nobodys_process(folder):
    (folder / "pid").write_text("7")
    own(folder / "pid", NOBODY)
    own(folder, DAEMON)
    for uids in ({NOBODY}, {DAEMON}, {NOBODY, DAEMON}):
        if len(uids) == 1:
            with pytest.raises(PermissionDeniedError):
                pidfile.require_right(pidfile.read(folder / "pid"), identity(*uids))


@pytest.mark.parametrize("way", ["file", "directory"])
def test_a_users_link_does_not_make_root_read_a_file_for_them(folder, tmp_path, way, monkeypatch):
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    (secret / "pid").write_text("7\n")
    own(folder, NOBODY)
    link = folder / "link"
    link.symlink_to(secret / "pid" if way == "file" else secret)
    os.lchown(link, NOBODY, NOBODY)
    real_open = os.open

    def only_paths(path, flags, *args, **more):
        assert flags & os.O_PATH, "it was opened for reading"
        return real_open(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", only_paths)
    with pytest.raises(PermissionDeniedError, match=f"link that uid {NOBODY} could have made"):
        pidfile.read(link if way == "file" else link / "pid")


def test_a_users_link_to_a_file_of_their_own_is_followed(folder):
    (folder / "pid").write_text("7\n")
    own(folder / "pid", NOBODY)
    own(folder, NOBODY)
    (folder / "link").symlink_to("pid")
    os.lchown(folder / "link", NOBODY, NOBODY)
    assert pidfile.read(folder / "link").pid == 7


@pytest.mark.parametrize("text", ["root:$6$hash:1:2", "8888888888 secret", "-77 secret", "9" * 4000])
def test_no_error_quotes_a_pid_file(folder, text):
    (folder / "pid").write_text(text)
    with pytest.raises(UsageError, match="no pid in it") as caught:
        pidfile.read(folder / "pid")
    assert text.split(maxsplit=1)[0] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_a_pid_file_that_others_may_write_is_refused(folder, mode):
    (folder / "pid").write_text("7")
    (folder / "pid").chmod(mode)
    with pytest.raises(PermissionDeniedError, match="others may write"):
        pidfile.read(folder / "pid")


@pytest.mark.parametrize("way", ["link", "directory", "writable", "made before"])
def test_a_store_that_a_stranger_could_turn(folder, tmp_path, way):
    """Neither made nor opened, and nothing is written anywhere."""
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    if way == "link":
        tmp = tmp_path / "tmp"
        tmp.mkdir()
        tmp.chmod(0o1777)
        (tmp / "s").symlink_to(target)
        own(tmp / "s", NOBODY)
        path = tmp / "s"
    elif way == "directory":
        path = own(folder, NOBODY) / "s"
    elif way == "writable":
        folder.chmod(0o777)
        path = folder / "s"
    else:
        folder.chmod(0o1777)
        path = folder / "s"
        path.mkdir(mode=0o700)
        own(path, NOBODY)
    for create in (True, False):
        if create or path.exists():
            with pytest.raises(PermissionDeniedError):
                Store.open(path, create=create)
    assert os.listdir(target) == []
    assert way == "made before" or not (folder / "s").exists()


@pytest.fixture
def open_folder():
    """A directory of nobody's that nobody can reach, which tmp_path is not."""
    made = Path(tempfile.mkdtemp(prefix="trust-"))
    yield own(made, NOBODY, 0o755)
    shutil.rmtree(made)


def as_nobody(work):
    """Exit status of a child that does it without root's rights. All modules must be loaded: it may not read them."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_store_of_another_when_told_so(open_folder, tmp_path):
    """What root writes there belongs to the owner, who goes on with it."""
    with Store.open(tmp_path / "warm", create=True) as store:
        take(store, page(9))
        store.prune()
    path, data = open_folder / "s", page(1) + page(2)

    def nobodys_take():
        with Store.open(path, create=True) as store:
            take(store, data, job=f"nobody{len(store.points())}")

    assert as_nobody(nobodys_take) == 0
    with pytest.raises(PermissionDeniedError) as caught:
        Store.open(path)
    assert "--store-owner" in caught.value.hint
    with Store.open(path, owner=NOBODY) as store:
        point = store.resolve("nobody0")
        assert restored(store, point) == data
        take(store, page(3), job="other")
        store.forget([point])
        store.prune()
    found = [path, *path.rglob("*")]
    assert {item.lstat().st_uid for item in found} == {NOBODY}, found
    assert as_nobody(nobodys_take) == 0


def test_configuration_of_another(folder):
    """sudo -E keeps HOME: whoever owns that must not choose where root writes."""
    home = folder / "home"
    file = home / ".config" / "snap" / "config.toml"
    file.parent.mkdir(parents=True)
    system = folder / "none"

    def load():
        return config.load(env={"HOME": str(home)}, uid=0, system_config=system)

    own(home, NOBODY)
    assert load().store_from == "default"
    file.write_text('store = "/tmp/elsewhere"\n')
    with pytest.raises(PermissionDeniedError) as caught:
        load()
    assert caught.value.where == str(home)
    own(home, 0)
    assert str(load().store) == "/tmp/elsewhere"
    own(file, NOBODY)
    with pytest.raises(PermissionDeniedError):
        load()


def test_store_owner_is_a_user(folder):
    def load(owner):
        return config.load(flag_owner=owner, env={}, uid=0, system_config=folder / "none").store_owner

    assert load("nobody") == NOBODY
    assert load("123") == 123
    assert load(None) is None
    with pytest.raises(UsageError, match="no user"):
        load("nobody-at-all")


def test_a_reused_pid_is_not_killed(tmp_path):
    """What the pid file meant ended while it was taken: the process that has its pid now is neither stored nor killed."""
    store, engine = FakeStore(), FakeEngine()
    engine.during_dump = lambda: engine.alive.update({7: 999})
    settings = config.Config(store=tmp_path / "store", store_from="test", lock_wait_s=0.0)
    session = Session(settings, open_store=store.opener, open_engine=lambda: engine)
    with pytest.raises(TargetGoneError, match="ended while"):
        take_point(session, 7, job="sim", after="kill")
    assert not store.saved


def test_what_only_root_can_bring_back_is_said_and_never_killed(tmp_path):
    store, engine = FakeStore(), FakeEngine()
    engine.rights = False
    settings = config.Config(store=tmp_path / "store", store_from="test", lock_wait_s=0.0)
    session = Session(settings, open_store=store.opener, open_engine=lambda: engine)
    with pytest.raises(PermissionDeniedError, match="not bring it back"):
        take_point(session, 7, job="sim", after="kill")
    assert not engine.dumps
    warnings = take_point(session, 7, job="sim").warnings
    assert any("--store-owner" in text for text in warnings)
    engine.rights = True
    assert not any("--store-owner" in text for text in take_point(session, 7, job="sim").warnings)
