"""Control groups: parsers on captured bytes, and where a process must be moved."""

from checkpoint.resources.cgroups import Mount, parse, parse_mounts, plan

CGROUP = b"9:name=systemd:/\n4:memory:/jobs/a:b\n3:cpu,cpuacct:/x\n0::/user.slice/s c\n"
MOUNTINFO = (
    b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    b"35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    b"36 31 0:33 /x /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    b"41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime - cgroup2 cgroup2 rw\n"
)


def test_parsers():
    assert parse(CGROUP) == {
        "name=systemd": "/",
        "memory": "/jobs/a:b",
        "cpu,cpuacct": "/x",
        "": "/user.slice/s c",
    }
    assert parse_mounts(MOUNTINFO) == {
        "memory": Mount("/sys/fs/cgroup/memory", "/"),
        "cpu,cpuacct": Mount("/sys/fs/cgroup/cpu", "/x"),
        "": Mount("/sys/fs/cgroup/uni fied", "/"),
    }


def test_only_what_differs_is_moved():
    mounts = parse_mounts(MOUNTINFO)
    wanted = {**parse(CGROUP), "cpu,cpuacct": "/x/deep", "gone": "/a"}
    own = {"name=systemd": "/", "memory": "/", "cpu,cpuacct": "/x", "": "/user.slice/s c"}
    assert list(plan(wanted, own, mounts)) == [
        ("memory", "/jobs/a:b", "/sys/fs/cgroup/memory/jobs/a:b"),
        ("cpu,cpuacct", "/x/deep", "/sys/fs/cgroup/cpu/deep"),
    ]


def test_what_cannot_be_reached():
    mounts = parse_mounts(MOUNTINFO)
    own = {"memory": "/", "cpu,cpuacct": "/x", "name=systemd": "/"}
    wanted = {"memory": "/../../etc", "cpu,cpuacct": "/y", "name=systemd": "/s"}
    assert [folder for _, _, folder in plan(wanted, own, mounts)] == [None, None, None]
