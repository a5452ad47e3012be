/* Threads in the middle of transfers that return only when all is done: none may return less because of a take or a rollback. The
 * other side reads (or writes) the rest only after SIGTERM, byte for byte what was sent. */
#include "selfcheck.h"
#include <pthread.h>
#include <sys/random.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define SIZE 1000000
static unsigned char source[SIZE], sink[SIZE];
static atomic_int inside;

enum how { WRITE, WRITEV, SEND, SENDMSG, SENDFILE, RECV, RECVMSG };
static struct transfer {
    const char *name;
    enum how how;
    int is_socket;
    int ends[2]; /* the thread's, ours */
    long result;
    int error;
    pthread_t thread;
    unsigned char *into;
} transfers[] = {
    {.name = "write to a pipe", .how = WRITE},
    {.name = "writev to a pipe", .how = WRITEV},
    {.name = "sendfile to a socket", .how = SENDFILE, .is_socket = 1},
    {.name = "write to a socket", .how = WRITE, .is_socket = 1},
    {.name = "send", .how = SEND, .is_socket = 1},
    {.name = "sendmsg", .how = SENDMSG, .is_socket = 1},
    {.name = "recv with MSG_WAITALL", .how = RECV, .is_socket = 1},
    {.name = "recvmsg with MSG_WAITALL", .how = RECVMSG, .is_socket = 1},
};
#define NR (sizeof(transfers) / sizeof(transfers[0]))

static void *transfer_main(void *argument)
{
    struct transfer *me = argument;
    struct iovec parts[3] = {{source, 10}, {source + 10, SIZE / 2}, {source + 10 + SIZE / 2, SIZE - SIZE / 2 - 10}};
    struct iovec room[2] = {{me->into, SIZE / 3}, {me->into + SIZE / 3, SIZE - SIZE / 3}};
    struct msghdr out = {.msg_iov = parts, .msg_iovlen = 3}, in = {.msg_iov = room, .msg_iovlen = 2};
    int file;

    atomic_fetch_add(&inside, 1);
    switch (me->how) {
    case WRITE: me->result = write(me->ends[0], source, SIZE); break;
    case WRITEV: me->result = writev(me->ends[0], parts, 3); break;
    case SEND: me->result = send(me->ends[0], source, SIZE, 0); break;
    case SENDMSG: me->result = sendmsg(me->ends[0], &out, 0); break;
    case SENDFILE:
        file = open("source", O_RDONLY | O_CLOEXEC);
        me->result = sendfile(me->ends[0], file, NULL, SIZE);
        break;
    case RECV: me->result = recv(me->ends[0], me->into, SIZE, MSG_WAITALL); break;
    case RECVMSG: me->result = recvmsg(me->ends[0], &in, MSG_WAITALL); break;
    }
    me->error = errno;
    return NULL;
}

int main(int argc, char **argv)
{
    sigset_t term;
    int sig;

    check_init(argc, argv);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &term, NULL);
    for (unsigned i = 0; i < SIZE; i++)
        source[i] = (unsigned char)(i * 2654435761U >> 13);
    int file = MUST(open("source", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    MUST(write(file, source, SIZE));
    MUST(close(file));
    for (size_t i = 0; i < NR; i++) {
        struct transfer *one = transfers + i;
        int ends[2];
        if (one->is_socket) {
            MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, one->ends));
        } else {
            MUST(pipe(ends));
            one->ends[0] = ends[1];
            one->ends[1] = ends[0];
        }
        one->into = calloc(1, SIZE);
        if (one->how >= RECV)
            MUST(write(one->ends[1], source, 5000));
        pthread_create(&one->thread, NULL, transfer_main, one);
    }
    while (atomic_load(&inside) != NR)
        sched_yield();
    usleep(100000);
    check_ready();
    do
        sig = sigwaitinfo(&term, NULL);
    while (sig < 0 && errno == EINTR);

    for (size_t i = 0; i < NR; i++) {
        struct transfer *one = transfers + i;
        const unsigned char *got = one->how >= RECV ? one->into : sink;
        size_t at = one->how >= RECV ? 5000 : 0;

        while (at < SIZE) {
            struct pollfd end = {.fd = one->ends[1], .events = one->how >= RECV ? POLLOUT : POLLIN};
            if (poll(&end, 1, 5000) <= 0) /* whoever was told that less was done does nothing more */
                break;
            ssize_t moved = one->how >= RECV ? write(one->ends[1], source + at, SIZE - at)
                                             : read(one->ends[1], sink + at, SIZE - at);
            if (moved <= 0)
                break;
            at += (size_t)moved;
        }
        CHECK(at == SIZE, "%s: %zu bytes came", one->name, at);
        pthread_join(one->thread, NULL);
        CHECK(one->result == SIZE, "%s: result %ld, errno %d", one->name, one->result, one->error);
        CHECK(one->result != SIZE || memcmp(got, source, SIZE) == 0, "%s: other bytes", one->name);
    }
    return check_done();
}
