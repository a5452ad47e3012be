/*
 * processes COUNT DIRECTORY: COUNT processes in all: a parent, and children that each have written a few pages of their own.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int up[2];
    char byte;
    if (argc < 3 || chdir(argv[2]) != 0 || pipe(up) != 0)
        return 2;
    int nr = atoi(argv[1]) - 1;
    char *memory = malloc(1 << 20);
    memset(memory, 1, 1 << 20);
    for (int i = 0; i < nr; i++)
        if (fork() == 0) {
            memset(memory + (size_t)(i % 240) * 4096, i, 16384);
            if (write(up[1], "", 1) != 1)
                return 3;
            for (;;)
                pause();
        }
    for (int i = 0; i < nr; i++)
        if (read(up[0], &byte, 1) != 1)
            return 4;
    close(open("ready", O_WRONLY | O_CREAT, 0600));
    for (;;)
        pause();
}
