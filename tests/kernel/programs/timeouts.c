/* One thread for each call whose timeout begins anew when it is restarted. Each says on stdout how its call has ended, or what is wrong
 * with that: no call may return before its time. usage: timeouts MILLISECONDS [CALL]
 *
 * SIGUSR1 ends the wait of "again" once, a byte on stdin that of "event": both wait once more then, the whole time. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static long milliseconds;
static struct timespec *span;  /* read-only memory */
static struct timeval *value;  /* the same */

static long now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000 + at.tv_nsec / 1000;
}

static void on_signal(int signo) { (void)signo; }

static int by_epoll(void) { struct epoll_event got; return epoll_wait(epoll_create1(0), &got, 1, (int)milliseconds); }
static int by_epoll2(void) { struct epoll_event got; return (int)syscall(441, epoll_create1(0), &got, 1, span, NULL, 8); }
static int by_sigtimedwait(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    return sigtimedwait(&set, NULL, span);
}
static int by_semtimedop(void)
{
    struct sembuf down = {0, -1, 0};
    int id = semget(IPC_PRIVATE, 1, 0600);
    return semtimedop(id, &down, 1, span);
}
static int by_io_getevents(void)
{
    aio_context_t context = 0;
    struct io_event got;
    syscall(SYS_io_setup, 1, &context);
    return (int)syscall(SYS_io_getevents, context, 1, 1, &got, span);
}
static int by_select(void) { return (int)syscall(SYS_select, 0, NULL, NULL, NULL, value); }
static int by_pselect(void) { return (int)syscall(SYS_pselect6, 0, NULL, NULL, NULL, span, NULL); }
static int by_ppoll(void) { return (int)syscall(SYS_ppoll, NULL, 0, span, NULL, 8); }
static void limit(int fd, int option)
{
    if (setsockopt(fd, SOL_SOCKET, option, value, sizeof(*value)))
        abort();
}
static int by_recv(void)
{
    int ends[2];
    char byte;
    socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
    limit(ends[0], SO_RCVTIMEO);
    return (int)recv(ends[0], &byte, 1, 0);
}
static int by_send(void)
{
    static char bytes[4096];
    int ends[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
    while (send(ends[0], bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
        ;
    limit(ends[0], SO_SNDTIMEO);
    return (int)write(ends[0], bytes, 1);
}
static int listener(struct sockaddr_in *at)
{
    socklen_t length = sizeof(*at);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    *at = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (bind(fd, (struct sockaddr *)at, length) || listen(fd, 0) || getsockname(fd, (struct sockaddr *)at, &length))
        abort();
    return fd;
}
static int by_accept(void)
{
    struct sockaddr_in at;
    int fd = listener(&at);
    limit(fd, SO_RCVTIMEO);
    return accept(fd, NULL, NULL);
}
static int by_connect_unix(void)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    socklen_t length = sizeof(at);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    bind(fd, (struct sockaddr *)&at, sizeof(at.sun_family));
    getsockname(fd, (struct sockaddr *)&at, &length);
    listen(fd, 0);
    if (connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&at, length))
        abort();
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    limit(fd, SO_SNDTIMEO);
    return connect(fd, (struct sockaddr *)&at, length);
}
static int by_connect(void)
{
    struct sockaddr_in at;
    listener(&at);
    if (connect(socket(AF_INET, SOCK_STREAM, 0), (struct sockaddr *)&at, sizeof(at)))
        abort();
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    limit(fd, SO_SNDTIMEO);
    return connect(fd, (struct sockaddr *)&at, sizeof(at));
}
static int by_again(void)
{
    struct epoll_event got;
    int fd = epoll_create1(0);
    printf("waits\n");
    if (epoll_wait(fd, &got, 1, (int)milliseconds) != -1 || errno != EINTR)
        return 2;
    printf("interrupted\n");
    long begun = now();
    int result = epoll_wait(fd, &got, 1, (int)milliseconds);
    return now() - begun < milliseconds * 1000 ? 3 : result;
}
static int by_event(void)
{
    struct epoll_event got, in = {.events = EPOLLIN};
    int fd = epoll_create1(0), result = 1;
    char byte;
    long begun = 0;
    epoll_ctl(fd, EPOLL_CTL_ADD, 0, &in);
    for (int i = 0; i < 2; i++) {
        result = epoll_wait(fd, &got, 1, (int)milliseconds);
        if (i == 0 && (result != 1 || read(0, &byte, 1) != 1))
            return 2;
        if (i == 0)
            begun = now();
    }
    return now() - begun < milliseconds * 1000 ? 3 : result;
}

static struct one {
    const char *name;
    int (*call)(void);
    int result, error;
    pthread_t thread;
} all[] = {
    {"epoll_wait", by_epoll, 0, 0, 0}, {"epoll_pwait2", by_epoll2, 0, 0, 0},
    {"sigtimedwait", by_sigtimedwait, -1, EAGAIN, 0}, {"semtimedop", by_semtimedop, -1, EAGAIN, 0},
    {"io_getevents", by_io_getevents, 0, 0, 0}, {"select", by_select, 0, 0, 0},
    {"pselect6", by_pselect, 0, 0, 0}, {"ppoll", by_ppoll, 0, 0, 0},
    {"recv", by_recv, -1, EAGAIN, 0}, {"send", by_send, -1, EAGAIN, 0}, {"accept", by_accept, -1, EAGAIN, 0},
    {"connect", by_connect, -1, EINPROGRESS, 0}, {"connect_unix", by_connect_unix, -1, EAGAIN, 0},
    {"again", by_again, 0, 0, 0}, {"event", by_event, 0, 0, 0},
};

static void *run(void *argument)
{
    struct one *me = argument;
    long begun = now();
    errno = 0;
    int result = me->call(), error = result < 0 ? errno : 0;
    long took = now() - begun;
    if (result != me->result || error != me->error)
        printf("%s: result %d, error %d\n", me->name, result, error);
    else if (took < milliseconds * 1000)
        printf("%s: after %ld microseconds\n", me->name, took);
    else
        printf("%s: right\n", me->name);
    return NULL;
}

int main(int argc, char **argv)
{
    const char *only = argc > 2 ? argv[2] : NULL;
    sigset_t set;

    milliseconds = atol(argv[1]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (only == NULL && unshare(CLONE_NEWIPC))
        abort();
    span = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *span = (struct timespec){milliseconds / 1000, milliseconds % 1000 * 1000000};
    value = (void *)(span + 1);
    *value = (struct timeval){milliseconds / 1000, milliseconds % 1000 * 1000};
    mprotect(span, 4096, PROT_READ);
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal}, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (only) {
        for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++)
            if (!strcmp(all[i].name, only)) {
                printf("begins\n");
                run(all + i);
            }
        return 0;
    }
    for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++) {
        if (all[i].call == by_again) {
            sigemptyset(&set);
            sigaddset(&set, SIGUSR1);
            pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        }
        pthread_create(&all[i].thread, NULL, run, all + i);
        pthread_sigmask(SIG_BLOCK, &set, NULL);
    }
    for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++)
        pthread_join(all[i].thread, NULL);
    printf("over\n");
    pause();
    return 0;
}
