// snap-test: unchecked
/* A second thread that may use an I/O port (ioperm(2)), which must be refused; the file "absent" where this kernel has no such thing
 * (test_surroundings.py). */
#include "selfcheck.h"
#include <pthread.h>
#include <sys/io.h>

static atomic_int ready;

static void *thread_main(void *unused)
{
    if (ioperm(0x80, 1, 1))
        check_put("absent", strerror(errno));
    atomic_store(&ready, 1);
    for (;;)
        pause();
    return unused;
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
    return check_done();
}
