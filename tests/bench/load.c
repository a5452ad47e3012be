/*
 * load DIRECTORY MIB CHILDREN [quiet]: a job of MIB mebibytes of memory that watches its own pauses.
 *
 * Its memory is mixed as that of an interpreter with some arrays: one page in ten zero, four of noise, three of records with
 * pointers and small numbers, two of words. zstd -1 makes it about half as large.
 *
 * Without children, and not quiet, a thread reads the clock without end; the longest gap between two readings since the last order stands in DIRECTORY/gap
 * (nanoseconds). Orders are single bytes written to the FIFO DIRECTORY/orders: 'g' forgets the longest gap, 'd' dirties every
 * hundredth page, 'r' writes DIRECTORY/gap. Each order is answered by a line in DIRECTORY/answers.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_long longest;

static long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void *watch(void *unused)
{
    (void)unused;
    for (long last = now_ns();;) {
        long now = now_ns();
        if (now - last > atomic_load(&longest))
            atomic_store(&longest, now - last);
        last = now;
    }
    return NULL;
}

static uint64_t noise(void)
{
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static void fill(uint64_t *page, size_t number)
{
    static const char *const words[] = {"snapshot ", "of a ", "running ", "process, ", "its memory ", "and its ", "files\n", "0.125 "};
    size_t kind = number % 10;

    for (size_t i = 0; i < 512 && kind > 0 && kind < 8; i++) {
        if (kind < 5)
            page[i] = noise();
        else if (i % 4 == 0)
            page[i] = 0x7f3a5c000000u + (noise() & 0xfffff0);
        else if (i % 4 == 1)
            page[i] = noise() & 0xff;
        else
            page[i] = i % 4 == 2 ? 1 : 0;
    }
    for (char *at = (char *)page; kind >= 8 && at < (char *)(page + 512) - 16;) {
        strcpy(at, words[noise() % 8]);
        at += strlen(at);
    }
}

int main(int argc, char **argv)
{
    if (argc < 4 || chdir(argv[1]) != 0)
        return 2;
    size_t size = (size_t)atol(argv[2]) << 20;
    uint64_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 3;
    for (size_t page = 0; page < size / 4096; page++)
        fill(memory + page * 512, page);
    for (int i = 0; i < atoi(argv[3]); i++)
        if (fork() == 0)
            for (;;)
                pause();
    mkfifo("orders", 0600);
    int answers = open("answers", O_WRONLY | O_CREAT | O_APPEND, 0600);
    int orders = open("orders", O_RDWR);
    pthread_t thread;
    if (atoi(argv[3]) == 0 && argc == 4)
        pthread_create(&thread, NULL, watch, NULL);
    int ready = open("ready", O_WRONLY | O_CREAT, 0600);
    close(ready);
    uint64_t round = 0;
    for (char order; read(orders, &order, 1) == 1;) {
        char text[64] = "done\n";
        if (order == 'g')
            atomic_store(&longest, 0);
        else if (order == 'd')
            for (size_t page = 0, step = ++round; page < size / 4096; page += 100)
                memory[page * 512 + step % 512] = step * 0x9e3779b97f4a7c15u;
        else if (order == 'r')
            snprintf(text, sizeof(text), "%ld\n", atomic_load(&longest));
        if (write(answers, text, strlen(text)) < 0)
            return 4;
    }
    return 0;
}
