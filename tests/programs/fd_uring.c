/* io_uring as libuv uses it: rings for batches of epoll_ctl, with counters that have gone round, a request that was not handed over yet
 * and a completion that was not read yet; both areas mapped, at the very addresses. */
#include "selfcheck.h"
#include <linux/io_uring.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#define ENTRIES 256
#define NO_SQARRAY (1u << 16)

struct ring {
    int fd, epoll, pipe[2];
    char *queues;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    volatile unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
    unsigned cq_mask;
    struct epoll_event event;
};

static void make(struct ring *r, unsigned flags)
{
    struct io_uring_params p = {.flags = flags};
    r->fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
    if (r->fd < 0 && flags) { /* a kernel before 6.6 */
        p = (struct io_uring_params){0};
        r->fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
    }
    if (r->fd < 0)
        check_die("io_uring_setup");
    size_t size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    if (!(p.flags & NO_SQARRAY) && size < p.sq_off.array + ENTRIES * sizeof(unsigned))
        size = p.sq_off.array + ENTRIES * sizeof(unsigned);
    r->queues = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
    r->sqes = mmap(NULL, ENTRIES * sizeof(*r->sqes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd,
                   IORING_OFF_SQES);
    if (r->queues == MAP_FAILED || (void *)r->sqes == MAP_FAILED)
        check_die("mmap");
    r->cqes = (struct io_uring_cqe *)(r->queues + p.cq_off.cqes);
    r->sq_head = (unsigned *)(r->queues + p.sq_off.head);
    r->sq_tail = (unsigned *)(r->queues + p.sq_off.tail);
    r->cq_head = (unsigned *)(r->queues + p.cq_off.head);
    r->cq_tail = (unsigned *)(r->queues + p.cq_off.tail);
    r->cq_mask = p.cq_entries - 1;
    if (!(p.flags & NO_SQARRAY))
        for (unsigned i = 0; i < ENTRIES; i++)
            ((unsigned *)(r->queues + p.sq_off.array))[i] = i;
    r->epoll = MUST(epoll_create1(EPOLL_CLOEXEC));
    MUST(pipe(r->pipe));
}

static void prepare(struct ring *r, int op, uint64_t token)
{
    struct io_uring_sqe *sqe = &r->sqes[*r->sq_tail & (ENTRIES - 1)];
    *sqe = (struct io_uring_sqe){.opcode = IORING_OP_EPOLL_CTL,
                                 .fd = r->epoll,
                                 .addr = (uintptr_t)&r->event,
                                 .len = (unsigned)op,
                                 .off = (unsigned)r->pipe[0],
                                 .user_data = token};
    *r->sq_tail = *r->sq_tail + 1;
}

static long hand_over(struct ring *r)
{
    unsigned n = *r->sq_tail - *r->sq_head;
    return syscall(SYS_io_uring_enter, r->fd, n, n, IORING_ENTER_GETEVENTS, NULL, 0);
}

static int answer(struct ring *r, uint64_t token)
{
    struct io_uring_cqe *cqe = &r->cqes[*r->cq_head & r->cq_mask];
    if (*r->cq_head == *r->cq_tail || cqe->user_data != token)
        return -1000;
    *r->cq_head = *r->cq_head + 1;
    return cqe->res;
}

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
