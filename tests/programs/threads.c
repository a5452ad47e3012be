/* 100 threads: each with its own thread-local data, stack pattern, signal mask and name; half of them compute, half of them sleep;
 * they are joined afterwards (clear_child_tid). */
#include "selfcheck.h"
#include <pthread.h>

#define NR_THREADS 100
static _Thread_local uint64_t local[16];
static pthread_t threads[NR_THREADS];
static pid_t tids[NR_THREADS];
static atomic_int nr_ready, ending;
static int verdicts[NR_THREADS];

#define FACTOR 6364136223846793005u
#define ADDEND 1442695040888963407u

/* What `state` is after so many steps, in a moment: after days of running the check must not take days. */
static uint64_t after(uint64_t state, uint64_t steps)
{
    uint64_t factor = FACTOR, addend = ADDEND; /* of 1, 2, 4, ... steps at once */
    for (; steps; steps >>= 1) {
        if (steps & 1)
            state = state * factor + addend;
        addend *= factor + 1;
        factor *= factor;
    }
    return state;
}

static void *thread_main(void *argument)
{
    long index = (long)argument;
    volatile uint64_t on_stack[512];
    char name[16], now[16];
    sigset_t mask, mask_now;
    sigemptyset(&mask);
    sigaddset(&mask, 1 + (int)(index % 8)); /* 1..8, none of them fatal to block */
    sigaddset(&mask, SIGTERM);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &mask); /* as the kernel has it */
    for (int i = 0; i < 16; i++)
        local[i] = (uint64_t)index * 1000003 + (uint64_t)i;
    for (int i = 0; i < 512; i++)
        on_stack[i] = (uint64_t)index << 32 | (uint64_t)i;
    snprintf(name, sizeof(name), "worker-%ld", index);
    pthread_setname_np(pthread_self(), name);
    tids[index] = check_gettid();
    uint64_t state = (uint64_t)index + 1, steps = 0;
    atomic_fetch_add(&nr_ready, 1);
    while (!atomic_load(&ending)) {
        for (int i = 0; i < 2000; i++, steps++)
            state = state * FACTOR + ADDEND;
        usleep(index % 2 ? 20000 : 500);
    }
    int bad = after((uint64_t)index + 1, steps) != state;
    for (int i = 0; i < 16; i++)
        bad |= (local[i] != (uint64_t)index * 1000003 + (uint64_t)i) << 1;
    for (int i = 0; i < 512; i++)
        bad |= (on_stack[i] != ((uint64_t)index << 32 | (uint64_t)i)) << 2;
    pthread_sigmask(SIG_SETMASK, NULL, &mask_now);
    for (int sig = 1; sig <= SIGRTMAX; sig++)
        bad |= (sigismember(&mask, sig) != sigismember(&mask_now, sig)) << 3;
    pthread_getname_np(pthread_self(), now, sizeof(now));
    bad |= (strcmp(now, name) != 0) << 4;
    bad |= (check_gettid() != tids[index]) << 5;
    verdicts[index] = bad;
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128 << 10);
    for (long i = 0; i < NR_THREADS; i++) {
        errno = pthread_create(&threads[i], &attributes, thread_main, (void *)i);
        if (errno)
            check_die("pthread_create");
    }
    while (atomic_load(&nr_ready) != NR_THREADS)
        usleep(1000);
    check_ready();
    check_wait();
    atomic_store(&ending, 1);
    for (int i = 0; i < NR_THREADS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(verdicts[i] == 0, "thread %d: %#x", i, verdicts[i]);
    }
    return check_done();
}
