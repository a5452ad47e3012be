/* Credentials of a task that is not root any more, with groups, capabilities, securebits and no_new_privs. */
#include "selfcheck.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>

struct identity {
    uid_t uid[3], fsuid;
    gid_t gid[3], fsgid, groups[8];
    int nr_groups;
    struct __user_cap_data_struct caps[2];
    int securebits, no_new_privs, keepcaps, bounding[64], ambient[64];
};

static struct identity look(void)
{
    struct identity found;
    memset(&found, 0, sizeof(found));
    getresuid(&found.uid[0], &found.uid[1], &found.uid[2]);
    getresgid(&found.gid[0], &found.gid[1], &found.gid[2]);
    found.fsuid = (uid_t)setfsuid((uid_t)-1);
    found.fsgid = (gid_t)setfsgid((gid_t)-1);
    found.nr_groups = getgroups(8, found.groups);
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    MUST(syscall(SYS_capget, &header, found.caps));
    found.securebits = prctl(PR_GET_SECUREBITS);
    found.no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
    for (int cap = 0; cap < 64; cap++) {
        found.bounding[cap] = prctl(PR_CAPBSET_READ, cap, 0, 0, 0);
        found.ambient[cap] = prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0);
    }
    return found;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    gid_t groups[] = {1234, 5678, 40000};
    MUST(setgroups(3, groups));
    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE, 0, 0, 0));
    MUST(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP));
    MUST(setresgid(2001, 2002, 2003));
    MUST(setresuid(1001, 1002, 1003));
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct caps[2];
    memset(caps, 0, sizeof(caps));
    caps[0].permitted = 1u << CAP_KILL | 1u << CAP_NET_RAW | 1u << CAP_SETUID | 1u << CAP_CHOWN | 1u << CAP_DAC_OVERRIDE;
    caps[0].effective = 1u << CAP_KILL | 1u << CAP_DAC_OVERRIDE; /* writes its verdict */
    caps[0].inheritable = 1u << CAP_NET_RAW | 1u << CAP_KILL;
    MUST(syscall(SYS_capset, &header, caps));
    MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    struct identity before = look();
    check_ready();
    check_wait();
    struct identity now = look();
    for (int i = 0; i < 3; i++) {
        CHECK(now.uid[i] == before.uid[i], "uid %d is %u, was %u", i, now.uid[i], before.uid[i]);
        CHECK(now.gid[i] == before.gid[i], "gid %d is %u, was %u", i, now.gid[i], before.gid[i]);
    }
    CHECK(now.fsuid == before.fsuid && now.fsgid == before.fsgid, "fsuid %u, fsgid %u", now.fsuid, now.fsgid);
    CHECK(now.nr_groups == before.nr_groups && memcmp(now.groups, before.groups, sizeof(now.groups)) == 0, "groups: %d",
          now.nr_groups);
    CHECK(memcmp(now.caps, before.caps, sizeof(now.caps)) == 0, "capabilities: permitted %#x effective %#x inheritable %#x",
          now.caps[0].permitted, now.caps[0].effective, now.caps[0].inheritable);
    CHECK(now.securebits == before.securebits, "securebits %#x, were %#x", now.securebits, before.securebits);
    CHECK(now.no_new_privs == 1, "no_new_privs is lost");
    CHECK(memcmp(now.bounding, before.bounding, sizeof(now.bounding)) == 0, "the bounding set changed");
    CHECK(memcmp(now.ambient, before.ambient, sizeof(now.ambient)) == 0, "the ambient set changed");
    return check_done();
}
