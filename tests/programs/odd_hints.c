/* Hints to the kernel that are easily forgotten, as far as this machine has them: time slices and utilization clamps of threads,
 * CPUID that faults, flushing of the first cache, what is done about broken memory, the niceness of a session, huge pages only where
 * they were asked for, and the login uid of a thread. */
#include "selfcheck.h"
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#define ARCH_GET_CPUID 0x1011
#define ARCH_SET_CPUID 0x1012
#define L1D_FLUSH 2
#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#define PR_GET_IO_FLUSHER 58
#endif
#define NR_THREADS 3

struct attr {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
    uint32_t util_min, util_max;
};
struct seen {
    struct attr attr;
    long cpuid, l1d, bypass, flusher, broken;
    char loginuid[16];
};
static atomic_int nr_ready, ending;
static struct seen before[NR_THREADS], after[NR_THREADS];

static void put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);
    if (fd >= 0) {
        (void)!write(fd, text, strlen(text));
        close(fd);
    }
}

static void get(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY);
    memset(text, 0, size);
    if (fd >= 0) {
        (void)!read(fd, text, size - 1);
        close(fd);
    }
}

static void look(struct seen *seen)
{
    memset(seen, 0, sizeof(*seen));
    MUST(syscall(SYS_sched_getattr, 0, &seen->attr, sizeof(seen->attr), 0));
    seen->cpuid = syscall(SYS_arch_prctl, ARCH_GET_CPUID, 0);
    seen->l1d = prctl(PR_GET_SPECULATION_CTRL, L1D_FLUSH, 0, 0, 0);
    seen->bypass = prctl(PR_GET_SPECULATION_CTRL, 0, 0, 0, 0);
    seen->flusher = prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0);
    seen->broken = prctl(PR_MCE_KILL_GET, 0, 0, 0, 0);
    get("/proc/thread-self/loginuid", seen->loginuid, sizeof(seen->loginuid));
}

static void *thread_main(void *argument)
{
    long index = (long)argument;
    struct attr attr = {.size = sizeof(attr), .policy = index == 1 ? SCHED_BATCH : SCHED_OTHER};
    attr.runtime = index ? 5000000 + 1000000 * (uint64_t)index : 0; /* Linux 6.12; before, it is not looked at */
    MUST(syscall(SYS_sched_setattr, 0, &attr, 0));
    if (index == 0)
        prctl(PR_MCE_KILL, PR_MCE_KILL_CLEAR, 0, 0, 0);
    if (index == 2) {
        prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0);
        prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
        attr.flags = 0x60; /* SCHED_FLAG_UTIL_CLAMP_MIN, _MAX */
        attr.util_min = 100;
        attr.util_max = 600;
        syscall(SYS_sched_setattr, 0, &attr, 0);
        syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
        prctl(PR_SET_SPECULATION_CTRL, L1D_FLUSH, 2 /* PR_SPEC_ENABLE */, 0, 0);
        prctl(PR_SET_SPECULATION_CTRL, 0, 16 /* PR_SPEC_DISABLE_NOEXEC */, 0, 0);
        put("/proc/thread-self/loginuid", "4242");
    }
    look(&before[index]);
    atomic_fetch_add(&nr_ready, 1);
    while (!atomic_load(&ending))
        usleep(1000);
    look(&after[index]);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[NR_THREADS];
    char group[64], group_now[64], *nice, *nice_now;
    check_init(argc, argv);
    prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
    for (long i = 0; i < NR_THREADS; i++)
        pthread_create(&threads[i], NULL, thread_main, (void *)i);
    while (atomic_load(&nr_ready) != NR_THREADS)
        usleep(1000);
    prctl(PR_SET_THP_DISABLE, 1, 2 /* PR_THP_DISABLE_EXCEPT_ADVISED, Linux 6.18 */, 0, 0);
    int huge = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
    put("/proc/self/autogroup", "7");
    get("/proc/self/autogroup", group, sizeof(group));
    int broken = prctl(PR_MCE_KILL_GET, 0, 0, 0, 0);
    check_ready();
    check_wait();
    atomic_store(&ending, 1);
    for (int i = 0; i < NR_THREADS; i++) {
        struct seen *was = &before[i], *is = &after[i];
        pthread_join(threads[i], NULL);
        CHECK(was->attr.runtime == is->attr.runtime, "thread %d: slice %llu, was %llu", i, (unsigned long long)is->attr.runtime,
              (unsigned long long)was->attr.runtime);
        CHECK(was->attr.util_min == is->attr.util_min && was->attr.util_max == is->attr.util_max, "thread %d: clamps %u %u", i,
              is->attr.util_min, is->attr.util_max);
        CHECK(was->cpuid == is->cpuid, "thread %d: CPUID %ld, was %ld", i, is->cpuid, was->cpuid);
        CHECK(was->l1d == is->l1d && was->bypass == is->bypass, "thread %d: guards %ld %ld, were %ld %ld", i, is->l1d, is->bypass,
              was->l1d, was->bypass);
        CHECK(was->flusher == is->flusher && was->broken == is->broken, "thread %d: I/O %ld, broken memory %ld, were %ld %ld", i,
              is->flusher, is->broken, was->flusher, was->broken);
        CHECK(strcmp(was->loginuid, is->loginuid) == 0, "thread %d: login uid %s, was %s", i, is->loginuid, was->loginuid);
    }
    CHECK(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == broken, "broken memory: %d", prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));
    CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == huge, "huge pages: %d, was %d", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), huge);
    get("/proc/self/autogroup", group_now, sizeof(group_now));
    nice = strstr(group, "nice"), nice_now = strstr(group_now, "nice"); /* the group's number is another */
    CHECK(strcmp(nice ? nice : "", nice_now ? nice_now : "") == 0, "%s, was %s", group_now, group);
    return check_done();
}
