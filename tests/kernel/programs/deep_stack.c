// A main thread with a large array of zeros on its stack, and a second thread: both count in a shared file as long as
// every byte of it is zero. deep_stack COUNTERS ARRAY_KIB THREAD_STACK_KIB (0: the default)
#define _GNU_SOURCE
#include "progress.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static const struct timespec nap = {0, 1000000};

static void *second(void *arg)
{
    (void)arg;
    for (;;) {
        progress[1]++;
        nanosleep(&nap, NULL);
    }
    return NULL;
}

static __attribute__((noinline)) void check(size_t size)
{
    unsigned char zeros[size];
    memset(zeros, 0, size);
    __asm__ volatile("" : : "r"(zeros) : "memory");
    for (;;) {
        for (size_t i = 0; i < size; i++)
            if (((volatile unsigned char *)zeros)[i]) {
                fprintf(stderr, "deep_stack: byte %zu of %zu is %#x\n", i, size, zeros[i]);
                _exit(1);
            }
        progress[0]++;
        nanosleep(&nap, NULL);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    open_progress(argv[1]);
    pthread_t thread;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    size_t stack = (size_t)atoi(argv[3]) * 1024;
    if (stack && pthread_attr_setstacksize(&attr, stack))
        return 2;
    if (pthread_create(&thread, &attr, second, NULL))
        return 2;
    check((size_t)atoi(argv[2]) * 1024);
}
