/* Rare memory: the executable and a mapped library deleted, /dev/zero, droppable and sealed memory, mlockall(MCL_FUTURE), a
 * mapping behind the end of its file, an anonymous area moved with mremap. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/stat.h>

#define PAGE 4096UL
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif

static char *map(size_t nr_pages, int prot, int flags, int fd)
{
    char *at = mmap(NULL, nr_pages * PAGE, prot, flags, fd, 0);
    if (at == MAP_FAILED)
        check_die("mmap");
    return at;
}

static void copy(const char *from, const char *to)
{
    static char buffer[1 << 16];
    int in = MUST(open(from, O_RDONLY)), out = MUST(open(to, O_WRONLY | O_CREAT | O_TRUNC, 0755));
    ssize_t part;
    while ((part = read(in, buffer, sizeof(buffer))) > 0)
        MUST(write(out, buffer, (size_t)part));
    MUST(close(in));
    MUST(close(out));
}

static int has_flag(const void *at, const char *flag)
{
    FILE *file = fopen("/proc/self/smaps", "r");
    char line[4096], want[8];
    unsigned long start = 0, end = 0, low, high;
    int found = 0;
    snprintf(want, sizeof(want), " %s", flag);
    while (file && fgets(line, sizeof(line), file))
        if (sscanf(line, "%lx-%lx ", &low, &high) == 2)
            start = low, end = high;
        else if (!strncmp(line, "VmFlags:", 8) && start <= (unsigned long)at && (unsigned long)at < end)
            found = strstr(line, want) != NULL;
    if (file)
        fclose(file);
    return found;
}

int main(int argc, char **argv)
{
    if (argc == 2) { /* again, as a copy that nobody can find any more */
        char path[4200];
        snprintf(path, sizeof(path), "%s/copy", argv[1]);
        copy("/proc/self/exe", path);
        char *again[] = {argv[0], argv[1], "deleted", NULL};
        execv(path, again);
        check_die("execv");
    }
    check_init(argc, argv);
    MUST(unlink("copy"));
    int fd = MUST(open("library", O_RDWR | O_CREAT, 0600));
    MUST(write(fd, "0123456789", 10));
    MUST(ftruncate(fd, 3 * PAGE + 100));
    MUST(pwrite(fd, "tail", 4, 3 * PAGE + 90));
    char *library = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
    char *library_shared = map(4, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    library[PAGE] = 'p';
    library_shared[2 * PAGE] = 's';
    MUST(close(fd));
    MUST(unlink("library"));
    fd = MUST(open("short", O_RDWR | O_CREAT, 0600));
    MUST(write(fd, "short", 5));
    char *beyond = map(8, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    char *beyond_private = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
    beyond_private[0] = 'S';
    MUST(close(fd));
    int zero = MUST(open("/dev/zero", O_RDWR));
    char *zeros = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero);
    char *zeros_shared = map(4, PROT_READ | PROT_WRITE, MAP_SHARED, zero);
    MUST(close(zero));
    strcpy(zeros + PAGE, "private zero");
    strcpy(zeros_shared + PAGE, "shared zero");
    char *droppable = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
    char *moved = map(64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    memset(moved, 'm', 64 * PAGE);
    char *target = map(256, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    moved = mremap(moved + 16 * PAGE, 32 * PAGE, 128 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target + 10 * PAGE);
    if (moved == MAP_FAILED)
        check_die("mremap");
    char *sealed = map(2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    strcpy(sealed, "sealed");
    int is_sealed = syscall(462, sealed, PAGE, 0) == 0;
    MUST(mlockall(MCL_FUTURE | MCL_ONFAULT));
    check_ready();
    check_wait();
    char exe[4200] = "", want[4200];
    struct stat stat_exe;
    CHECK(readlink("/proc/self/exe", exe, sizeof(exe) - 1) > 0, "exe");
    snprintf(want, sizeof(want), "%s", exe);
    CHECK(stat("/proc/self/exe", &stat_exe) == 0 && stat_exe.st_nlink == 0, "exe %s has %ld links", exe,
          (long)stat_exe.st_nlink);
    CHECK(!memcmp(library, "0123456789", 10) && library[PAGE] == 'p' && library[2 * PAGE] == 's', "library");
    CHECK(!memcmp(library + 3 * PAGE + 90, "tail", 4), "end of the library");
    CHECK(library_shared[2 * PAGE] == 's' && library_shared[PAGE] == 0, "library, shared");
    library_shared[20] = 'x';
    CHECK(library[20] == 'x', "an unchanged page is not the file's any more");
    CHECK(!memcmp(beyond, "short", 5) && !memcmp(beyond_private, "Short", 5), "short file: %.5s", beyond_private);
    CHECK(!strcmp(zeros + PAGE, "private zero") && !strcmp(zeros_shared + PAGE, "shared zero"), "/dev/zero");
    CHECK(zeros[0] == 0 && zeros_shared[0] == 0, "/dev/zero untouched");
    if (droppable != MAP_FAILED)
        CHECK(has_flag(droppable, "dp"), "droppable memory is not droppable any more");
    for (unsigned long i = 0; i < 128; i++)
        CHECK(moved[i * PAGE] == (i < 32 ? 'm' : 0), "moved page %lu: %d", i, moved[i * PAGE]);
    CHECK(!strcmp(sealed, "sealed"), "sealed memory");
    if (is_sealed)
        CHECK(munmap(sealed, PAGE) != 0 && has_flag(sealed, "sl"), "the seal is gone");
    char *fresh = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    CHECK(has_flag(fresh, "lo") && has_flag(fresh, "lf"), "mlockall(MCL_FUTURE | MCL_ONFAULT) is lost");
    MUST(munlockall());
    return check_done();
}
