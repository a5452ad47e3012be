/* A System V segment: named, refused, left alone. */
// snap-test: refused System V shared memory
#include "selfcheck.h"
#include <sys/ipc.h>
#include <sys/shm.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int id = MUST(shmget(IPC_PRIVATE, 8192, IPC_CREAT | 0600));
    char *at = shmat(id, NULL, 0);
    MUST(shmctl(id, IPC_RMID, NULL));
    if (at == (void *)-1)
        check_die("shmat");
    at[5000] = 42;
    check_ready();
    check_wait();
    CHECK(at[5000] == 42, "segment: %d", at[5000]);
    return check_done();
}
