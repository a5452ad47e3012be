/* Threads inside system calls that the kernel ends with EINTR for a mere stop, though nothing says so in signal(7): waits whose
 * timeout lies in memory that cannot be written, and transfers through sockets with a timeout. None may come back early. */
#include "selfcheck.h"
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/time.h>

static const struct timespec long_ns = {100, 0}; /* in .rodata */
static const struct timeval long_us = {100, 0};
static int efd; /* becomes readable at the end */
static int full[2], empty[2], spliced[2];
static atomic_int inside, returned, ending;

static long in_ppoll(void)
{
    struct pollfd fd = {.fd = efd, .events = POLLIN};
    return syscall(SYS_ppoll, &fd, 1, &long_ns, NULL, 8);
}
static long in_pselect(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(efd, &set);
    return syscall(SYS_pselect6, efd + 1, &set, NULL, NULL, &long_ns, NULL);
}
static long in_select(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(efd, &set);
    return syscall(SYS_select, efd + 1, &set, NULL, NULL, &long_us);
}
static long in_sendfile(void)
{
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    return sendfile(full[0], file, NULL, 1);
}
static long in_splice(void) { return splice(empty[0], NULL, spliced[1], NULL, 100, 0); }

static struct sleeper {
    const char *name;
    long (*call)(void);
    long result;
    int error, early;
    pthread_t thread;
} sleepers[] = {
    {"ppoll", in_ppoll, 0, 0, 0, 0},     {"pselect6", in_pselect, 0, 0, 0, 0}, {"select", in_select, 0, 0, 0, 0},
    {"sendfile", in_sendfile, 0, 0, 0, 0}, {"splice", in_splice, 0, 0, 0, 0},
};
#define SENDFILE 3
#define NR_SLEEPERS (sizeof(sleepers) / sizeof(sleepers[0]))

static void *sleeper_main(void *argument)
{
    struct sleeper *me = argument;
    atomic_fetch_add(&inside, 1);
    me->result = me->call();
    me->error = errno;
    me->early = !atomic_load(&ending);
    atomic_fetch_add(&returned, 1);
    return NULL;
}

int main(int argc, char **argv)
{
    static char block[4096];
    sigset_t term;
    int sig;

    check_init(argc, argv);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &term, NULL);
    efd = MUST(eventfd(0, 0));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, full));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, empty));
    MUST(pipe(spliced));
    MUST(setsockopt(full[0], SOL_SOCKET, SO_SNDTIMEO, &long_us, sizeof(long_us)));
    MUST(setsockopt(empty[0], SOL_SOCKET, SO_RCVTIMEO, &long_us, sizeof(long_us)));
    while (send(full[0], block, sizeof(block), MSG_DONTWAIT) > 0) {
    }
    for (size_t i = 0; i < NR_SLEEPERS; i++)
        pthread_create(&sleepers[i].thread, NULL, sleeper_main, &sleepers[i]);
    while (atomic_load(&inside) != NR_SLEEPERS)
        sched_yield();
    usleep(50000);
    check_ready();
    do
        sig = sigwaitinfo(&term, NULL);
    while (sig < 0 && errno == EINTR);

    /* A queue that is put back may have room that it had not: a sendfile may end then, as it may whenever there is room. */
    CHECK(atomic_load(&returned) <= (sleepers[SENDFILE].result == 1), "%d calls came back on their own",
          atomic_load(&returned));
    atomic_store(&ending, 1);
    uint64_t one = 1;
    MUST(write(efd, &one, sizeof(one)));
    MUST(write(empty[1], "x", 1));
    while (recv(full[1], block, sizeof(block), MSG_DONTWAIT) > 0) {
    }
    for (size_t i = 0; i < NR_SLEEPERS; i++) {
        pthread_join(sleepers[i].thread, NULL);
        CHECK((!sleepers[i].early || i == SENDFILE) && sleepers[i].result == 1, "%s: result %ld, errno %d, early %d", sleepers[i].name,
              sleepers[i].result, sleepers[i].error, sleepers[i].early);
    }
    return check_done();
}
