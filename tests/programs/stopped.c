/* A child stopped by SIGSTOP, one by SIGTSTP with a signal that waits for it to go on, one that was stopped and continued. The
 * parent sees them stopped, continues them, and they check that nothing ran in between. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/wait.h>

static struct {
    atomic_ulong counter[3];
    atomic_int got_usr1, ending;
} *shared;

static void on_usr1(int sig)
{
    (void)sig;
    atomic_fetch_add(&shared->got_usr1, 1);
}

static void child_main(int index)
{
    while (!atomic_load(&shared->ending)) {
        atomic_fetch_add(&shared->counter[index], 1);
        usleep(500);
    }
    _exit(20 + index);
}

static char state_of(pid_t pid)
{
    char path[64], text[512];
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
    text[got > 0 ? got : 0] = 0;
    close(fd);
    char *end = strrchr(text, ')');
    return end ? end[2] : '?';
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct sigaction action = {.sa_handler = on_usr1, .sa_flags = SA_RESTART};
    MUST(sigaction(SIGUSR1, &action, NULL));
    pid_t pids[3];
    int status;
    for (int i = 0; i < 3; i++)
        if ((pids[i] = MUST(fork())) == 0) {
            setpgid(0, 0); /* SIGTSTP stops nobody in an orphaned group */
            child_main(i);
        }
    for (int i = 0; i < 3; i++)
        while (atomic_load(&shared->counter[i]) == 0)
            usleep(500);
    kill(pids[0], SIGSTOP);
    kill(pids[1], SIGTSTP);
    kill(pids[2], SIGSTOP);
    for (int i = 0; i < 3; i++)
        MUST(waitpid(pids[i], &status, WUNTRACED));
    kill(pids[1], SIGUSR1); /* pending while it is stopped */
    kill(pids[2], SIGCONT);
    MUST(waitpid(pids[2], &status, WCONTINUED));
    unsigned long stopped_at[2] = {atomic_load(&shared->counter[0]), atomic_load(&shared->counter[1])};
    unsigned long moving = atomic_load(&shared->counter[2]);
    check_ready();
    check_wait();
    for (int i = 0; i < 2; i++) {
        CHECK(state_of(pids[i]) == 'T', "child %d is in state %c", i, state_of(pids[i]));
        CHECK(atomic_load(&shared->counter[i]) == stopped_at[i], "child %d ran while it was stopped", i);
    }
    CHECK(atomic_load(&shared->got_usr1) == 0, "the stopped child handled a signal");
    double end = check_now(CLOCK_MONOTONIC) + 5;
    while (atomic_load(&shared->counter[2]) <= moving && check_now(CLOCK_MONOTONIC) < end)
        usleep(1000);
    CHECK(atomic_load(&shared->counter[2]) > moving, "the continued child stands still");
    kill(pids[0], SIGCONT);
    kill(pids[1], SIGCONT);
    end = check_now(CLOCK_MONOTONIC) + 5;
    while (check_now(CLOCK_MONOTONIC) < end &&
           (atomic_load(&shared->counter[0]) == stopped_at[0] || atomic_load(&shared->counter[1]) == stopped_at[1] ||
            !atomic_load(&shared->got_usr1)))
        usleep(1000);
    for (int i = 0; i < 2; i++)
        CHECK(atomic_load(&shared->counter[i]) > stopped_at[i], "child %d does not go on", i);
    CHECK(atomic_load(&shared->got_usr1) == 1, "the pending signal came %d times", atomic_load(&shared->got_usr1));
    atomic_store(&shared->ending, 1);
    for (int i = 0; i < 3; i++) {
        pid_t got;
        do
            got = waitpid(pids[i], &status, 0);
        while (got < 0 && errno == EINTR);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 20 + i, "child %d: status %#x", i, status);
    }
    return check_done();
}
