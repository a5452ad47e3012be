/* Stopped children: by each stop signal, with one thread and with several, seen by the parent or not yet, stopped twice. After whatever
 * happens, the parent is told of each stop that it had not seen, once and with its signal, of no other, and SIGCONT lets all go on. */
#include "selfcheck.h"
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { SEEN = 1, THREADS = 2, AGAIN = 4, AGAIN_THREAD = 8 };
static const struct {
    int sig, how;
} kinds[] = {
    {SIGSTOP, 0},       {SIGTSTP, 0},        {SIGTTIN, 0},
    {SIGSTOP, SEEN},    {SIGTSTP, SEEN},     {SIGTTOU, SEEN},
    {SIGSTOP, THREADS}, {SIGTSTP, THREADS},  {SIGSTOP, THREADS | SEEN},
    {SIGTSTP, THREADS | SEEN}, {SIGSTOP, AGAIN}, {SIGSTOP, AGAIN_THREAD},
    {SIGSTOP, AGAIN | SEEN},
};
#define NR ((int)(sizeof(kinds) / sizeof(kinds[0])))

static struct {
    atomic_ulong counter[NR];
    atomic_int threads[NR], ending;
} *shared;
static atomic_int told;

static void on_child(int sig)
{
    (void)sig;
    atomic_fetch_add(&told, 1);
}

static void *idle(void *counter)
{
    atomic_fetch_add((atomic_int *)counter, 1);
    for (;;)
        pause();
    return NULL;
}

static void child_main(int index)
{
    setpgid(0, 0); /* SIGTSTP stops nobody in an orphaned group */
    signal(SIGCHLD, SIG_DFL);
    for (int i = 0; kinds[index].how & THREADS && i < 3; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, idle, &shared->threads[index]);
    }
    while (!atomic_load(&shared->ending)) {
        atomic_fetch_add(&shared->counter[index], 1);
        usleep(500);
    }
    _exit(20 + index);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    MUST(sigaction(SIGCHLD, &action, NULL));
    pid_t pids[NR];
    int status;
    siginfo_t info;
    for (int i = 0; i < NR; i++)
        if ((pids[i] = MUST(fork())) == 0)
            child_main(i);
    for (int i = 0; i < NR; i++)
        while (!atomic_load(&shared->counter[i]) || (kinds[i].how & THREADS && atomic_load(&shared->threads[i]) < 3))
            usleep(500);
    for (int i = 0; i < NR; i++) {
        MUST(kill(pids[i], kinds[i].sig));
        MUST(waitid(P_PID, (id_t)pids[i], &info, WSTOPPED | WNOWAIT));
        if (kinds[i].how & SEEN)
            MUST(waitpid(pids[i], &status, WUNTRACED));
        if (kinds[i].how & AGAIN)
            MUST(kill(pids[i], SIGSTOP));
        if (kinds[i].how & AGAIN_THREAD)
            MUST(syscall(SYS_tkill, pids[i], SIGSTOP));
    }
    int told_before = atomic_load(&told);
    unsigned long stopped_at[NR];
    for (int i = 0; i < NR; i++)
        stopped_at[i] = atomic_load(&shared->counter[i]);
    check_ready();
    check_wait();
    CHECK(atomic_load(&told) == told_before, "SIGCHLD came %d times", atomic_load(&told) - told_before);
    for (int i = 0; i < NR; i++) {
        CHECK(atomic_load(&shared->counter[i]) == stopped_at[i], "child %d ran while it was stopped", i);
        pid_t got = waitpid(pids[i], &status, WUNTRACED | WNOHANG);
        if (kinds[i].how & SEEN)
            CHECK(got == 0, "child %d: its stop is told twice (%#x)", i, status);
        else
            CHECK(got == pids[i] && WIFSTOPPED(status) && WSTOPSIG(status) == kinds[i].sig,
                  "child %d: told %d, status %#x, stopped by %d", i, (int)got, got > 0 ? status : 0, kinds[i].sig);
        got = waitpid(pids[i], &status, WUNTRACED | WNOHANG);
        CHECK(got == 0, "child %d: its stop is told once more", i);
        kill(pids[i], SIGCONT);
        got = waitpid(pids[i], &status, WCONTINUED);
        CHECK(got == pids[i] && WIFCONTINUED(status), "child %d: not continued, status %#x", i, status);
        double end = check_now(CLOCK_MONOTONIC) + 5;
        while (atomic_load(&shared->counter[i]) == stopped_at[i] && check_now(CLOCK_MONOTONIC) < end)
            usleep(1000);
        CHECK(atomic_load(&shared->counter[i]) > stopped_at[i], "child %d does not go on", i);
    }
    atomic_store(&shared->ending, 1);
    for (int i = 0; i < NR; i++) {
        CHECK(waitpid(pids[i], &status, 0) == pids[i], "child %d is no child", i);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 20 + i, "child %d: status %#x", i, status);
    }
    return check_done();
}
