/* Out-of-band bytes in unix stream sockets: first, in the middle, last; inline or not; the queue as it was. */
#include "selfcheck.h"
#include <sys/ioctl.h>
#include <sys/socket.h>

#define NR_CASES 8

static void fill(int case_nr, int pair[2])
{
    int on = 1;
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair));
    if (case_nr & 1)
        MUST(setsockopt(pair[1], SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on)));
    if (case_nr & 2)
        MUST(send(pair[0], "before", 6, 0));
    MUST(send(pair[0], "!", 1, MSG_OOB));
    if (case_nr & 4)
        MUST(send(pair[0], "after", 5, 0));
}

/* All that a program can find out by reading: the queue's length, the mark, each read's bytes. */
static void drain(int fd, char *text, size_t size)
{
    char data[64];
    int queued = 0, mark = 0;
    ioctl(fd, FIONREAD, &queued);
    ioctl(fd, SIOCATMARK, &mark);
    struct pollfd poll_for = {fd, POLLIN | POLLPRI, 0};
    poll(&poll_for, 1, 0);
    ssize_t nr = recv(fd, data, 1, MSG_OOB | MSG_PEEK);
    size_t at = (size_t)snprintf(text, size, "%d %d %#x %zd:%.*s", queued, mark, (unsigned)poll_for.revents, nr,
                                 nr > 0 ? (int)nr : 0, data);
    while ((nr = recv(fd, data, sizeof(data), 0)) > 0 && at < size) {
        ioctl(fd, SIOCATMARK, &mark);
        at += (size_t)snprintf(text + at, size - at, " [%.*s] %d", (int)nr, data, mark);
    }
}

int main(int argc, char **argv)
{
    int pairs[NR_CASES][2], fresh[2];
    check_init(argc, argv);
    for (int i = 0; i < NR_CASES; i++)
        fill(i, pairs[i]);
    check_ready();
    check_wait();
    for (int i = 0; i < NR_CASES; i++) {
        char got[256], expected[256];
        fill(i, fresh);
        drain(fresh[1], expected, sizeof(expected));
        drain(pairs[i][1], got, sizeof(got));
        CHECK(!strcmp(got, expected), "case %d: %s, not %s", i, got, expected);
        close(fresh[0]);
        close(fresh[1]);
    }
    return check_done();
}
