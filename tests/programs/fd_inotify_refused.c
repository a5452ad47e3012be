/* What is not supported is refused by name before the job is touched. */
// snap-test: refused inotify
#include "selfcheck.h"
#include <sys/inotify.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int fd = MUST(inotify_init());
    MUST(inotify_add_watch(fd, ".", IN_CREATE));
    check_ready();
    check_wait();
    char text[512];
    CHECK(fcntl(fd, F_GETFD) == 0, "inotify descriptor %.0s", text);
    return check_done();
}
