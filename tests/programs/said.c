/* State that no interface gives back, and that a take must name: signals about changes of a directory (F_NOTIFY), a child whose
 * death signal hangs on a thread of its parent that is not the first. */
// snap-test: children
#include "selfcheck.h"
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static pid_t child;

static void *make_child(void *none)
{
    child = MUST(fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    for (;;)
        pause();
    return none;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    signal(SIGIO, SIG_IGN);
    int folder = MUST(open("/", O_RDONLY | O_DIRECTORY));
    MUST(fcntl(folder, F_NOTIFY, DN_CREATE | DN_MULTISHOT));
    pthread_t thread;
    if (pthread_create(&thread, NULL, make_child, NULL) != 0)
        check_die("pthread_create");
    while (__atomic_load_n(&child, __ATOMIC_SEQ_CST) == 0)
        usleep(1000);
    check_ready();
    check_wait();
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child, "the child");
    return check_done();
}
