/* The smallest job: one task that waits. */
#include "selfcheck.h"

int main(int argc, char **argv)
{
    check_init(argc, argv);
    pid_t pid = getpid(), parent_session = getsid(0);
    check_ready();
    check_wait();
    CHECK(getpid() == pid, "pid is %d, was %d", getpid(), pid);
    CHECK(getsid(0) == parent_session, "session is %d, was %d", getsid(0), parent_session);
    return check_done();
}
