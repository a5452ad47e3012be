/* Threads inside every system call that the kernel restarts on its own, relative and absolute: none may fail with EINTR, end
 * early or end late because of a take or a rollback. The clock is CLOCK_MONOTONIC, which goes on while the job does not exist. */
#include "selfcheck.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <semaphore.h>

static int efd;             /* becomes readable at the end */
static int futex_word;      /* woken at the end */
static sem_t semaphore;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static int condition_met;
static atomic_int inside, returned;
static int pipe_fds[2], sockets[2];

struct sleeper {
    const char *name;
    long (*call)(void);
    long expected;
    int over_early; /* it came back before the end was announced */
    long result;
    int error;
    pthread_t thread;
};
static atomic_int ending;

static long in_poll(void)
{
    struct pollfd fd = {.fd = efd, .events = POLLIN};
    return poll(&fd, 1, -1);
}
static long in_poll_timed(void)
{
    struct pollfd fd = {.fd = efd, .events = POLLIN};
    return poll(&fd, 1, 100000);
}
static long in_ppoll(void)
{
    struct pollfd fd = {.fd = efd, .events = POLLIN};
    struct timespec timeout = {100, 0};
    return ppoll(&fd, 1, &timeout, NULL);
}
static long in_select(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(efd, &set);
    return select(efd + 1, &set, NULL, NULL, NULL);
}
static long in_select_timed(void)
{
    fd_set set;
    struct timeval timeout = {100, 0};
    FD_ZERO(&set);
    FD_SET(efd, &set);
    return select(efd + 1, &set, NULL, NULL, &timeout);
}
static long in_epoll(void)
{
    struct epoll_event event = {.events = EPOLLIN}, got;
    int ep = epoll_create1(EPOLL_CLOEXEC);
    if (ep < 0 || epoll_ctl(ep, EPOLL_CTL_ADD, efd, &event) != 0)
        return -2;
    return epoll_wait(ep, &got, 1, 100000);
}
static long in_futex(void)
{
    while (__atomic_load_n(&futex_word, __ATOMIC_ACQUIRE) == 0) {
        long result = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
        if (result != 0 && errno != EAGAIN)
            return -1;
        if (result == 0 && !atomic_load(&ending))
            return -3;
    }
    return 0;
}
static long in_futex_timed(void)
{
    struct timespec timeout = {100, 0};
    long result = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, &timeout, NULL, 0);
    return result != 0 && errno == EAGAIN ? 0 : result;
}
static long in_read(void)
{
    char byte;
    return read(pipe_fds[0], &byte, 1);
}
static long in_sem(void) { return sem_wait(&semaphore); }
static long in_condition(void)
{
    pthread_mutex_lock(&mutex);
    while (!condition_met)
        pthread_cond_wait(&condition, &mutex);
    pthread_mutex_unlock(&mutex);
    return 0;
}
static long in_sigtimedwait(void)
{
    sigset_t set;
    struct timespec timeout = {100, 0};
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    return sigtimedwait(&set, NULL, &timeout);
}
static long in_recv_timed(void)
{
    struct timeval timeout = {100, 0};
    char byte;
    if (setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) != 0)
        return -2;
    return recv(sockets[0], &byte, 1, 0);
}

static struct sleeper sleepers[] = {
    {"poll", in_poll, 1, 0, 0, 0, 0},
    {"poll with a timeout", in_poll_timed, 1, 0, 0, 0, 0},
    {"ppoll", in_ppoll, 1, 0, 0, 0, 0},
    {"select", in_select, 1, 0, 0, 0, 0},
    {"select with a timeout", in_select_timed, 1, 0, 0, 0, 0},
    {"futex", in_futex, 0, 0, 0, 0, 0},
    {"futex with a timeout", in_futex_timed, 0, 0, 0, 0, 0},
    {"read of a pipe", in_read, 1, 0, 0, 0, 0},
    {"sem_wait", in_sem, 0, 0, 0, 0, 0},
    {"pthread_cond_wait", in_condition, 0, 0, 0, 0, 0},
    /* Linux ends these with EINTR whenever a task was stopped (signal(7)), but not because of snap. */
    {"sigtimedwait", in_sigtimedwait, SIGUSR2, 0, 0, 0, 0},
    {"epoll_wait", in_epoll, 1, 0, 0, 0, 0},
    {"recv with a timeout", in_recv_timed, 1, 0, 0, 0, 0},
};
#define NR_SLEEPERS (sizeof(sleepers) / sizeof(sleepers[0]))

static void *sleeper_main(void *argument)
{
    struct sleeper *me = argument;
    atomic_fetch_add(&inside, 1);
    me->result = me->call();
    me->error = errno;
    me->over_early = !atomic_load(&ending);
    atomic_fetch_add(&returned, 1);
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    efd = MUST(eventfd(0, 0));
    MUST(pipe(pipe_fds));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
    sem_init(&semaphore, 0, 0);
    for (size_t i = 0; i < NR_SLEEPERS; i++)
        pthread_create(&sleepers[i].thread, NULL, sleeper_main, &sleepers[i]);
    while (atomic_load(&inside) != NR_SLEEPERS)
        sched_yield();
    usleep(50000);
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    check_ready();
    int sig;
    do
        sig = sigwaitinfo(&term, NULL);
    while (sig < 0 && errno == EINTR);

    CHECK(atomic_load(&returned) == 0, "%d calls came back on their own", atomic_load(&returned));
    atomic_store(&ending, 1);
    __atomic_store_n(&futex_word, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 100, NULL, NULL, 0);
    uint64_t one = 1;
    MUST(write(efd, &one, sizeof(one)));
    MUST(write(pipe_fds[1], "x", 1));
    MUST(write(sockets[1], "x", 1));
    sem_post(&semaphore);
    pthread_mutex_lock(&mutex);
    condition_met = 1;
    pthread_cond_broadcast(&condition);
    pthread_mutex_unlock(&mutex);
    kill(getpid(), SIGUSR2);
    for (size_t i = 0; i < NR_SLEEPERS; i++) {
        struct sleeper *one_of = &sleepers[i];
        pthread_join(one_of->thread, NULL);
        CHECK(!one_of->over_early && one_of->result == one_of->expected, "%s: result %ld, errno %d, early %d", one_of->name,
              one_of->result, one_of->error, one_of->over_early);
    }
    return check_done();
}
