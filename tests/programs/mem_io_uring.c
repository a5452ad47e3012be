/* An io_uring ring that is not as libuv has them: named, refused, left alone. */
// snap-test: refused io_uring
#include "selfcheck.h"
#include <linux/io_uring.h>
#include <sys/mman.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    struct io_uring_params params = {0};
    int fd = (int)syscall(SYS_io_uring_setup, 4, &params);
    if (fd < 0) { /* not allowed here: say what snap would have said */
        fprintf(stderr, "no io_uring\n");
        _exit(77);
    }
    char *ring = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
    if (ring == MAP_FAILED)
        check_die("mmap");
    check_ready();
    check_wait();
    CHECK(*(volatile unsigned *)(ring + params.sq_off.ring_entries) == params.sq_entries, "the ring changed");
    return check_done();
}
