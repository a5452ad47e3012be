/* What each thread has of its own: policy and priority, affinity, niceness, credentials (by the bare system call) and
 * alternate stack. */
#include "selfcheck.h"
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

#define NR_THREADS 4
static atomic_int nr_ready, ending;
static const int policies[NR_THREADS] = {SCHED_OTHER, SCHED_BATCH, SCHED_IDLE, SCHED_OTHER};
static const int niceness[NR_THREADS] = {3, 5, 0, 9};
static char problems[NR_THREADS][256];

static void *thread_main(void *argument)
{
    long index = (long)argument;
    struct sched_param param = {0};
    static char stacks[NR_THREADS][16384];
    MUST(sched_setscheduler(0, policies[index], &param));
    if (policies[index] != SCHED_IDLE)
        MUST(setpriority(PRIO_PROCESS, (id_t)check_gettid(), niceness[index]));
    cpu_set_t cpus, cpus_now;
    MUST(sched_getaffinity(0, sizeof(cpus), &cpus));
    if (index == 1)
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &cpus)) {
                CPU_ZERO(&cpus);
                CPU_SET(cpu, &cpus);
                break;
            }
    MUST(sched_setaffinity(0, sizeof(cpus), &cpus));
    stack_t alternate = {.ss_sp = stacks[index], .ss_size = sizeof(stacks[index])}, alternate_now;
    MUST(sigaltstack(&alternate, NULL));
    if (index == 3) /* this thread only */
        MUST(syscall(SYS_setresuid, 0, 4321, 0));
    atomic_fetch_add(&nr_ready, 1);
    while (!atomic_load(&ending))
        usleep(1000);
    char *text = problems[index];
    if (sched_getscheduler(0) != policies[index])
        strcat(text, " policy");
    if (policies[index] != SCHED_IDLE && getpriority(PRIO_PROCESS, (id_t)check_gettid()) != niceness[index])
        strcat(text, " niceness");
    MUST(sched_getaffinity(0, sizeof(cpus_now), &cpus_now));
    if (!CPU_EQUAL(&cpus, &cpus_now))
        strcat(text, " affinity");
    MUST(sigaltstack(NULL, &alternate_now));
    if (alternate_now.ss_sp != stacks[index] || alternate_now.ss_size != sizeof(stacks[index]))
        strcat(text, " altstack");
    uid_t real, effective, saved;
    syscall(SYS_getresuid, &real, &effective, &saved);
    if (effective != (index == 3 ? 4321u : 0u) || real != 0 || saved != 0)
        strcat(text, " uid");
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    pthread_t threads[NR_THREADS];
    for (long i = 0; i < NR_THREADS; i++)
        pthread_create(&threads[i], NULL, thread_main, (void *)i);
    while (atomic_load(&nr_ready) != NR_THREADS)
        usleep(1000);
    check_ready();
    check_wait();
    atomic_store(&ending, 1);
    for (int i = 0; i < NR_THREADS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(problems[i][0] == 0, "thread %d:%s", i, problems[i]);
    }
    return check_done();
}
