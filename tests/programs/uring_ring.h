/* A ring of io_uring for batches of epoll_ctl, as libuv has it. */
#ifndef URING_RING_H
#define URING_RING_H

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
    unsigned char how; /* IOSQE_* of every request */
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
                                 .flags = r->how,
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

#endif
