"""Every plan is run against a small model of the kernel's rules for fork, setsid and setpgid."""

from __future__ import annotations

import pytest

from checkpoint.model import tree
from checkpoint.model.tree import TreeProcess as P


def execute(plan, root_sid=0, root_pgid=0):
    """A kernel in miniature; returns pid -> [ppid, pgid, sid, zombie]."""
    procs, names, free = {}, {}, iter(range(90000, 99999))
    subreapers = set()

    def real(pid):
        return names.get(pid, pid)

    for step in plan.steps:
        if isinstance(step, tree.SpawnRoot):
            procs[step.pid] = [1, root_pgid, root_sid, False]
        elif isinstance(step, tree.Fork):
            maker = procs[real(step.maker)]
            assert not maker[3]
            pid = step.pid if step.pid > 0 else names.setdefault(step.pid, next(free))
            assert pid not in procs
            procs[pid] = [maker[0] if step.sibling else real(step.maker), maker[1], maker[2], False]
        elif isinstance(step, tree.SetSid):
            assert all(p[1] != step.pid for p in procs.values()), "setsid of a group leader"
            procs[step.pid][1:3] = [step.pid, step.pid]
        elif isinstance(step, tree.SetPgid):
            me = procs[step.pid]
            assert me[2] != step.pid, "setpgid of a session leader"
            assert step.pid == step.pgid or any(p[1] == step.pgid and p[2] == me[2] for p in procs.values())
            me[1] = step.pgid
        elif isinstance(step, tree.Subreaper):
            (subreapers.add if step.on else subreapers.discard)(step.pid)
        elif isinstance(step, tree.HelperExit):
            pid = real(step.pid)
            assert procs[pid][0] == step.reaper
            for p in procs.values():
                if p[0] == pid:
                    up = procs[pid][0]
                    while up != 1 and up not in subreapers:
                        up = procs[up][0]
                    p[0] = up
            del procs[pid]
        elif isinstance(step, tree.Die):
            procs[step.pid][3] = True
            assert all(p[0] != step.pid for p in procs.values())
    return procs


def check(*processes, root=None, **born):
    root = root or processes[0].pid
    plan = tree.plan_tree(processes, root, **born)
    assert not plan.warnings
    got = execute(plan, **born)
    assert set(got) == {p.pid for p in processes}
    for p in processes:
        ppid = 1 if p.pid == root else p.ppid
        assert got[p.pid] == [ppid, p.pgid, p.sid, p.zombie], (p, str(plan))
    return plan


def test_single_session_leader():
    plan = check(P(10, 1, 10, 10))
    assert str(plan) == "spawn 10\n10 setsid"


def test_pipeline_below_a_shell():
    check(P(10, 1, 10, 10), P(11, 10, 11, 10), P(12, 10, 11, 10), P(13, 10, 13, 10))


def test_group_leader_dead():
    check(P(10, 1, 10, 10), P(12, 10, 11, 10), P(13, 10, 11, 10))


def test_child_from_before_setsid():
    check(P(10, 1, 10, 10), P(11, 10, 11, 11), P(12, 11, 10, 10), P(13, 11, 11, 11))


def test_kept_session_of_snap():
    check(P(10, 1, 7, 5), P(11, 10, 7, 5), root_sid=5, root_pgid=7)
    check(P(10, 1, 10, 5), P(11, 10, 7, 5), root_sid=5, root_pgid=7)


def test_zombies():
    check(P(10, 1, 10, 10), P(11, 10, 11, 10, zombie=True), P(12, 10, 11, 10), P(13, 10, 13, 13, zombie=True))


def test_adopted_from_a_dead_session():
    check(P(10, 1, 10, 10, subreaper=True), P(12, 10, 11, 11), P(13, 12, 11, 11))


def test_adopted_from_a_living_sibling_session():
    check(P(10, 1, 10, 10), P(11, 10, 11, 11), P(12, 10, 11, 11))


def test_adopted_from_a_deep_session():
    check(P(10, 1, 10, 10), P(11, 10, 10, 10), P(12, 11, 12, 12), P(13, 10, 12, 12))


def test_leader_moved_to_another_group():
    check(P(10, 1, 10, 10), P(11, 10, 12, 10), P(12, 10, 11, 10), P(13, 10, 11, 10))


def test_outside_session_is_replaced():
    mapped, warnings = tree.map_outside(
        [P(10, 1, 6, 5), P(11, 10, 6, 5), P(12, 10, 12, 12)], 10, keep_sid=False, keep_pgid=False
    )
    assert warnings
    assert [(p.pgid, p.sid) for p in mapped] == [(10, 10), (10, 10), (12, 12)]
    check(*mapped)


def test_not_a_tree():
    with pytest.raises(tree.TreeError):
        tree.plan_tree([P(10, 1, 10, 10), P(12, 11, 10, 10)], 10)
    with pytest.raises(tree.TreeError):
        tree.plan_tree([P(10, 1, 10, 10), P(11, 12, 10, 10), P(12, 11, 10, 10)], 10)


def test_deep_chain():
    processes = [P(10, 1, 10, 10)] + [P(i, i - 1, 10, 10) for i in range(11, 1500)]
    check(*processes)
