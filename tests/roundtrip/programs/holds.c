/*
 * Holds one thing as nobody: holds WHAT PATH HANDED. With HANDED it is opened as root before the rights are dropped, as a daemon
 * does. WHAT may begin with "flight-": the descriptor is then in a socket's queue only. Says "ready" on descriptor 1.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <err.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { NOBODY = 65534, HELD = 3 };

static void drop(void)
{
    if (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
        err(1, "drop");
}

static void map(const char *path, int flags, int prot, int how)
{
    int fd = open(path, flags);
    if (fd < 0 || mmap(NULL, 4096, prot, how, fd, 0) == MAP_FAILED)
        err(1, "map %s", path);
    close(fd);
}

static int bound(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 5))
        err(1, "bind %s", path);
    return fd;
}

static int ghost(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || write(fd, "ghost", 5) != 5 || unlink(path))
        err(1, "ghost %s", path);
    return fd;
}

static int hold(const char *what, const char *path)
{
    static const struct {
        const char *name;
        int flags;
    } opened[] = {
        {"r", O_RDONLY}, {"w", O_WRONLY}, {"rw", O_RDWR}, {"path", O_PATH}, {"dir", O_RDONLY | O_DIRECTORY},
        {"fifo", O_RDWR | O_NONBLOCK}, {"device", O_RDWR},
    };
    for (size_t i = 0; i < sizeof opened / sizeof *opened; i++)
        if (!strcmp(what, opened[i].name))
            return open(path, opened[i].flags);
    if (!strcmp(what, "inotify")) {
        int fd = inotify_init1(0);
        return inotify_add_watch(fd, path, IN_MODIFY) < 0 ? -1 : fd;
    }
    if (!strcmp(what, "lease")) {
        int fd = open(path, O_RDONLY);
        return fcntl(fd, F_SETLEASE, F_RDLCK) ? -1 : fd;
    }
    if (!strcmp(what, "node"))
        return bound(path);
    if (!strcmp(what, "ghost"))
        return ghost(path);
    if (!strcmp(what, "signals")) {
        /* Allowed to anybody: whether the signal may be sent is asked when it is, with the rights of who set the owner. */
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || fcntl(pair[0], F_SETOWN, atoi(path)) ||
            fcntl(pair[0], F_SETSIG, SIGUSR1) || fcntl(pair[0], F_SETFL, O_ASYNC))
            return -1;
        return pair[0];
    }
    if (!strcmp(what, "private"))
        map(path, O_RDONLY, PROT_READ, MAP_PRIVATE);
    else if (!strcmp(what, "code"))
        map(path, O_RDONLY, PROT_READ | PROT_EXEC, MAP_PRIVATE);
    else if (!strcmp(what, "shared"))
        map(path, O_RDWR, PROT_READ | PROT_WRITE, MAP_SHARED);
    else if (!strcmp(what, "cwd")) {
        if (chdir(path))
            return -1;
    } else if (strcmp(what, "exe") && strcmp(what, "root"))
        errx(1, "what is %s?", what);
    return open("/dev/null", O_RDONLY);
}

static void send_away(int fd)
{
    int pair[2];
    char byte = 'x', control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || sendmsg(pair[0], &message, 0) != 1)
        err(1, "send");
    close(fd);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        errx(1, "holds WHAT PATH HANDED");
    const char *what = argv[1], *path = argv[2];
    int in_flight = !strncmp(what, "flight-", 7), handed = atoi(argv[3]);
    umask(0);
    close_range(HELD, ~0U, 0);
    if (!strcmp(what, "root") && (open("/dev/null", O_RDONLY) < 0 || chroot(path) || chdir("/")))
        err(1, "root");
    if (!handed)
        drop();
    if (strcmp(what, "root")) {
        int fd = hold(what + 7 * in_flight, path);
        if (fd < 0)
            err(1, "%s %s", what, path);
        if (in_flight)
            send_away(fd);
    }
    if (handed)
        drop();
    if (write(1, "ready", 5) != 5)
        return 1;
    for (;;)
        pause();
}
