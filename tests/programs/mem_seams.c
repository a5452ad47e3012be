/* Two anonymous mappings side by side that the kernel keeps apart, since each had its pages before the page between them was mapped;
 * the second has no pages at its beginning. A child has made its copy of the second longer. mremap, which never reaches over two
 * mappings, goes on working in both processes. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/wait.h>

#define PAGE 4096UL
#define NR_FIRST 512UL
#define NR_SECOND 1024UL
#define NR_EMPTY 100UL   /* at the beginning of the second */
#define NR_MORE 64UL

static char *map_at(char *at, size_t nr_pages)
{
    char *got = mmap(at, nr_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (got != at)
        check_die("mmap");
    MUST(madvise(got, nr_pages * PAGE, MADV_NOHUGEPAGE)); /* else restored in another way where huge pages are for all */
    return got;
}

static int begins_at(const char *at)
{
    FILE *file = fopen("/proc/self/maps", "r");
    char line[4096];
    unsigned long start;
    int found = 0;
    while (file && fgets(line, sizeof(line), file))
        found |= sscanf(line, "%lx-", &start) == 1 && start == (unsigned long)at;
    if (file)
        fclose(file);
    return found;
}

static void check_second(char *second, size_t nr_pages, const char *whose)
{
    char *moved = mremap(second, nr_pages * PAGE, (nr_pages + NR_MORE) * PAGE, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED, "the %s's second mapping cannot be made longer: %s", whose, strerror(errno));
    if (moved == MAP_FAILED)
        return;
    unsigned long wrong = 0;
    for (unsigned long i = 0; i < nr_pages + NR_MORE; i++)
        wrong += (unsigned char)moved[i * PAGE] != (i < NR_EMPTY || i >= NR_SECOND ? 0 : 1 + i % 200);
    CHECK(wrong == 0, "%lu wrong pages in the %s's second mapping", wrong, whose);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    size_t nr_all = NR_FIRST + 1 + NR_SECOND + NR_MORE;
    char *first = mmap(NULL, nr_all * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (first == MAP_FAILED)
        check_die("mmap");
    char *second = first + (NR_FIRST + 1) * PAGE;
    map_at(first, NR_FIRST);
    map_at(second, NR_SECOND);
    for (unsigned long i = 0; i < NR_FIRST; i++)
        first[i * PAGE] = (char)(1 + i % 100);
    for (unsigned long i = NR_EMPTY; i < NR_SECOND; i++)
        second[i * PAGE] = (char)(1 + i % 200);
    map_at(second - PAGE, 1);
    if (!begins_at(second) || begins_at(second - PAGE))
        check_die("there is no seam at %p", (void *)second);
    int ready[2];
    MUST(pipe(ready));
    pid_t child = MUST(fork());
    if (child == 0) {
        char *end = second + NR_SECOND * PAGE;
        MUST(munmap(end, NR_MORE * PAGE));
        if (mremap(second, NR_SECOND * PAGE, (NR_SECOND + NR_MORE) * PAGE, 0) != second)
            check_die("mremap");
        MUST(write(ready[1], "r", 1));
        check_wait();
        check_second(second, NR_SECOND + NR_MORE, "child");
        _exit(atomic_load(&check_failures) != 0);
    }
    char byte;
    if (MUST(read(ready[0], &byte, 1)) != 1)
        check_die("read");
    check_ready();
    check_wait();
    check_second(second, NR_SECOND, "parent");
    for (unsigned long i = 0; i < NR_FIRST; i++)
        CHECK(first[i * PAGE] == (char)(1 + i % 100), "page %lu of the first mapping", i);
    int status = -1;
    kill(child, SIGTERM);
    waitpid(child, &status, 0);
    CHECK(status == 0, "the child ended with status %#x", status);
    return check_done();
}
