// At SIGUSR1 it makes a child in its own memory, without waiting for it as vfork(2) does; MILLISECONDS later that becomes another
// program. shares_memory MILLISECONDS (0: never)
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static long wait_ms;
static char stack[65536];

static int child(void *unused)
{
    const struct timespec time = {wait_ms / 1000, wait_ms % 1000 * 1000000};

    (void)unused;
    while (wait_ms == 0)
        pause();
    nanosleep(&time, NULL);
    execlp("sleep", "sleep", "1000", (char *)NULL);
    _exit(1);
}

static void make(int sig)
{
    (void)sig;
    clone(child, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL);
}

int main(int argc, char **argv)
{
    wait_ms = argc > 1 ? atol(argv[1]) : 0;
    signal(SIGUSR1, make);
    for (;;)
        pause();
}
