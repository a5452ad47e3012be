/* An io_uring ring that has neither a descriptor nor a mapping of its own: only its thread's list of rings leads to it. Refused by name. */
// snap-test: requires io_uring
// snap-test: refused registered with the thread
#include "selfcheck.h"
#include <linux/io_uring.h>
#include <sys/mman.h>

#ifndef IORING_SETUP_NO_MMAP
#define IORING_SETUP_NO_MMAP (1U << 14)
#define IORING_SETUP_REGISTERED_FD_ONLY (1U << 15)
#endif

int main(int argc, char **argv)
{
    check_init(argc, argv);
    char *memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        check_die("mmap");
    struct io_uring_params params = {.flags = IORING_SETUP_NO_MMAP | IORING_SETUP_REGISTERED_FD_ONLY};
    uint64_t places[2] = {(uint64_t)(uintptr_t)memory, (uint64_t)(uintptr_t)memory + 4096};
    memcpy((char *)&params.cq_off + sizeof(params.cq_off) - 8, &places[0], 8); /* cq_off.user_addr */
    memcpy((char *)&params.sq_off + sizeof(params.sq_off) - 8, &places[1], 8); /* sq_off.user_addr */
    if (syscall(SYS_io_uring_setup, 4, &params) != 0)
        check_die("io_uring_setup without a descriptor");
    check_ready();
    check_wait();
    CHECK(*(volatile unsigned *)(memory + params.sq_off.ring_entries) == params.sq_entries, "the ring changed");
    return check_done();
}
