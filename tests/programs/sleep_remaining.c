/* Sleeps that end while the job is being taken and rolled back or after it: relative ones neither early nor far too late, absolute
 * ones at their instant. Each thread sleeps 4 s in another way and measures. */
#include "selfcheck.h"
#include <pthread.h>
#include <poll.h>
#include <sys/select.h>

#define SECONDS 4
static atomic_int inside;

struct timed {
    const char *name;
    int (*call)(void);
    double slept;
    int result, error;
    pthread_t thread;
};

static int by_nanosleep(void)
{
    struct timespec time = {SECONDS, 0};
    return nanosleep(&time, NULL);
}
static int by_clock_nanosleep(void)
{
    struct timespec time = {SECONDS, 0};
    return clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL);
}
static int by_absolute(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    time.tv_sec += SECONDS;
    return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}
static int by_poll(void) { return poll(NULL, 0, SECONDS * 1000); }
static int by_select(void)
{
    struct timeval time = {SECONDS, 0};
    return select(0, NULL, NULL, NULL, &time);
}
static struct timed timed[] = {
    {"nanosleep", by_nanosleep, 0, 0, 0, 0},
    {"clock_nanosleep", by_clock_nanosleep, 0, 0, 0, 0},
    {"absolute clock_nanosleep", by_absolute, 0, 0, 0, 0},
    {"poll", by_poll, 0, 0, 0, 0},
    {"select", by_select, 0, 0, 0, 0},
};
#define NR_TIMED (sizeof(timed) / sizeof(timed[0]))

static void *timed_main(void *argument)
{
    struct timed *me = argument;
    double before = check_now(CLOCK_MONOTONIC);
    atomic_fetch_add(&inside, 1);
    me->result = me->call();
    me->error = errno;
    me->slept = check_now(CLOCK_MONOTONIC) - before;
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &term, NULL);
    for (size_t i = 0; i < NR_TIMED; i++)
        pthread_create(&timed[i].thread, NULL, timed_main, &timed[i]);
    while (atomic_load(&inside) != NR_TIMED)
        sched_yield();
    usleep(20000);
    check_ready();
    int sig;
    do
        sig = sigwaitinfo(&term, NULL);
    while (sig < 0 && errno == EINTR);
    for (size_t i = 0; i < NR_TIMED; i++) {
        pthread_join(timed[i].thread, NULL);
        CHECK(timed[i].result == 0, "%s: result %d, errno %d", timed[i].name, timed[i].result, timed[i].error);
        CHECK(timed[i].slept > SECONDS - 0.01, "%s of %d s took only %.3f s", timed[i].name, SECONDS, timed[i].slept);
        /* Late by the time that the job did not exist, and by what it had slept before, where the kernel does not tell it. */
        CHECK(timed[i].slept < SECONDS + 25, "%s of %d s took %.3f s", timed[i].name, SECONDS, timed[i].slept);
    }
    return check_done();
}
