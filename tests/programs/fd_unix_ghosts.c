/* Unix sockets whose address leads to them no more: unlinked, replaced by a FIFO, moved; datagram sockets without their peer. */
#include "selfcheck.h"
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static struct sockaddr_un address(const char *name)
{
    struct sockaddr_un result = {.sun_family = AF_UNIX};
    if (snprintf(result.sun_path, sizeof(result.sun_path), "%s", name) >= (int)sizeof(result.sun_path))
        check_die("the path is too long: %s", name);
    return result;
}

static int bound(int type, const char *name)
{
    struct sockaddr_un to = address(name);
    int fd = MUST(socket(AF_UNIX, type, 0));
    MUST(bind(fd, (struct sockaddr *)&to, sizeof(to)));
    if (type != SOCK_DGRAM)
        MUST(listen(fd, 4));
    return fd;
}

static int connected(int type, const char *name)
{
    struct sockaddr_un to = address(name);
    int fd = MUST(socket(AF_UNIX, type, 0));
    MUST(connect(fd, (struct sockaddr *)&to, sizeof(to)));
    return fd;
}

static int is_at(int fd, const char *name)
{
    struct sockaddr_un now;
    socklen_t length = sizeof(now);
    return getsockname(fd, (struct sockaddr *)&now, &length) == 0 && !strcmp(now.sun_path, name);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    char base[] = "/tmp/snap-ghosts-XXXXXX", dead[80], node[64], text[80];
    if (!mkdtemp(base))
        check_die("mkdtemp");
    snprintf(dead, sizeof(dead), "%s/gone/sock", base);
    snprintf(node, sizeof(node), "%s/node", base);
    *strrchr(dead, '/') = 0;
    MUST(mkdir(dead, 0700));
    dead[strlen(dead)] = '/';

    /* Two servers with one address, each with a client that sent something, both unlinked, the directory too. */
    int server[2], client[2];
    for (int i = 0; i < 2; i++) {
        server[i] = bound(SOCK_DGRAM, dead);
        client[i] = connected(SOCK_DGRAM, dead);
        MUST(send(client[i], i ? "one" : "zero", i ? 3 : 4, 0));
        MUST(unlink(dead));
    }
    int listener = bound(SOCK_STREAM, dead), caller = connected(SOCK_STREAM, dead), answer = MUST(accept(listener, NULL, NULL));
    MUST(unlink(dead));
    int lost = bound(SOCK_SEQPACKET, dead), lost_caller = connected(SOCK_SEQPACKET, dead);
    int lost_answer = MUST(accept(lost, NULL, NULL));
    MUST(close(lost));
    MUST(unlink(dead));
    *strrchr(dead, '/') = 0;
    MUST(rmdir(dead));
    dead[strlen(dead)] = '/';
    /* A FIFO and another socket where sockets were. */
    int under = bound(SOCK_DGRAM, node), above = connected(SOCK_DGRAM, node);
    MUST(unlink(node));
    MUST(mkfifo(node, 0600));
    char moved[96];
    snprintf(moved, sizeof(moved), "%s.moved", node);
    snprintf(text, sizeof(text), "%s2", node);
    int first = bound(SOCK_STREAM, text);
    MUST(rename(text, moved));
    int second = bound(SOCK_STREAM, text);
    MUST(rename(moved, text));
    /* Relative addresses. */
    int here = bound(SOCK_DGRAM, "here"), to_here = connected(SOCK_DGRAM, "here");
    int relative = bound(SOCK_DGRAM, "relative");
    MUST(unlink("relative"));
    /* Datagram pairs of which one end is left, one with a datagram, one that is bound. */
    int pair[2], bound_pair[2];
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    MUST(send(pair[0], "last words", 10, 0));
    MUST(close(pair[0]));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, bound_pair));
    struct sockaddr_un abstract = {.sun_family = AF_UNIX};
    snprintf(abstract.sun_path + 1, 60, "snap-ghost-%d", (int)getpid());
    MUST(bind(bound_pair[1], (struct sockaddr *)&abstract, sizeof(abstract)));
    MUST(close(bound_pair[0]));
    /* A datagram socket that is connected to itself, with a message. */
    struct sockaddr_un own = address("own");
    int mirror = bound(SOCK_DGRAM, "own");
    MUST(connect(mirror, (struct sockaddr *)&own, sizeof(own)));
    MUST(write(mirror, "me", 2));
    check_ready();
    check_wait();

    char got[64];
    for (int i = 0; i < 2; i++) {
        CHECK(recv(server[i], got, 64, MSG_DONTWAIT) == (i ? 3 : 4) && got[0] == (i ? 'o' : 'z'), "datagram of %d", i);
        CHECK(send(client[i], "x", 1, 0) == 1 && recv(server[i], got, 64, MSG_DONTWAIT) == 1, "client %d", i);
        CHECK(is_at(server[i], dead), "address of server %d", i);
    }
    CHECK(is_at(listener, dead) && is_at(answer, dead), "addresses");
    CHECK(write(caller, "ab", 2) == 2 && read(answer, got, 64) == 2 && write(answer, "c", 1) == 1 && read(caller, got, 64) == 1, "stream");
    CHECK(is_at(lost_answer, dead) && write(lost_caller, "ab", 2) == 2 && read(lost_answer, got, 64) == 2, "seqpacket");
    struct stat info;
    CHECK(stat(node, &info) == 0 && S_ISFIFO(info.st_mode), "the FIFO above");
    CHECK(write(above, "d", 1) == 1 && recv(under, got, 64, MSG_DONTWAIT) == 1, "below the FIFO");
    int fresh = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un to = address(text);
    CHECK(connect(fresh, (struct sockaddr *)&to, sizeof(to)) == 0 && accept(first, NULL, NULL) >= 0, "the node: %s", strerror(errno));
    CHECK(is_at(second, text), "the second address");
    CHECK(is_at(relative, "relative") && is_at(here, "here"), "the relative addresses");
    CHECK(write(to_here, "h", 1) == 1 && recv(here, got, 64, MSG_DONTWAIT) == 1, "the relative node");
    int later = connected(SOCK_DGRAM, "here");
    CHECK(write(later, "h", 1) == 1 && recv(here, got, 64, MSG_DONTWAIT) == 1, "to the relative node");
    CHECK(recv(mirror, got, 64, MSG_DONTWAIT) == 2 && write(mirror, "x", 1) == 1 && recv(mirror, got, 64, MSG_DONTWAIT) == 1,
          "connected to itself: %s", strerror(errno));
    CHECK(recv(pair[1], got, 64, MSG_DONTWAIT) == 10, "what a closed peer had sent");
    CHECK(send(pair[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == ECONNREFUSED, "to a closed peer: %s", strerror(errno));
    CHECK(send(bound_pair[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == ECONNREFUSED, "bound: %s", strerror(errno));
    unlink(node);
    unlink(text);
    CHECK(rmdir(base) == 0, "something was left in %s: %s", base, strerror(errno));
    return check_done();
}
