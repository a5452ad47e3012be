/* Unix sockets: pairs with data and descriptors in flight, datagrams, a listener with its connection, TCP listener. */
#include "selfcheck.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

static void send_fd(int through, int fd)
{
    char byte = 'F', control[CMSG_SPACE(sizeof(int))] = "";
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &fd, sizeof(fd));
    MUST(sendmsg(through, &message, 0));
}

static int receive_fd(int from)
{
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = "";
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    if (recvmsg(from, &message, 0) != 1 || byte != 'F' || !CMSG_FIRSTHDR(&message))
        return -1;
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    int pair[2], datagrams[2], lone[2], ends[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    MUST(write(pair[0], "text", 4));
    MUST(pipe(ends));
    send_fd(pair[0], ends[1]);
    MUST(close(ends[1]));
    MUST(write(pair[0], "after", 5));
    int size = 50000;
    MUST(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, datagrams));
    MUST(send(datagrams[0], "first", 5, 0));
    MUST(send(datagrams[0], "second one", 10, 0));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, lone));
    MUST(write(lone[0], "bye", 3));
    MUST(close(lone[0]));

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/snap-check-%d", (int)getpid());
    unlink(address.sun_path);
    int server = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(bind(server, (struct sockaddr *)&address, sizeof(address)));
    MUST(listen(server, 3));
    int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(connect(client, (struct sockaddr *)&address, sizeof(address)));
    int accepted = MUST(accept(server, NULL, NULL));
    MUST(write(client, "request", 7));
    int tcp = MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    MUST(bind(tcp, (struct sockaddr *)&inet, sizeof(inet)));
    MUST(listen(tcp, 5));
    socklen_t length = sizeof(inet);
    MUST(getsockname(tcp, (struct sockaddr *)&inet, &length));
    check_ready();
    check_wait();

    char text[64];
    CHECK(read(pair[1], text, 4) == 4 && !memcmp(text, "text", 4), "text");
    int passed = receive_fd(pair[1]);
    CHECK(passed >= 0, "no descriptor in flight");
    CHECK(write(passed, "here", 4) == 4 && read(ends[0], text, 64) == 4 && !memcmp(text, "here", 4), "passed descriptor");
    close(passed);
    CHECK(read(ends[0], text, 64) == 0, "somebody else holds the passed descriptor");
    CHECK(read(pair[1], text, 64) == 5 && !memcmp(text, "after", 5), "after");
    CHECK(write(pair[1], "back", 4) == 4 && read(pair[0], text, 64) == 4, "the other way");
    int now = 0;
    length = sizeof(now);
    CHECK(getsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &now, &length) == 0 && now == 2 * size, "SO_SNDBUF %d", now);
    CHECK(recv(datagrams[1], text, 64, 0) == 5, "first datagram");
    CHECK(recv(datagrams[1], text, 64, 0) == 10, "second datagram");
    CHECK(recv(datagrams[1], text, 64, 0) == -1 && errno == EAGAIN, "a datagram too many");
    CHECK(read(lone[1], text, 64) == 3 && read(lone[1], text, 64) == 0, "what a closed peer left");
    CHECK(read(accepted, text, 64) == 7, "request");
    CHECK(write(accepted, "reply", 5) == 5 && read(client, text, 64) == 5, "reply");
    int fresh = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connect(fresh, (struct sockaddr *)&address, sizeof(address)) == 0, "listener: %s", strerror(errno));
    int fresh_tcp = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(fresh_tcp, (struct sockaddr *)&inet, sizeof(inet)) == 0, "tcp listener: %s", strerror(errno));
    CHECK(accept(tcp, NULL, NULL) >= 0 && accept(server, NULL, NULL) >= 0, "accept");
    unlink(address.sun_path);
    return check_done();
}
