/* Direct reads all the time, by several threads, into the pages of one arena: the device writes into them behind the page tables.
 *
 *     direct_reads FILE reopen|own-table|held ARENA_MIB THREADS DIRECTORY
 *
 * reopen: each read opens FILE, reads and closes it again. own-table: each thread has a descriptor table of its own, in which alone FILE is
 * open. held: FILE stays open. Each page that arrives has one of many contents, so that a read changes what was there. */
#include "selfcheck.h"
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

enum { CHUNK = 256 << 10 };
static unsigned char *arena;
static size_t arena_size;
static const char *path, *mode;
static off_t file_size;

static int open_it(void)
{
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        check_die("open O_DIRECT");
    return fd;
}

static void *reader(void *number)
{
    unsigned seed = 77 + (unsigned)(uintptr_t)number;
    int fd = -1;
    if (strcmp(mode, "own-table") == 0 && unshare(CLONE_FILES) != 0)
        check_die("unshare");
    if (strcmp(mode, "reopen") != 0)
        fd = open_it();
    while (!check_term) {
        if (strcmp(mode, "reopen") == 0)
            fd = open_it();
        size_t at = (size_t)rand_r(&seed) % (arena_size / CHUNK) * CHUNK;
        off_t from = (off_t)((size_t)rand_r(&seed) % ((size_t)file_size / CHUNK) * CHUNK);
        if (pread(fd, arena + at, CHUNK, from) != CHUNK)
            check_die("pread");
        if (strcmp(mode, "reopen") == 0)
            close(fd);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        check_die("usage: direct_reads FILE MODE ARENA_MIB THREADS DIRECTORY");
    check_init(2, (char *[]){argv[0], argv[5], NULL});
    path = argv[1];
    mode = argv[2];
    arena_size = (size_t)atoi(argv[3]) << 20;
    int nr_threads = atoi(argv[4]);
    int fd = open_it();
    file_size = lseek(fd, 0, SEEK_END);
    close(fd);
    arena = mmap(NULL, arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        check_die("mmap");
    memset(arena, 1, arena_size);
    pthread_t threads[64];
    for (int i = 0; i < nr_threads; i++)
        if (pthread_create(&threads[i], NULL, reader, (void *)(uintptr_t)i) != 0)
            check_die("pthread_create");
    check_ready();
    check_wait();
    for (int i = 0; i < nr_threads; i++)
        pthread_join(threads[i], NULL);
    return check_done();
}
