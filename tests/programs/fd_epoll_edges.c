/* Edge-triggered entries of epoll: what was reported is not reported again, what was not is, and new edges still come. */
#include "selfcheck.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

static int add(int instance, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    return MUST(epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event));
}

int main(int argc, char **argv)
{
    struct epoll_event found[8];
    uint64_t one = 1;
    int ends[2];
    check_init(argc, argv);
    MUST(pipe(ends));
    MUST(write(ends[1], "bytes", 5));
    int told = MUST(epoll_create1(0)), untold = MUST(epoll_create1(0)), counter = MUST(eventfd(1, 0));
    add(told, ends[0], EPOLLIN | EPOLLET, 1);
    add(told, ends[1], EPOLLOUT | EPOLLET, 2);
    add(told, counter, EPOLLIN | EPOLLET | EPOLLONESHOT, 3);
    int later = MUST(eventfd(0, 0));
    add(told, later, EPOLLIN | EPOLLONESHOT, 5);
    int nr = MUST(epoll_wait(told, found, 8, 0));
    if (nr != 3)
        check_die("%d events", nr);
    add(untold, ends[0], EPOLLIN | EPOLLET, 1);
    check_ready();
    check_wait();
    nr = epoll_wait(told, found, 8, 0);
    CHECK(nr == 0, "%d events that were reported before, the first is %d", nr, (int)found[0].data.u64);
    nr = epoll_wait(untold, found, 8, 0);
    CHECK(nr == 1, "%d events that were not reported yet", nr);
    CHECK(write(ends[1], "x", 1) == 1 && write(later, &one, 8) == 8, "write");
    nr = epoll_wait(told, found, 8, 0);
    CHECK(nr == 2, "%d new events", nr);
    CHECK(write(later, &one, 8) == 8, "write");
    nr = epoll_wait(told, found, 8, 0);
    CHECK(nr == 0, "%d events of an entry that is used up", nr);
    return check_done();
}
