/* A tree: children in sessions and groups of their own, a zombie, an orphan's place, a child that leads a group that a sibling
 * joined, a grandchild. Each child checks itself and reports by its exit status. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/wait.h>

struct seen {
    pid_t pid, ppid, pgid, sid;
};
static struct {
    struct seen child[6];
    atomic_int ready, ending;
} *shared;

static struct seen look(void) { return (struct seen){getpid(), getppid(), getpgid(0), getsid(0)}; }

static void child_main(int index)
{
    shared->child[index] = look();
    atomic_fetch_add(&shared->ready, 1);
    while (!atomic_load(&shared->ending))
        usleep(2000);
    struct seen now = look();
    _exit(memcmp(&now, &shared->child[index], sizeof(now)) == 0 ? 10 + index : 90);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pids[6];
    if ((pids[0] = MUST(fork())) == 0) { /* own session, with a grandchild in it */
        setsid();
        pid_t grandchild = MUST(fork());
        if (grandchild == 0)
            child_main(3);
        shared->child[0] = look();
        atomic_fetch_add(&shared->ready, 1);
        int status;
        while (waitpid(grandchild, &status, 0) < 0 && errno == EINTR)
            ;
        struct seen now = look();
        int same = memcmp(&now, &shared->child[0], sizeof(now)) == 0;
        _exit(same && WIFEXITED(status) && WEXITSTATUS(status) == 13 ? 10 : 91);
    }
    if ((pids[1] = MUST(fork())) == 0) { /* leads a group */
        setpgid(0, 0);
        child_main(1);
    }
    setpgid(pids[1], pids[1]);
    if ((pids[2] = MUST(fork())) == 0) { /* joins it */
        setpgid(0, pids[1]);
        child_main(2);
    }
    if ((pids[4] = MUST(fork())) == 0) /* a zombie with a status */
        _exit(44);
    if ((pids[5] = MUST(fork())) == 0) { /* a zombie of a signal */
        raise(SIGKILL);
        _exit(0);
    }
    siginfo_t info;
    MUST(waitid(P_PID, (id_t)pids[4], &info, WEXITED | WNOWAIT));
    MUST(waitid(P_PID, (id_t)pids[5], &info, WEXITED | WNOWAIT));
    while (atomic_load(&shared->ready) != 4)
        usleep(1000);
    struct seen me = look();
    check_ready();
    check_wait();

    struct seen now = look();
    CHECK(now.pid == me.pid && now.pgid == me.pgid && now.sid == me.sid, "root: pid %d, group %d, session %d", now.pid, now.pgid,
          now.sid);
    int status;
    pid_t got = waitpid(pids[4], &status, WNOHANG);
    CHECK(got == pids[4] && WIFEXITED(status) && WEXITSTATUS(status) == 44, "zombie: %d, status %#x", got, status);
    got = waitpid(pids[5], &status, WNOHANG);
    CHECK(got == pids[5] && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "killed zombie: %d, status %#x", got, status);
    atomic_store(&shared->ending, 1);
    for (int i = 0; i < 3; i++) {
        do
            got = waitpid(pids[i], &status, 0);
        while (got < 0 && errno == EINTR);
        CHECK(got == pids[i] && WIFEXITED(status) && WEXITSTATUS(status) == 10 + i, "child %d: %d, status %#x", i, got, status);
    }
    CHECK(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD, "there are children that never were");
    return check_done();
}
