/* Memory shared between a parent and its child: anonymous, memfd mapped shared and private, sealed memfd, a deleted file,
 * a file. What one writes after the rollback the other must see. */
// snap-test: children
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define PAGE 4096UL
enum { ANON, MEMFD, DELETED, NAMED, NR };

static char *map(size_t nr_pages, int prot, int flags, int fd)
{
    char *at = mmap(NULL, nr_pages * PAGE, prot, flags, fd, 0);
    if (at == MAP_FAILED)
        check_die("mmap");
    return at;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    char *shared[NR];
    shared[ANON] = map(300, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    int memfd = MUST(memfd_create("check", MFD_ALLOW_SEALING));
    MUST(ftruncate(memfd, 100 * PAGE));
    shared[MEMFD] = map(100, PROT_READ | PROT_WRITE, MAP_SHARED, memfd);
    int fd = MUST(open("deleted", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(fd, 50 * PAGE));
    shared[DELETED] = map(50, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    MUST(close(fd));
    MUST(unlink("deleted"));
    fd = MUST(open("named", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(fd, 50 * PAGE));
    shared[NAMED] = map(50, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    MUST(close(fd));
    for (int i = 0; i < NR; i++) {
        memset(shared[i] + 3 * PAGE, 'A' + i, 2 * PAGE);
        memset(shared[i] + 40 * PAGE, 'a' + i, PAGE);
    }
    char *private = map(100, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd);
    memset(private + 3 * PAGE, 'P', PAGE);
    memset(private + 4 * PAGE, 0, PAGE);
    int sealed = MUST(memfd_create("sealed", MFD_ALLOW_SEALING));
    MUST(write(sealed, "sealed content", 14));
    MUST(fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
    char *constant = map(1, PROT_READ, MAP_SHARED, sealed);
    char *window = mmap(NULL, 10 * PAGE, PROT_READ, MAP_SHARED, memfd, 38 * (long)PAGE);
    if (window == MAP_FAILED)
        check_die("mmap");
    MUST(munmap(shared[ANON], 2 * PAGE)); /* what is left begins at an offset */

    pid_t child = MUST(fork());
    if (child == 0) {
        while (shared[ANON][3 * PAGE] != 'Z')
            usleep(1000);
        for (int i = 0; i < NR; i++)
            shared[i][41 * PAGE] = (char)('0' + i);
        _exit(private[3 * PAGE] == 'P' && private[4 * PAGE] == 0 ? 7 : 8);
    }
    check_ready();
    check_wait();
    for (int i = 0; i < NR; i++) {
        CHECK(shared[i][3 * PAGE] == 'A' + i && shared[i][5 * PAGE - 1] == 'A' + i, "object %d: %d", i, shared[i][3 * PAGE]);
        CHECK(shared[i][40 * PAGE] == 'a' + i, "object %d, page 40: %d", i, shared[i][40 * PAGE]);
        CHECK(shared[i][20 * PAGE] == 0, "object %d, a hole: %d", i, shared[i][20 * PAGE]);
    }
    CHECK(private[3 * PAGE] == 'P', "private page over a memfd: %d", private[3 * PAGE]);
    CHECK(private[4 * PAGE] == 0, "zeroed private page over a memfd: %d", private[4 * PAGE]);
    CHECK(private[40 * PAGE] == 'a' + MEMFD, "untouched private page over a memfd: %d", private[40 * PAGE]);
    CHECK(window[2 * PAGE] == 'a' + MEMFD, "second mapping of a memfd: %d", window[2 * PAGE]);
    CHECK(memcmp(constant, "sealed content", 14) == 0, "sealed memfd");
    CHECK(fcntl(sealed, F_GET_SEALS) == (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), "seals %#x",
          fcntl(sealed, F_GET_SEALS));
    char text[15] = "";
    CHECK(pread(sealed, text, 14, 0) == 14 && !strcmp(text, "sealed content"), "sealed memfd by descriptor");
    char byte = 0;
    CHECK(pread(memfd, &byte, 1, 40 * (long)PAGE) == 1 && byte == 'a' + MEMFD, "memfd by descriptor: %d", byte);
    CHECK(pwrite(memfd, "w", 1, 45 * (long)PAGE) == 1 && shared[MEMFD][45 * PAGE] == 'w', "descriptor and mapping differ");
    struct stat stat;
    CHECK(fstat(memfd, &stat) == 0 && stat.st_size == (long)(100 * PAGE), "memfd has %ld bytes", (long)stat.st_size);
    shared[ANON][3 * PAGE] = 'Z';
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7, "child: %#x", status);
    for (int i = 0; i < NR; i++)
        CHECK(shared[i][41 * PAGE] == '0' + i, "object %d is not shared any more: %d", i, shared[i][41 * PAGE]);
    return check_done();
}
