/* Private memory: anonymous with holes, read-only, PROT_NONE with content, guard pages, a growing stack, brk, a file's
 * pages changed, zeroed and left alone. */
#include "selfcheck.h"
#include <sys/mman.h>

#define PAGE 4096UL
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

static void fill(char *at, size_t nr_pages, unsigned seed)
{
    for (size_t i = 0; i < nr_pages * PAGE / 8; i++)
        ((uint64_t *)at)[i] = (i + 1) * 0x9e3779b97f4a7c15u + seed;
}

static int is_filled(const char *at, size_t nr_pages, unsigned seed)
{
    for (size_t i = 0; i < nr_pages * PAGE / 8; i++)
        if (((const uint64_t *)at)[i] != (i + 1) * 0x9e3779b97f4a7c15u + seed)
            return 0;
    return 1;
}

static char *map(size_t nr_pages, int prot, int flags, int fd)
{
    char *at = mmap(NULL, nr_pages * PAGE, prot, flags, fd, 0);
    if (at == MAP_FAILED)
        check_die("mmap");
    return at;
}

static int is_zero(const char *at, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (at[i])
            return 0;
    return 1;
}

__attribute__((noinline)) static unsigned deep(unsigned depth)
{
    volatile char frame[3000];
    memset((void *)frame, (int)depth, sizeof(frame));
    return depth == 0 ? (unsigned char)frame[0] : deep(depth - 1) + (unsigned char)frame[17] - depth % 256;
}

static volatile int segv_seen;
static void *volatile segv_return;
static void on_segv(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)context;
    segv_seen++;
    segv_return = info->si_addr;
    mmap((void *)((uintptr_t)info->si_addr & -PAGE), PAGE, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    char *holes = map(1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (int i = 0; i < 1024; i += 3)
        fill(holes + i * PAGE, 1, (unsigned)i);
    char *constant = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(constant, 8, 77);
    MUST(mprotect(constant, 8 * PAGE, PROT_READ));
    char *none = map(1 << 18, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    MUST(mprotect(none + 40 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE));
    fill(none + 40 * PAGE, 4, 99);
    MUST(mprotect(none + 40 * PAGE, 4 * PAGE, PROT_NONE));
    char *guarded = map(16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(guarded, 16, 5);
    int has_guard = madvise(guarded + 4 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL) == 0;

    int fd = MUST(open("mapped", O_RDWR | O_CREAT | O_TRUNC, 0600));
    for (int i = 0; i < 8; i++) {
        static char page[PAGE];
        memset(page, 'a' + i, sizeof(page));
        MUST(write(fd, page, sizeof(page)));
    }
    char *file = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
    MUST(close(fd));
    memset(file + 2 * PAGE, 'X', PAGE);
    memset(file + 5 * PAGE, 0, PAGE); /* a page of zeros is not the file's page */
    MUST(mprotect(file, 8 * PAGE, PROT_READ));

    char *grows = map(64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    MUST(munmap(grows, 64 * PAGE));
    char *low = mmap(grows + 60 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
    if (low == MAP_FAILED)
        check_die("mmap growsdown");
    fill(low, 4, 123);
    char *heap = sbrk(300 * PAGE);
    fill(heap, 300, 31);
    uintptr_t heap_end = (uintptr_t)sbrk(0);
    char *code = map(1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    memcpy(code, "\xb8\x2a\x00\x00\x00\xc3", 6); /* mov eax, 42; ret */
    MUST(mprotect(code, PAGE, PROT_READ | PROT_EXEC));
    check_ready();
    check_wait();
    for (int i = 0; i < 1024; i++)
        CHECK(i % 3 ? is_zero(holes + i * PAGE, PAGE) : is_filled(holes + i * PAGE, 1, (unsigned)i), "page %d", i);
    CHECK(is_filled(constant, 8, 77), "read-only pages");
    struct sigaction action = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    *(volatile char *)constant = 1;
    CHECK(segv_seen == 1 && segv_return == constant, "read-only memory was written: %d", segv_seen);
    (void)*(volatile char *)(none + PAGE);
    CHECK(segv_seen == 2, "PROT_NONE could be read");
    MUST(mprotect(none + 40 * PAGE, 4 * PAGE, PROT_READ));
    CHECK(is_filled(none + 40 * PAGE, 4, 99), "content under PROT_NONE");
    CHECK(is_filled(guarded, 4, 5), "pages below the guard");
    if (has_guard) {
        (void)*(volatile char *)(guarded + 5 * PAGE);
        CHECK(segv_seen == 3, "the guard page is gone");
    }
    for (int i = 0; i < 8; i++) {
        char want = i == 2 ? 'X' : i == 5 ? 0 : (char)('a' + i);
        CHECK(file[i * (int)PAGE] == want && file[i * (int)PAGE + 4095] == want, "file page %d is %d", i, file[i * (int)PAGE]);
    }
    CHECK(is_filled(low, 4, 123), "growsdown area");
    low[-100] = 1; /* grows by a page */
    CHECK(low[-100] == 1, "growsdown area does not grow");
    CHECK(is_filled(heap, 300, 31), "heap");
    CHECK((uintptr_t)sbrk(0) == heap_end, "brk is %p, was %#lx", sbrk(0), (unsigned long)heap_end);
    CHECK(sbrk(64 * PAGE) != (void *)-1, "brk does not grow");
    CHECK(((int (*)(void))(void *)code)() == 42, "code");
    CHECK(deep(1000) < 1u << 31, "stack");
    return check_done();
}
