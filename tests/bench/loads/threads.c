/*
 * threads COUNT DIRECTORY: one process with COUNT threads that wait: some for a lock, some in a poll, some in a sleep.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_mutex_t held = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t all;

static void *idle(void *number)
{
    pthread_barrier_wait(&all);
    switch ((intptr_t)number % 3) {
    case 0:
        pthread_mutex_lock(&held);
        break;
    case 1:
        poll(NULL, 0, -1);
        break;
    default:
        for (;;)
            sleep(1000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_attr_t small;
    pthread_t thread;
    if (argc < 3 || chdir(argv[2]) != 0)
        return 2;
    int nr = atoi(argv[1]) - 1;
    pthread_mutex_lock(&held);
    pthread_barrier_init(&all, NULL, (unsigned)nr + 1);
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    for (intptr_t i = 0; i < nr; i++)
        if (pthread_create(&thread, &small, idle, (void *)i) != 0)
            return 3;
    pthread_barrier_wait(&all);
    close(open("ready", O_WRONLY | O_CREAT, 0600));
    for (;;)
        pause();
}
