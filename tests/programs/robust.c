/* Robust lists and rseq of every thread: a robust mutex held by a thread, and by a process, that die after the rollback must be
 * found so by the next owner; the rseq area goes on telling the processor. */
#include "selfcheck.h"
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/wait.h>

static struct {
    pthread_mutex_t of_thread, of_process;
    atomic_int ready, ending;
} *shared;
static int thread_list_same, thread_rseq_works;

static int rseq_works(void)
{
    if (__rseq_size == 0)
        return 1; /* glibc did not register it */
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    for (int i = 0; i < 1000; i++) {
        int cpu = sched_getcpu();
        if ((int)*(volatile uint32_t *)&area->cpu_id == cpu && cpu >= 0)
            return 1;
    }
    return 0;
}

static void *owner_main(void *unused)
{
    (void)unused;
    void *head = NULL, *head_now = NULL;
    size_t size = 0, size_now = 0;
    pthread_mutex_lock(&shared->of_thread);
    MUST(syscall(SYS_get_robust_list, 0, &head, &size));
    atomic_fetch_add(&shared->ready, 1);
    while (!atomic_load(&shared->ending))
        usleep(1000);
    MUST(syscall(SYS_get_robust_list, 0, &head_now, &size_now));
    thread_list_same = head == head_now && size == size_now;
    thread_rseq_works = rseq_works();
    return NULL; /* without unlocking */
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&shared->of_thread, &attributes);
    pthread_mutex_init(&shared->of_process, &attributes);
    pid_t child = MUST(fork());
    if (child == 0) {
        pthread_mutex_lock(&shared->of_process);
        atomic_fetch_add(&shared->ready, 1);
        while (!atomic_load(&shared->ending))
            usleep(1000);
        _exit(rseq_works() ? 0 : 5);
    }
    pthread_t thread;
    pthread_create(&thread, NULL, owner_main, NULL);
    while (atomic_load(&shared->ready) != 2)
        usleep(1000);
    void *head = NULL, *head_now = NULL;
    size_t size = 0;
    MUST(syscall(SYS_get_robust_list, 0, &head, &size));
    check_ready();
    check_wait();
    MUST(syscall(SYS_get_robust_list, 0, &head_now, &size));
    CHECK(head == head_now, "the robust list is at %p, was at %p", head_now, head);
    CHECK(rseq_works(), "rseq tells the wrong processor");
    atomic_store(&shared->ending, 1);
    pthread_join(thread, NULL);
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    CHECK(status == 0, "the child's status is %#x", status);
    CHECK(thread_list_same, "the thread's robust list changed");
    CHECK(thread_rseq_works, "rseq tells the thread the wrong processor");
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 5;
    int result = pthread_mutex_timedlock(&shared->of_thread, &limit);
    CHECK(result == EOWNERDEAD, "the thread's mutex gave %d", result);
    result = pthread_mutex_timedlock(&shared->of_process, &limit);
    CHECK(result == EOWNERDEAD, "the process's mutex gave %d", result);
    return check_done();
}
