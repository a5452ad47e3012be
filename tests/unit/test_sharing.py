"""What tasks share, planned and then run against a small model of clone and unshare."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.model import tree
from checkpoint.model.sharing import SharingError, ThreadTables, plan_threads, shared_only
from checkpoint.model.tree import TreeProcess as P
from checkpoint.resources import sharing
from images import task_pb2
from images.codec import parse, serialise
from snapshotter.base.errors import VerificationError


def run(steps):
    """Pid -> [descriptor table, directories] after these steps, numbers that say nothing but equal or not."""
    tables, fresh = {}, iter(range(1 << 20))
    for step in steps:
        if isinstance(step, tree.SpawnRoot):
            tables[step.pid] = [next(fresh), next(fresh)]
        elif isinstance(step, tree.Fork):
            maker = tables[step.maker]
            tables[step.pid] = [
                maker[0] if step.files else next(fresh),
                maker[1] if step.fs else next(fresh),
            ]
        elif isinstance(step, tree.Unshare):
            if step.files:
                tables[step.pid][0] = next(fresh)
            if step.fs:
                tables[step.pid][1] = next(fresh)
        elif isinstance(step, tree.HelperExit):
            del tables[step.pid]
    return tables


def partition(keys):
    """Which of them are equal, in a form that can be compared."""
    sets: dict[object, set[int]] = {}
    for pid, key in keys.items():
        sets.setdefault(key, set()).add(pid)
    return sorted(map(sorted, sets.values()))


def check(*processes):
    plan = tree.plan_tree(processes, processes[0].pid)
    assert not plan.warnings
    got = run(plan.steps)
    for at, wanted in enumerate(("files", "fs")):
        expected = {p.pid: getattr(p, wanted) or -p.pid for p in processes}
        assert partition({pid: pair[at] for pid, pair in got.items()}) == partition(expected), str(plan)
    return plan


def test_nothing_is_said_where_nothing_is_shared():
    plan = check(P(10, 1, 10, 10), P(11, 10, 10, 10))
    assert str(plan) == "spawn 10\n10 setsid\n10 forks 11"


def test_with_the_parent():
    plan = check(P(10, 1, 10, 10, files=3, fs=4), P(11, 10, 10, 10, files=3), P(12, 10, 10, 10, fs=4))
    assert "10 forks 11 with its descriptors" in str(plan)
    assert "10 forks 12 with its directories" in str(plan)


def test_past_a_parent_that_has_left():
    plan = check(P(10, 1, 10, 10, files=3), P(11, 10, 10, 10), P(12, 11, 10, 10, files=3))
    assert str(plan).endswith("11 unshare with its descriptors")


def test_siblings_whose_maker_has_ended():
    check(P(10, 1, 10, 10), P(11, 10, 10, 10, files=3), P(12, 10, 10, 10, files=3))


def test_with_the_parent_and_among_siblings():
    check(
        P(10, 1, 10, 10, files=3),
        P(11, 10, 10, 10, files=3),
        P(12, 10, 10, 10, files=4),
        P(13, 10, 10, 10, files=4),
    )


def test_a_child_in_the_session_of_a_dead_leader():
    check(P(10, 1, 10, 10, subreaper=True, files=3), P(12, 10, 11, 11, files=3), P(13, 12, 11, 11, files=3))


def test_crossed():
    with pytest.raises(SharingError):
        tree.plan_tree(
            [
                P(10, 1, 10, 10, files=3),
                P(11, 10, 10, 10, files=4),
                P(12, 11, 10, 10, files=3),
                P(13, 10, 10, 10, files=4),
            ],
            10,
        )


@st.composite
def histories(draw):
    """Processes as clone and unshare have made them, without deaths."""
    parents, tables, fresh = {1: 0}, {1: [0, 1]}, iter(range(2, 1000))
    for _ in range(draw(st.integers(0, 14))):
        pid = draw(st.sampled_from(sorted(parents)))
        files, fs = draw(st.booleans()), draw(st.booleans())
        if draw(st.integers(0, 3)):
            child = len(parents) + 1
            parents[child] = pid
            tables[child] = [tables[pid][0] if files else next(fresh), tables[pid][1] if fs else next(fresh)]
        else:
            tables[pid] = [next(fresh) if files else tables[pid][0], next(fresh) if fs else tables[pid][1]]
    return [
        P(pid, parent, 1, 1, files=tables[pid][0] + 1, fs=tables[pid][1] + 1)
        for pid, parent in parents.items()
    ]


@given(histories())
def test_any_history_comes_back_or_is_refused(processes):
    try:
        check(*processes)
    except SharingError:
        pass


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), st.randoms(use_true_random=False))
def test_children_that_never_left_always_come_back(flags, random):
    processes = [P(1, 0, 1, 1, files=1, fs=1)]
    for pid, (files, fs) in enumerate(flags, 2):
        maker = random.choice(processes)
        processes.append(
            P(pid, maker.pid, 1, 1, files=maker.files if files else pid, fs=maker.fs if fs else pid)
        )
    check(*processes)


# -- threads ----------------------------------------------------------------------------------------------------


def check_threads(*threads):
    got, fresh = {1: (0, 0)}, iter(range(1, 1000))
    for step in plan_threads(1, threads):
        maker = got[step.maker]
        got[step.tid] = (maker[0] if step.files else next(fresh), maker[1] if step.fs else next(fresh))
    everybody = (ThreadTables(1), *threads)
    for at, wanted in enumerate(("files", "fs")):
        expected = {thread.tid: getattr(thread, wanted) for thread in everybody}
        assert partition({tid: pair[at] for tid, pair in got.items()}) == partition(expected)


def test_threads():
    check_threads()
    check_threads(ThreadTables(2), ThreadTables(3, files=3), ThreadTables(4, fs=4), ThreadTables(5, 5, 5))
    check_threads(
        ThreadTables(2, files=2), ThreadTables(3, files=2), ThreadTables(4, 4, 2), ThreadTables(5, 4, 2)
    )


def test_threads_are_made_in_an_order_that_works():
    # 3 shares its descriptors with 2, its directories with all others: it must be there before 2.
    check_threads(ThreadTables(2, 2, 2), ThreadTables(3, files=2), ThreadTables(4, files=4))


def test_threads_crossed():
    with pytest.raises(SharingError):
        plan_threads(
            1, [ThreadTables(2, 1, 1), ThreadTables(3, 2, 2), ThreadTables(4, 1, 2), ThreadTables(5, 2, 1)]
        )


def test_shared_only():
    assert shared_only({1: 1, 2: 1, 3: 3}, [1, 2, 3]) == {1: 1, 2: 1}
    assert shared_only({1: 1, 2: 1, 3: 3}, [1, 3]) == {}


# -- images -----------------------------------------------------------------------------------------------------


def a_process(pid=42, **fields):
    process = task_pb2.Process(pid=pid, ppid=1, pgid=pid, sid=pid, mm=f"mm/{pid}", files=f"fdtable/{pid}")
    for tid in (pid, pid + 1, pid + 2):
        process.threads.add(tid=tid)
    for name, value in fields.items():
        setattr(process, name, value)
    return process


def version(process):
    data = serialise(f"process/{process.pid}", process)
    return parse(f"process/{process.pid}", data).format_version


def test_only_what_is_shared_otherwise_needs_the_new_version():
    assert version(a_process()) == 1
    assert version(a_process(files="")) == 1
    assert version(a_process(files="fdtable/7")) == 2
    assert version(a_process(fs_of=7)) == 2
    process = a_process()
    process.threads[1].files = "fdtable/43"
    assert version(process) == 2
    process = a_process()
    process.threads[1].fs_of = process.threads[2].fs_of = 43
    process.threads[1].fs.umask = 0o22
    assert version(process) == 2
    assert sharing.thread_plan(process) == [ThreadTables(43, fs=43), ThreadTables(44, fs=43)]


def test_an_old_version_says_nothing_of_it():
    process = a_process(fs_of=7, format_version=1)
    with pytest.raises(VerificationError, match="no place for"):
        parse("process/42", process.SerializeToString())


def leader_has_its_own(process):
    process.threads[0].files = "fdtable/9"


def with_nobody(process):
    process.threads[1].fs_of = 44


def without_directories(process):
    process.threads[1].fs_of = 43


def another_image(process):
    process.threads[1].files = "files"


def the_same(process):
    process.threads[1].files = process.files


def itself(process):
    process.fs_of = process.pid


def too_much(process):
    process.threads[1].fs_of = 43
    process.threads[1].fs.umask = 0o7777


@pytest.mark.parametrize(
    "change",
    [leader_has_its_own, with_nobody, without_directories, another_image, the_same, itself, too_much],
)
def test_hostile_images_are_refused(change):
    process = a_process()
    change(process)
    process.format_version = 2
    with pytest.raises(VerificationError):
        parse("process/42", process.SerializeToString())


def test_classes_of_processes():
    processes = {
        1: a_process(1),
        5: a_process(5, files="fdtable/1"),
        9: a_process(9, fs_of=1),
        12: task_pb2.Process(pid=12, state=task_pb2.Process.ZOMBIE),
    }
    found = sharing.process_classes(processes)
    assert found[1][0] == found[5][0] != 0
    assert found[1][1] == found[9][1] != 0
    assert found[5][1] == found[9][0] == 0
    assert found[12] == (0, 0)
