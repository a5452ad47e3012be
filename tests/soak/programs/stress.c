/* Changes its memory in every way that checkpoint/tracking.md lists, all the time, and knows at each instant what stands in each page.
 *
 *     stress THREADS SEED [aio] DIRECTORY
 *
 * Each page is written with words that follow from one number, its stamp; the stamps are kept apart. Worker threads come and go, each with
 * regions of its own: pages are written, read directly from a file (O_DIRECT, opened for each read; some threads have a descriptor table of
 * their own), moved, grown, shrunk, dropped, freed, protected, made huge, given to pipes, shared with children that change their copies.
 * A page that is not what it must be ends the program with FAIL; SIGTERM makes it check everything and say PASS. The file "ops" has the number
 * of operations so far. */
#include "selfcheck.h"
#include <linux/aio_abi.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { PAGE = 4096, WORDS = PAGE / 8, REGIONS = 6, MOST_PAGES = 1024, FILE_PAGES = 1024, LIFE = 4000 };
enum kind { ANONYMOUS, OVER_FILE, SHARED };

struct region {
    enum kind kind;
    char *at;
    size_t pages;
    int patched; /* made of several mappings: not moved */
    int memfd;
    uint64_t *stamps; /* 0: the page is zero */
    uint8_t *freed;   /* MADV_FREE: zero or as it was */
};

struct worker {
    uint64_t seed;
    int pipe[2];
    struct region regions[REGIONS];
};

static atomic_long nr_ops;
static atomic_int failed;
static int with_aio;
static uint64_t file_stamps[FILE_PAGES];

static uint64_t any(struct worker *w, uint64_t below)
{
    w->seed ^= w->seed << 13;
    w->seed ^= w->seed >> 7;
    w->seed ^= w->seed << 17;
    return w->seed % below;
}

static void bad(const char *what, const struct region *r, size_t page, uint64_t got)
{
    char text[300];
    snprintf(text, sizeof(text), "%s: page %zu of %zu at %p (kind %d), stamp %lx, found %lx, errno %d", what, page, r ? r->pages : 0,
             r ? (void *)r->at : NULL, r ? (int)r->kind : -1, r ? (long)r->stamps[page] : 0L, (long)got, errno);
    check_fail("stress", "%s", text);
    atomic_store(&failed, 1);
}

static void fill(void *to, uint64_t stamp)
{
    uint64_t *words = to;
    for (int i = 0; i < WORDS; i++)
        words[i] = stamp ? stamp * 0x9E3779B97F4A7C15ULL + (uint64_t)i : 0;
}

static int holds(const void *page, uint64_t stamp)
{
    const volatile uint64_t *words = page;
    for (int i = 0; i < WORDS; i++)
        if (words[i] != (stamp ? stamp * 0x9E3779B97F4A7C15ULL + (uint64_t)i : 0))
            return 0;
    return 1;
}

static void check_page(struct region *r, size_t i)
{
    char *at = r->at + i * PAGE;
    if (holds(at, r->stamps[i]))
        return;
    if (r->freed[i]) {
        for (int tries = 0; tries < 3; tries++) /* it may be taken between two words */
            if (holds(at, 0)) {
                r->stamps[i] = 0;
                r->freed[i] = 0;
                return;
            }
    }
    bad("wrong content", r, i, *(volatile uint64_t *)at);
}

static void check_region(struct region *r)
{
    for (size_t i = 0; i < r->pages; i++)
        check_page(r, i);
}

static void set_stamp(struct region *r, size_t i, uint64_t stamp)
{
    r->stamps[i] = stamp;
    r->freed[i] = 0;
}

static uint64_t at_rest(const struct region *r, size_t i)
{
    return r->kind == OVER_FILE ? file_stamps[i % FILE_PAGES] : 0;
}

static void drop(struct region *r)
{
    if (r->at)
        munmap(r->at, r->pages * PAGE);
    if (r->memfd >= 0)
        close(r->memfd);
    free(r->stamps);
    free(r->freed);
    memset(r, 0, sizeof(*r));
    r->memfd = -1;
}

static void make(struct worker *w, struct region *r)
{
    *r = (struct region){.memfd = -1, .kind = (enum kind)any(w, 3), .pages = 1 + any(w, MOST_PAGES)};
    int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
    if (r->kind == OVER_FILE) {
        flags = MAP_PRIVATE;
        fd = open("data", O_RDONLY | O_CLOEXEC);
        r->pages = 1 + any(w, FILE_PAGES);
    } else if (r->kind == SHARED) {
        flags = MAP_SHARED;
        fd = r->memfd = memfd_create("stress", MFD_CLOEXEC);
        r->pages = 1 + any(w, 64);
        if (ftruncate(fd, (off_t)(r->pages * PAGE)) != 0)
            check_die("ftruncate");
    }
    r->at = mmap(NULL, r->pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (r->at == MAP_FAILED)
        check_die("mmap");
    if (r->kind == OVER_FILE)
        close(fd);
    r->stamps = calloc(MOST_PAGES * 2, sizeof(*r->stamps));
    r->freed = calloc(MOST_PAGES * 2, 1);
    for (size_t i = 0; i < r->pages; i++)
        r->stamps[i] = at_rest(r, i);
    if (r->kind == ANONYMOUS && any(w, 2))
        for (size_t i = 0; i < r->pages; i++) {
            r->stamps[i] = any(w, UINT64_MAX) | 1;
            fill(r->at + i * PAGE, r->stamps[i]);
        }
}

/* A range of pages of a region. */
static size_t range(struct worker *w, const struct region *r, size_t most, size_t *count)
{
    *count = 1 + any(w, r->pages < most ? r->pages : most);
    return any(w, r->pages - *count + 1);
}

static void write_some(struct worker *w, struct region *r)
{
    size_t count, first = range(w, r, 16, &count);
    for (size_t i = first; i < first + count; i++) {
        uint64_t stamp = any(w, UINT64_MAX) | 1;
        if (r->kind == SHARED && any(w, 2)) { /* past this mapping */
            char page[PAGE];
            fill(page, stamp);
            if (pwrite(r->memfd, page, PAGE, (off_t)(i * PAGE)) != PAGE)
                check_die("pwrite");
        } else {
            fill(r->at + i * PAGE, stamp);
        }
        set_stamp(r, i, stamp);
    }
}

static void read_directly(struct worker *w, struct region *r)
{
    size_t count, first = range(w, r, 64, &count), from = any(w, FILE_PAGES - count);
    int fd = open("data", O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        check_die("open O_DIRECT");
    if (pread(fd, r->at + first * PAGE, count * PAGE, (off_t)(from * PAGE)) != (ssize_t)(count * PAGE))
        bad("direct read", r, first, 0);
    close(fd);
    for (size_t i = 0; i < count; i++) {
        set_stamp(r, first + i, file_stamps[from + i]);
        check_page(r, first + i);
    }
}

static void read_by_aio(struct worker *w, struct region *r)
{
    aio_context_t context = 0;
    size_t count, first = range(w, r, 64, &count), from = any(w, FILE_PAGES - count);
    int fd = open("data", O_RDONLY | O_DIRECT | O_CLOEXEC);
    struct iocb one = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (unsigned)fd,
        .aio_buf = (uint64_t)(uintptr_t)(r->at + first * PAGE), .aio_nbytes = count * PAGE, .aio_offset = (int64_t)(from * PAGE)};
    struct iocb *list[1] = {&one};
    struct io_event event = {0};
    if (syscall(SYS_io_setup, 4, &context) != 0) {
        close(fd);
        return;
    }
    if (syscall(SYS_io_submit, context, 1, list) != 1)
        check_die("io_submit");
    while (syscall(SYS_io_getevents, context, 1, 1, &event, NULL) != 1 && errno == EINTR)
        ;
    syscall(SYS_io_destroy, context);
    close(fd);
    if (event.res != (int64_t)(count * PAGE))
        bad("AIO read", r, first, (uint64_t)event.res);
    for (size_t i = 0; i < count; i++)
        set_stamp(r, first + i, file_stamps[from + i]);
}

static void through_pipe(struct worker *w, struct region *r)
{
    char page[PAGE];
    size_t i = any(w, r->pages);
    uint64_t expected;
    if (any(w, 2)) {
        check_page(r, i);
        r->freed[i] = 0;
        expected = r->stamps[i];
        struct iovec piece = {r->at + i * PAGE, PAGE};
        if (vmsplice(w->pipe[1], &piece, 1, 0) != PAGE)
            bad("vmsplice", r, i, 0);
    } else {
        size_t from = any(w, FILE_PAGES);
        off64_t offset = (off64_t)(from * PAGE);
        int fd = open("data", O_RDONLY | O_CLOEXEC);
        expected = file_stamps[from];
        if (splice(fd, &offset, w->pipe[1], NULL, PAGE, 0) != PAGE)
            bad("splice", r, i, 0);
        close(fd);
    }
    for (size_t got = 0; got < PAGE;) {
        ssize_t part = read(w->pipe[0], page + got, PAGE - got);
        if (part <= 0)
            check_die("read of the pipe");
        got += (size_t)part;
    }
    if (!holds(page, expected))
        bad("the pipe's page", r, i, *(uint64_t *)page);
}

static void move(struct worker *w, struct region *r)
{
    size_t pages = r->pages;
    if (r->patched || r->kind != ANONYMOUS)
        return;
    if (any(w, 2))
        pages = 1 + any(w, MOST_PAGES);
    char *moved;
    if (any(w, 2)) {
        char *place = mmap(NULL, pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        moved = mremap(r->at, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    } else {
        moved = mremap(r->at, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
    }
    if (moved == MAP_FAILED) {
        bad("mremap", r, 0, 0);
        return;
    }
    for (size_t i = r->pages; i < pages; i++)
        set_stamp(r, i, 0);
    r->at = moved;
    r->pages = pages;
}

static void patch(struct worker *w, struct region *r)
{
    size_t count, first = range(w, r, 64, &count);
    if (r->kind != ANONYMOUS)
        return;
    if (mmap(r->at + first * PAGE, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        check_die("mmap over");
    for (size_t i = first; i < first + count; i++)
        set_stamp(r, i, 0);
    r->patched = 1;
}

static void advise(struct worker *w, struct region *r)
{
    size_t count, first = range(w, r, 128, &count);
    char *at = r->at + first * PAGE;
    switch (any(w, 5)) {
    case 0:
        if (r->kind == SHARED || madvise(at, count * PAGE, MADV_DONTNEED) != 0)
            return;
        for (size_t i = first; i < first + count; i++)
            set_stamp(r, i, at_rest(r, i));
        break;
    case 1:
        if (r->kind != ANONYMOUS || madvise(at, count * PAGE, MADV_FREE) != 0)
            return;
        memset(r->freed + first, 1, count);
        break;
    case 2:
        madvise(r->at, r->pages * PAGE, MADV_HUGEPAGE);
        break;
    case 3:
        madvise(r->at, r->pages * PAGE, MADV_NOHUGEPAGE);
        break;
    default:
        madvise(r->at, r->pages * PAGE, MADV_COLLAPSE);
    }
}

static void protect(struct worker *w, struct region *r)
{
    if (mprotect(r->at, r->pages * PAGE, PROT_READ) != 0)
        check_die("mprotect");
    for (int i = 0; i < 20; i++)
        check_page(r, any(w, r->pages));
    if (mprotect(r->at, r->pages * PAGE, PROT_READ | PROT_WRITE) != 0)
        check_die("mprotect");
}

static void with_child(struct worker *w, struct region *r)
{
    pid_t pid = fork();
    if (pid == 0) { /* only this thread is here; what it changes is its own, but for shared memory */
        if (r->kind != SHARED)
            write_some(w, r);
        check_region(r);
        _exit(atomic_load(&failed) ? 1 : 0);
    }
    if (pid < 0)
        return;
    if (r->kind != SHARED)
        write_some(w, r); /* while the pages are shared with the child */
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            check_die("waitpid");
    if (status != 0)
        bad("the child", r, 0, (uint64_t)status);
}

static void *work(void *argument)
{
    struct worker *w = argument;
    if (any(w, 3) == 0 && unshare(CLONE_FILES) != 0)
        check_die("unshare");
    if (pipe2(w->pipe, O_CLOEXEC) != 0)
        check_die("pipe");
    for (int i = 0; i < REGIONS; i++)
        make(w, &w->regions[i]);
    for (int step = 0; step < LIFE && !check_term && !atomic_load(&failed); step++) {
        struct region *r = &w->regions[any(w, REGIONS)];
        switch (any(w, 40)) {
        case 0: case 1: case 2: case 3: case 4: case 5: case 6: case 7: case 8: case 9: write_some(w, r); break;
        case 10: case 11: case 12: case 13: case 14: read_directly(w, r); break;
        case 15: case 16: case 17: through_pipe(w, r); break;
        case 18: case 19: case 20: move(w, r); break;
        case 21: case 22: patch(w, r); break;
        case 23: case 24: case 25: case 26: advise(w, r); break;
        case 27: case 28: protect(w, r); break;
        case 29: with_child(w, r); break;
        case 30: drop(r); make(w, r); break;
        case 31: check_region(r); break;
        case 32: if (with_aio && any(w, 50) == 0) read_by_aio(w, r); break;
        default:
            for (int i = 0; i < 8; i++)
                check_page(r, any(w, r->pages));
        }
        atomic_fetch_add(&nr_ops, 1);
        if (any(w, 8) == 0)
            usleep(500);
    }
    for (int i = 0; i < REGIONS; i++) {
        check_region(&w->regions[i]);
        drop(&w->regions[i]);
    }
    close(w->pipe[0]);
    close(w->pipe[1]);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        check_die("usage: stress THREADS SEED [aio] DIRECTORY");
    check_init(2, (char *[]){argv[0], argv[argc - 1], NULL});
    int nr_threads = atoi(argv[1]);
    uint64_t seed = strtoull(argv[2], NULL, 10) | 1;
    with_aio = argc > 4;
    int fd = MUST(open("data", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    for (int i = 0; i < FILE_PAGES; i++) {
        char page[PAGE];
        file_stamps[i] = (seed + (uint64_t)i * 7919) | 1;
        fill(page, file_stamps[i]);
        MUST(write(fd, page, PAGE));
    }
    MUST(fsync(fd));
    close(fd);
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    static struct worker workers[32];
    pthread_t threads[32];
    int running[32] = {0};
    check_ready();
    while (!check_term && !atomic_load(&failed)) {
        for (int i = 0; i < nr_threads && i < 32; i++) {
            if (running[i] && pthread_tryjoin_np(threads[i], NULL) == 0)
                running[i] = 0;
            if (!running[i]) {
                memset(&workers[i], 0, sizeof(workers[i]));
                workers[i].seed = seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
                workers[i].seed |= 1;
                running[i] = pthread_create(&threads[i], NULL, work, &workers[i]) == 0;
            }
        }
        char text[32];
        snprintf(text, sizeof(text), "%ld\n", atomic_load(&nr_ops));
        check_put("ops", text);
        usleep(100000);
    }
    check_term = 1;
    for (int i = 0; i < nr_threads && i < 32; i++)
        if (running[i])
            pthread_join(threads[i], NULL);
    return check_done();
}
