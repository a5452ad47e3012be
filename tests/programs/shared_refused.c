/* A thread that shares its descriptors with another process, but not with its own: named, refused, left alone. */
// snap-test: refused but not with its own
#include "selfcheck.h"
#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>

static pid_t child;
static atomic_int ready;

static void *thread_main(void *unused)
{
    (void)unused;
    MUST(unshare(CLONE_FILES));
    child = (pid_t)MUST(syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0));
    if (child == 0)
        for (;;)
            pause();
    atomic_store(&ready, 1);
    for (;;)
        pause();
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    check_init(argc, argv);
    pthread_create(&thread, NULL, thread_main, NULL);
    while (!atomic_load(&ready))
        usleep(1000);
    check_ready();
    check_wait();
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child has ended");
    MUST(kill(child, SIGKILL));
    CHECK(waitpid(child, NULL, 0) == child, "the child is gone");
    return check_done();
}
