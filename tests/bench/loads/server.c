/*
 * server CHILDREN DIRECTORY: the shape of an idle Apache with its event module: a parent that waits for its CHILDREN, each with 27
 * threads (25 workers at a condition, one listener in epoll_wait, one that waits for a pipe), two listening TCP sockets,
 * logs, an unlinked lock file, shared memory, a handler for each of many signals, and some 150 mappings of libraries.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORKERS = 25, LISTENER = WORKERS, READER, THREADS };

static int listening[2], mortem[2];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static const char *const libraries[] = {"libm.so.6", "libz.so.1", "libcrypto.so.3", "libssl.so.3", "libresolv.so.2", "libexpat.so.1",
                                        "libuuid.so.1", "libbz2.so.1.0", "liblzma.so.5", "libpcre2-8.so.0", "libnss_files.so.2",
                                        "libselinux.so.1", "libcrypt.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libtinfo.so.6"};

static void ignore(int signal)
{
    (void)signal;
}

static void *thread(void *given)
{
    intptr_t number = (intptr_t)given;
    struct epoll_event events[2] = {{.events = EPOLLIN, .data.fd = 0}, {.events = EPOLLIN, .data.fd = 1}};
    char byte;
    if (number == LISTENER) {
        int epoll = epoll_create1(EPOLL_CLOEXEC);
        for (int i = 0; i < 2; i++)
            epoll_ctl(epoll, EPOLL_CTL_ADD, listening[i], &events[i]);
        for (;;)
            epoll_wait(epoll, events, 2, -1);
    }
    if (number == READER)
        return read(mortem[0], &byte, 1) < 0 ? given : NULL;
    pthread_mutex_lock(&lock);
    for (;;)
        pthread_cond_wait(&work, &lock);
}

static void child(int ready)
{
    pthread_t made;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    char *pool = malloc(2 << 20);
    memset(pool, 1, 2 << 20);
    for (intptr_t i = 0; i < THREADS - 1; i++)
        pthread_create(&made, NULL, thread, (void *)i);
    if (write(ready, "", 1) != 1)
        _exit(3);
    thread((void *)(intptr_t)READER);
    _exit(0);
}

int main(int argc, char **argv)
{
    int up[2];
    char byte;
    if (argc < 3 || chdir(argv[2]) != 0 || pipe(up) != 0 || pipe(mortem) != 0)
        return 2;
    int nr = atoi(argv[1]);
    for (size_t i = 0; i < sizeof(libraries) / sizeof(*libraries); i++)
        dlopen(libraries[i], RTLD_NOW);         // whichever there are
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        listening[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (bind(listening[i], (struct sockaddr *)&address, sizeof(address)) != 0 || listen(listening[i], 100) != 0)
            return 3;
    }
    for (int i = 0; i < 4; i++)
        if (open(i % 2 ? "error.log" : "access.log", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) < 0)
            return 4;
    int gone = open("lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    unlink("lock");
    memset(mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 1, 65536);
    static const int signals[] = {SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGWINCH, SIGINT, SIGXCPU, SIGXFSZ};
    for (size_t i = 0; i < sizeof(signals) / sizeof(*signals); i++)
        signal(signals[i], ignore);
    signal(SIGTERM, SIG_DFL);
    for (int i = 0; i < nr; i++)
        if (fork() == 0)
            child(up[1]);
    for (int i = 0; i < nr; i++)
        if (read(up[0], &byte, 1) != 1)
            return 5;
    close(open("ready", O_WRONLY | O_CREAT, 0600));
    while (wait(NULL) > 0)
        ;
    return gone < 0;
}
