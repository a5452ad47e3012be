/* What a process carries besides: umask, limits, niceness, policy, affinity, names, oom_score_adj, personality, dumpable, parent-death
 * signal, subreaper, THP, timer slack, working directory. */
#include "selfcheck.h"
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

struct state {
    struct rlimit limits[RLIM_NLIMITS];
    int nice, policy, dumpable, death_signal, subreaper, thp, personality, slack, ioprio;
    struct sched_param param;
    cpu_set_t cpus;
    char comm[17], cwd[4096], oom[32], filter[32];
    mode_t mask;
};

static void slurp(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? 0 : read(fd, text, size - 1);
    text[got > 0 ? got : 0] = 0;
    if (fd >= 0)
        close(fd);
}

static void look(struct state *found)
{
    memset(found, 0, sizeof(*found));
    for (int i = 0; i < RLIM_NLIMITS; i++)
        getrlimit(i, &found->limits[i]);
    found->nice = getpriority(PRIO_PROCESS, 0);
    found->policy = sched_getscheduler(0);
    sched_getparam(0, &found->param);
    sched_getaffinity(0, sizeof(found->cpus), &found->cpus);
    prctl(PR_GET_NAME, found->comm);
    found->dumpable = prctl(PR_GET_DUMPABLE);
    prctl(PR_GET_PDEATHSIG, &found->death_signal);
    prctl(PR_GET_CHILD_SUBREAPER, &found->subreaper);
    found->thp = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
    found->slack = prctl(PR_GET_TIMERSLACK);
    found->personality = personality(0xffffffff);
    found->ioprio = (int)syscall(SYS_ioprio_get, 1, 0);
    if (getcwd(found->cwd, sizeof(found->cwd)) == NULL)
        found->cwd[0] = 0;
    slurp("/proc/self/oom_score_adj", found->oom, sizeof(found->oom));
    slurp("/proc/self/coredump_filter", found->filter, sizeof(found->filter));
    found->mask = check_umask();
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    umask(0137);
    struct rlimit limit = {77, 555};
    MUST(setrlimit(RLIMIT_NOFILE, &limit));
    limit = (struct rlimit){1 << 20, 1 << 21};
    MUST(setrlimit(RLIMIT_CORE, &limit));
    MUST(setpriority(PRIO_PROCESS, 0, 7));
    struct sched_param param = {0};
    MUST(sched_setscheduler(0, SCHED_BATCH, &param));
    cpu_set_t cpus;
    MUST(sched_getaffinity(0, sizeof(cpus), &cpus));
    int last = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &cpus))
            last = cpu;
    CPU_ZERO(&cpus);
    CPU_SET(last, &cpus);
    MUST(sched_setaffinity(0, sizeof(cpus), &cpus));
    MUST(prctl(PR_SET_NAME, "odd (name) \n"));
    MUST(prctl(PR_SET_PDEATHSIG, SIGWINCH));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    MUST(prctl(PR_SET_TIMERSLACK, 123456));
    MUST(personality(ADDR_NO_RANDOMIZE));
    MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 5));
    int fd = MUST(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
    MUST(write(fd, "321", 3));
    close(fd);
    fd = MUST(open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC));
    MUST(write(fd, "0x3f", 4));
    close(fd);
    MUST(mkdir("inner", 0777));
    MUST(chdir("inner"));
    MUST(prctl(PR_SET_DUMPABLE, 0));
    static struct state before, now;
    look(&before);
    check_ready();
    check_wait();
    look(&now);
    for (int i = 0; i < RLIM_NLIMITS; i++)
        CHECK(memcmp(&now.limits[i], &before.limits[i], sizeof(now.limits[i])) == 0, "limit %d is %lu/%lu", i,
              (unsigned long)now.limits[i].rlim_cur, (unsigned long)now.limits[i].rlim_max);
#define SAME(field) CHECK(now.field == before.field, #field " is %d, was %d", (int)now.field, (int)before.field)
    SAME(nice);
    SAME(policy);
    SAME(param.sched_priority);
    SAME(dumpable);
    SAME(death_signal);
    SAME(subreaper);
    SAME(thp);
    SAME(personality);
    SAME(slack);
    SAME(ioprio);
    SAME(mask);
    CHECK(CPU_EQUAL(&now.cpus, &before.cpus), "the affinity changed");
    CHECK(strcmp(now.comm, before.comm) == 0, "the name is %s", now.comm);
    CHECK(strcmp(now.cwd, before.cwd) == 0, "the working directory is %s", now.cwd);
    CHECK(strcmp(now.oom, before.oom) == 0, "oom_score_adj is %s", now.oom);
    CHECK(strcmp(now.filter, before.filter) == 0, "coredump_filter is %s", now.filter);
    return check_done();
}
