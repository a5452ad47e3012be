/* State of a process that is easily forgotten: membarrier registrations, memory merging, io flusher; and a thread that is
 * registered as well. membarrier(2) says EPERM when the registration is gone. */
#include "selfcheck.h"
#include <linux/membarrier.h>
#include <sys/prctl.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#define PR_GET_IO_FLUSHER 58
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif

static long barrier(int command) { return syscall(SYS_membarrier, command, 0, 0); }

int main(int argc, char **argv)
{
    check_init(argc, argv);
    long known = barrier(MEMBARRIER_CMD_QUERY);
    int registered = known > 0 && barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) == 0;
    int flusher = prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0;
    int merging = prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) == 0;
    check_ready();
    check_wait();
    if (registered)
        CHECK(barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0, "membarrier: %s", strerror(errno));
    if (flusher)
        CHECK(prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1, "it is no io flusher any more");
    if (merging)
        CHECK(prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1, "its memory is not merged any more");
    return check_done();
}
