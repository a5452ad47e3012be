/* io_uring as libuv uses it: rings for batches of epoll_ctl, with counters that have gone round, a request that was not handed over yet
 * and a completion that was not read yet; both areas mapped, at the very addresses. */
#include "uring_ring.h"
int main(int argc, char **argv)
{
    check_init(argc, argv);
    static struct ring rings[3];
    make(&rings[0], NO_SQARRAY);
    make(&rings[1], 0);
    make(&rings[2], NO_SQARRAY); /* never used before the take */
    for (int i = 0; i < 2; i++) {
        struct ring *r = &rings[i];
        r->event = (struct epoll_event){.events = EPOLLIN, .data.u32 = 7};
        prepare(r, EPOLL_CTL_ADD, 0);
        MUST(hand_over(r));
        if (answer(r, 0) != 0)
            check_die("EPOLL_CTL_ADD");
        for (uint64_t token = 1; token <= 700 + 300u * (unsigned)i; token++) {
            prepare(r, EPOLL_CTL_MOD, token);
            MUST(hand_over(r));
            if (answer(r, token) != 0)
                check_die("EPOLL_CTL_MOD");
        }
        prepare(r, EPOLL_CTL_MOD, 5000);
        MUST(hand_over(r));
        r->event.data.u32 = 8;
        prepare(r, EPOLL_CTL_MOD, 6000);
    }
    check_ready();
    check_wait();
    for (int i = 0; i < 3; i++) {
        struct ring *r = &rings[i];
        struct epoll_event got;
        if (i == 2) {
            r->event = (struct epoll_event){.events = EPOLLIN, .data.u32 = 8};
            prepare(r, EPOLL_CTL_ADD, 6000);
        } else {
            CHECK(answer(r, 5000) == 0, "ring %d: what was not read yet", i);
        }
        CHECK(*r->sq_tail - *r->sq_head == 1, "ring %d: %u to hand over", i, *r->sq_tail - *r->sq_head);
        CHECK(hand_over(r) == 1, "ring %d: handing over: %s", i, strerror(errno));
        CHECK(answer(r, 6000) == 0, "ring %d: what was handed over after", i);
        CHECK(*r->cq_head == *r->cq_tail, "ring %d: something is left", i);
        MUST(write(r->pipe[1], "x", 1));
        CHECK(epoll_wait(r->epoll, &got, 1, 0) == 1 && got.data.u32 == 8, "ring %d: the event", i);
        for (uint64_t token = 1; token <= 1500; token++) {
            prepare(r, EPOLL_CTL_MOD, token);
            if (hand_over(r) != 1 || answer(r, token) != 0) {
                CHECK(0, "ring %d: request %d", i, (int)token);
                break;
            }
        }
    }
    return check_done();
}
