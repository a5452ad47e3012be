/*
 * mappings COUNT DIRECTORY: one process with COUNT mappings that cannot merge: neighbours have different protections; one in four
 * maps a page of a file (64 files), the others are anonymous; every other page was written.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, FILES = 64 };

int main(int argc, char **argv)
{
    if (argc < 3 || chdir(argv[2]) != 0)
        return 2;
    long nr = atol(argv[1]);
    int files[FILES];
    for (int i = 0; i < FILES; i++) {
        char name[32];
        snprintf(name, sizeof(name), "file%d", i);
        files[i] = open(name, O_RDWR | O_CREAT, 0600);
        if (files[i] < 0 || ftruncate(files[i], 4 * PAGE) != 0)
            return 3;
    }
    char *start = mmap(NULL, (size_t)nr * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return 4;
    for (long i = 0; i < nr; i++) {
        char *at = start + i * PAGE;
        int prot = i % 2 ? PROT_READ : PROT_READ | PROT_WRITE;
        int flags = MAP_PRIVATE | MAP_FIXED | (i % 4 == 1 ? 0 : MAP_ANONYMOUS);
        if (mmap(at, PAGE, prot, flags, i % 4 == 1 ? files[i / 4 % FILES] : -1, i % 4 == 1 ? i % 3 * PAGE : 0) != at)
            return 5;
        if (prot & PROT_WRITE)
            *(long *)at = i;
    }
    close(open("ready", O_WRONLY | O_CREAT, 0600));
    for (;;)
        pause();
}
