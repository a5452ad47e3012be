/*
 * descriptors COUNT DIRECTORY: one process with COUNT descriptors, as a busy server has them: files with offsets, duplicates,
 * pipes with a few bytes in them, socket pairs, eventfds, epolls that watch some of the others.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int nr, made = 0, epoll = -1, pair[2];
    char name[64];
    struct rlimit most;

    if (argc < 3 || chdir(argv[2]) != 0)
        return 2;
    nr = atoi(argv[1]);
    getrlimit(RLIMIT_NOFILE, &most);
    most.rlim_cur = most.rlim_max;
    setrlimit(RLIMIT_NOFILE, &most);
    for (int i = 0; made < nr; i++) {
        if (i % 64 == 0) {
            epoll = epoll_create1(EPOLL_CLOEXEC);
            made++;
        }
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = (unsigned)i};
        int fd = -1;
        switch (i % 8) {
        case 0: case 1: case 2: case 3:
            snprintf(name, sizeof(name), "file%d", i);
            fd = open(name, O_RDWR | O_CREAT, 0600);
            if (fd < 0 || write(fd, name, 8) != 8)
                return 3;
            made++;
            break;
        case 4:
            if ((fd = dup(made / 2)) < 0)
                return 4;
            made++;
            break;
        case 5:
            if (pipe2(pair, O_CLOEXEC) < 0 || (i % 32 == 5 && write(pair[1], "some", 4) != 4))
                return 5;
            epoll_ctl(epoll, EPOLL_CTL_ADD, pair[0], &event);
            made += 2;
            break;
        case 6:
            if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0 || (i % 32 == 6 && write(pair[1], "some", 4) != 4))
                return 6;
            epoll_ctl(epoll, EPOLL_CTL_ADD, pair[0], &event);
            made += 2;
            break;
        default:
            if ((fd = eventfd((unsigned)i, EFD_NONBLOCK)) < 0)
                return 7;
            epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
            made++;
        }
    }
    close(open("ready", O_WRONLY | O_CREAT, 0600));
    for (;;)
        pause();
}
