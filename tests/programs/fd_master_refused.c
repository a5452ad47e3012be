/* What is not supported is refused by name before the job is touched. */
// snap-test: refused master side of a pseudo terminal
#include "selfcheck.h"

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int fd = MUST(posix_openpt(O_RDWR | O_NOCTTY));
    check_ready();
    check_wait();
    CHECK(fcntl(fd, F_GETFD) == 0, "the master side is gone");
    return check_done();
}
