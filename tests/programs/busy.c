/* Memory that changes all the time, by four tasks: every page carries a sequence number twice and a checksum, so that a torn or stale
 * page shows. What was true at the point is true after the rollback, and then it goes on. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/wait.h>

#define NR_PAGES 512
#define NR_WRITERS 4
struct page {
    uint64_t first;
    uint64_t words[510];
    uint64_t last;
};
static struct {
    atomic_int ending;
    atomic_ulong rounds[NR_WRITERS];
} *shared;

static void fill(struct page *page, uint64_t sequence)
{
    page->first = sequence;
    for (int i = 0; i < 510; i++)
        page->words[i] = sequence * 0x9e3779b97f4a7c15u + (uint64_t)i;
    page->last = sequence;
}
static int is_whole(const struct page *page)
{
    for (int i = 0; i < 510; i++)
        if (page->words[i] != page->first * 0x9e3779b97f4a7c15u + (uint64_t)i)
            return 0;
    return page->last == page->first;
}

static void writer_main(int index)
{
    struct page *pages = mmap(NULL, NR_PAGES * sizeof(struct page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t model[NR_PAGES], random = (uint64_t)index + 1;
    for (int i = 0; i < NR_PAGES; i++)
        fill(&pages[i], model[i] = (uint64_t)i);
    for (uint64_t sequence = NR_PAGES; !atomic_load(&shared->ending); sequence++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        int at = (int)(random >> 40) % NR_PAGES;
        if (pages[at].first != model[at] || !is_whole(&pages[at]))
            _exit(66);
        fill(&pages[at], model[at] = sequence);
        if (sequence % 50000 == 0) { /* the address space changes too */
            struct page *moved = mremap(pages, NR_PAGES * sizeof(struct page), NR_PAGES * sizeof(struct page),
                                        MREMAP_MAYMOVE | MREMAP_FIXED,
                                        mmap(NULL, NR_PAGES * sizeof(struct page), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (moved == MAP_FAILED)
                _exit(67);
            pages = moved;
        }
        atomic_fetch_add(&shared->rounds[index], 1);
        if (sequence % 64 == 0)
            usleep(100);
    }
    for (int i = 0; i < NR_PAGES; i++)
        if (pages[i].first != model[i] || !is_whole(&pages[i]))
            _exit(68);
    _exit(0);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pids[NR_WRITERS];
    for (int i = 0; i < NR_WRITERS; i++)
        if ((pids[i] = MUST(fork())) == 0)
            writer_main(i);
    for (int i = 0; i < NR_WRITERS; i++)
        while (atomic_load(&shared->rounds[i]) < 100)
            usleep(1000);
    check_ready();
    check_wait();
    for (int i = 0; i < NR_WRITERS; i++) {
        unsigned long before = atomic_load(&shared->rounds[i]);
        double end = check_now(CLOCK_MONOTONIC) + 10;
        while (atomic_load(&shared->rounds[i]) < before + 100 && check_now(CLOCK_MONOTONIC) < end)
            usleep(1000);
        CHECK(atomic_load(&shared->rounds[i]) >= before + 100, "writer %d does not go on", i);
    }
    atomic_store(&shared->ending, 1);
    for (int i = 0; i < NR_WRITERS; i++) {
        int status = 0;
        while (waitpid(pids[i], &status, 0) < 0 && errno == EINTR)
            ;
        CHECK(status == 0, "writer %d: status %#x", i, status);
    }
    return check_done();
}
