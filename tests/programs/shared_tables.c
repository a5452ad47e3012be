/* Descriptor tables and directories that processes share: with the parent, with a grandparent past a parent that has left, with a
 * sibling whose maker has ended; by descriptors only, by directories only. Compared with kcmp, and tried. */
#include "selfcheck.h"
#include <linux/kcmp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define NR 12
#define NEW_FD 200
enum { ROOT, FILES, FILES_BELOW, OWN, OWN_BELOW, TWIN, OTHER_TWIN, FS, PAST, PAST_BELOW, ALONE_FS, MAKER };

static struct {
    atomic_int ready, go, done;
    pid_t pids[NR];
    int fd_there[NR], umask_is[NR], below_root[NR];
} *shared;

static void serve(int index)
{
    shared->pids[index] = getpid();
    atomic_fetch_add(&shared->ready, 1);
    while (!atomic_load(&shared->go))
        usleep(1000);
    char cwd[4096];
    shared->fd_there[index] = fcntl(NEW_FD, F_GETFD) >= 0;
    shared->umask_is[index] = (int)check_umask();
    shared->below_root[index] = getcwd(cwd, sizeof(cwd)) && strcmp(cwd, "/") == 0;
    atomic_fetch_add(&shared->done, 1);
    for (;;)
        pause();
}

/* Like fork: the stack is a copy. */
static pid_t clone_with(unsigned long flags)
{
    return (pid_t)MUST(syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0));
}

static void wait_for(int nr)
{
    while (atomic_load(&shared->ready) < nr)
        usleep(1000);
}

static void compare(char *same)
{
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < MAKER; i++)
            for (int j = 0; j < MAKER; j++)
                *same++ = (char)(MUST(syscall(SYS_kcmp, shared->pids[i], shared->pids[j], kind ? KCMP_FS : KCMP_FILES, 0, 0)) == 0);
}

int main(int argc, char **argv)
{
    static char before[2 * NR * NR], after[2 * NR * NR];
    check_init(argc, argv);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->pids[ROOT] = getpid();
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
    int pipe_fds[2];
    MUST(pipe(pipe_fds));
    if (clone_with(CLONE_FILES) == 0) {
        setsid();
        if (clone_with(CLONE_FILES) == 0)
            serve(FILES_BELOW);
        serve(FILES);
    }
    wait_for(2);
    if (clone_with(0) == 0) {
        MUST(chdir("/tmp"));
        MUST(open("/dev/null", O_RDONLY));
        if (clone_with(CLONE_FILES | CLONE_FS) == 0)
            serve(OWN_BELOW);
        serve(OWN);
    }
    wait_for(4);
    pid_t maker = clone_with(0);
    if (maker == 0) {
        MUST(close(pipe_fds[0]));
        if (clone_with(CLONE_FILES) == 0)
            serve(TWIN);
        if (clone_with(CLONE_FILES | CLONE_FS) == 0)
            serve(OTHER_TWIN);
        _exit(0);
    }
    MUST(waitpid(maker, NULL, 0));
    wait_for(6);
    if (clone_with(CLONE_FS) == 0)
        serve(FS);
    wait_for(7);
    if (clone_with(CLONE_FILES | CLONE_FS) == 0) {
        if (clone_with(CLONE_FILES | CLONE_FS) == 0)
            serve(PAST_BELOW);
        wait_for(8);
        MUST(unshare(CLONE_FILES | CLONE_FS));
        MUST(close(pipe_fds[1]));
        serve(PAST);
    }
    wait_for(9);
    if (clone_with(CLONE_FILES | CLONE_FS) == 0) {
        MUST(unshare(CLONE_FS));
        serve(ALONE_FS);
    }
    wait_for(10);
    compare(before);
    check_ready();
    check_wait();

    compare(after);
    for (int i = 0; i < 2 * MAKER * MAKER; i++)
        CHECK(before[i] == after[i], "%s of %d and %d: shared %d, now %d", i < MAKER * MAKER ? "descriptors" : "directories",
              i / MAKER % MAKER, i % MAKER, before[i], after[i]);
    int fd = open("/dev/zero", O_RDONLY);
    dup2(fd, NEW_FD);
    close(fd);
    CHECK(chdir("/") == 0, "chdir");
    umask(0123);
    atomic_store(&shared->go, 1);
    for (int tries = 0; tries < 5000 && atomic_load(&shared->done) < 10; tries++)
        usleep(1000);
    CHECK(atomic_load(&shared->done) == 10, "%d have answered", atomic_load(&shared->done));
    for (int i = 1; i < MAKER; i++) {
        CHECK(shared->fd_there[i] == before[i], "process %d sees the new descriptor: %d", i, shared->fd_there[i]);
        CHECK((shared->umask_is[i] == 0123) == before[MAKER * MAKER + i], "process %d has umask %o", i, shared->umask_is[i]);
        CHECK(shared->below_root[i] == before[MAKER * MAKER + i], "process %d is in /: %d", i, shared->below_root[i]);
        kill(shared->pids[i], SIGKILL);
    }
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    return check_done();
}
