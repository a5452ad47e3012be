/* Memory that a tree shares copy-on-write: a child that changed, dropped, unmapped, protected and added pages, its own child, one whose
 * maker has ended, a session of two, one that has nothing in common any more. What was one page of several processes is one
 * page afterwards, and each sees its own content, also when all write. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define NR_PAGES 512
#define PAGE 4096
enum { ROOT, CHILD, GRANDCHILD, ORPHAN, LEADER, MEMBER, STRANGER, NR };

static struct {
    atomic_int ready, round, done[NR];
    pid_t pids[NR];
    int wrong[NR], wrong_more[NR], wrong_heap[NR];
    uint64_t frames[NR][NR_PAGES];
} *shared;
static char *area, *only_mine, *wiped;
static uint8_t expected[NR_PAGES];   /* 0: unmapped, 1: zero, else the byte that all of the page has */
static char *heap_end;
static size_t more_pages;
static char *more;

static uint8_t first_content(int page)
{
    return (uint8_t)(2 + page % 250);
}

static void put(int page, uint8_t value)
{
    memset(area + (size_t)page * PAGE, value, PAGE);
    expected[page] = value;
}

static void note_frames(uint64_t *frames)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    memset(frames, 0, NR_PAGES * sizeof(*frames));
    for (int page = 0; page < NR_PAGES; page++) {
        uint64_t entry = 0;
        if (pread(fd, &entry, 8, (off_t)((uintptr_t)area / PAGE + (size_t)page) * 8) == 8 && entry >> 63)
            frames[page] = entry & ((1ull << 55) - 1);
    }
    close(fd);
}

static int count_wrong(void)
{
    int wrong = 0;
    for (int page = 0; page < NR_PAGES; page++) {
        const char *at = area + (size_t)page * PAGE;
        uint8_t value = expected[page] > 1 ? expected[page] : 0;
        if (expected[page] && !((uint8_t)at[0] == value && memcmp(at, at + 1, PAGE - 1) == 0))
            wrong++;
    }
    return wrong;
}

/* Round 1: look. Round 2: write everywhere. Round 3: look again. */
static void answer(int index, int round)
{
    if (round == 1) {
        note_frames(shared->frames[index]);
        shared->wrong[index] = count_wrong();
        for (size_t i = 0; i < more_pages * PAGE; i++)
            shared->wrong_more[index] += (uint8_t)more[i] != 77;
        if (heap_end) {
            shared->wrong_heap[index] = sbrk(0) != heap_end;
            for (char *at = heap_end - 64 * PAGE; at < heap_end; at++)
                shared->wrong_heap[index] += *at != 33;
        }
        if (index != ROOT)
            for (int i = 0; i < 8 * PAGE; i++)
                shared->wrong[index] += wiped[i] != 0;
    } else if (round == 2) {
        for (int page = 0; page < NR_PAGES; page++)
            if (expected[page] && !((index == CHILD || index == GRANDCHILD) && page >= 200 && page < 210))
                put(page, (uint8_t)(2 + (page + 31 * (index + 1)) % 250));
    } else {
        shared->wrong[index] += count_wrong();
    }
    atomic_store(&shared->done[index], round);
}

static void serve(int index)
{
    shared->pids[index] = getpid();
    note_frames(shared->frames[index]);
    atomic_fetch_add(&shared->ready, 1);
    for (int round = 1; round <= 3; round++) {
        while (atomic_load(&shared->round) < round)
            usleep(1000);
        answer(index, round);
    }
    for (;;)
        pause();
}

static void wait_for(int nr)
{
    while (atomic_load(&shared->ready) < nr)
        usleep(1000);
}

static void ask(int round)
{
    atomic_store(&shared->round, round);
    answer(ROOT, round);
    for (int i = 1; i < NR; i++) {
        for (int tries = 0; tries < 10000 && atomic_load(&shared->done[i]) < round; tries++)
            usleep(1000);
        CHECK(atomic_load(&shared->done[i]) == round, "process %d does not answer", i);
    }
}

static void child(void)
{
    for (int page = 10; page < 20; page++)
        put(page, 3);
    MUST(madvise(area + 30 * PAGE, 10 * PAGE, MADV_DONTNEED));
    memset(expected + 30, 1, 10);
    memset(area + 45 * PAGE, 0, PAGE);
    expected[45] = 1;
    MUST(munmap(area + 100 * PAGE, 10 * PAGE));
    memset(expected + 100, 0, 10);
    MUST(mprotect(area + 200 * PAGE, 10 * PAGE, PROT_READ));
    more_pages = 50;
    more = mmap(NULL, more_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(more, 77, more_pages * PAGE);
    /* The heap of this one, and of its child, is longer than its parent's. */
    MUST((intptr_t)sbrk(64 * PAGE));
    heap_end = sbrk(0);
    memset(heap_end - 64 * PAGE, 33, 64 * PAGE);
    if (fork() == 0) {
        put(15, 4);
        put(10, first_content(10));
        put(35, 5);
        serve(GRANDCHILD);
    }
    wait_for(1);
    serve(CHILD);
}

int main(int argc, char **argv)
{
    static uint64_t before[NR][NR_PAGES];
    check_init(argc, argv);
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    area = mmap(NULL, NR_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(area, NR_PAGES * PAGE, MADV_NOHUGEPAGE);
    only_mine = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(madvise(only_mine, 8 * PAGE, MADV_DONTFORK));
    wiped = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(madvise(wiped, 8 * PAGE, MADV_WIPEONFORK));
    memset(only_mine, 9, 8 * PAGE);
    memset(wiped, 9, 8 * PAGE);
    MUST((intptr_t)sbrk(16 * PAGE));
    for (int page = 0; page < NR_PAGES; page++)
        put(page, first_content(page));

    if (fork() == 0)
        child();
    wait_for(2);
    pid_t maker = fork();
    if (maker == 0) {
        put(300, 6);
        if (fork() == 0) {
            put(301, 7);
            serve(ORPHAN);
        }
        _exit(0);
    }
    MUST(waitpid(maker, NULL, 0));
    wait_for(3);
    if (fork() == 0) {
        MUST(setsid());
        put(400, 8);
        if (fork() == 0)
            serve(MEMBER);
        serve(LEADER);
    }
    wait_for(5);
    if (fork() == 0) {
        for (int page = 0; page < NR_PAGES; page++)
            put(page, (uint8_t)(2 + page % 7));
        serve(STRANGER);
    }
    wait_for(6);
    put(500, 11);
    note_frames(shared->frames[ROOT]);
    memcpy(before, shared->frames, sizeof(before));
    /* Those who came first have shared less since. */
    check_ready();
    check_wait();

    ask(1);
    int were = 0;
    for (int i = 0; i < NR; i++)
        for (int j = i + 1; j < NR; j++) {
            int lost = 0;
            for (int page = 0; page < NR_PAGES; page++) {
                int was = before[i][page] && before[i][page] == before[j][page];
                were += was;
                /* Not what one of them has protected, nor what children have in common that their parent has changed. */
                int counts = page != 500 && !(page >= 200 && page < 210);
                if (was && counts && shared->frames[i][page] != shared->frames[j][page])
                    lost++;
            }
            CHECK(lost == 0, "%d pages of processes %d and %d are not shared any more", lost, i, j);
        }
    CHECK(were > 10 * 400, "only %d pages were shared", were);
    for (int i = 0; i < 8 * PAGE; i++)
        CHECK(only_mine[i] == 9 && wiped[i] == 9, "what children do not inherit is gone");
    ask(2);
    ask(3);
    for (int i = 0; i < NR; i++) {
        CHECK(shared->wrong[i] == 0, "%d wrong pages in process %d", shared->wrong[i], i);
        CHECK(shared->wrong_more[i] == 0, "%d wrong bytes in process %d", shared->wrong_more[i], i);
        CHECK(shared->wrong_heap[i] == 0, "%d wrong bytes of heap in process %d", shared->wrong_heap[i], i);
    }
    for (int i = 1; i < NR; i++)
        kill(shared->pids[i], SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    return check_done();
}
