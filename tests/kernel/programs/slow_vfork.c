// A vfork whose child takes its time before its execve. slow_vfork MILLISECONDS (0: it never comes)
#define _GNU_SOURCE
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long wait = argc > 1 ? atol(argv[1]) : 0;
    const struct timespec time = {wait / 1000, wait % 1000 * 1000000};
    if (vfork() == 0) {
        while (wait == 0)
            pause();
        nanosleep(&time, NULL);
        execlp("sleep", "sleep", "1000", (char *)NULL);
        _exit(1);
    }
    for (;;)
        pause();
}
