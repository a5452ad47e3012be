/* What the kernel says of an address space: maps with VmFlags (advice, locks, names, reservations), exe, cmdline, environ,
 * auxv, brk and stack bounds, vdso. All must read the same afterwards. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/prctl.h>

#define PAGE 4096UL
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

struct view {
    char maps[65536], exe[4096], cmdline[4096], environ[8192], auxv[4096], stat[4096];
};
static struct view before, now;

static void slurp(const char *path, char *to, size_t size)
{
    int fd = open(path, O_RDONLY);
    size_t got = 0;
    ssize_t part;
    memset(to, 0, size);
    while (got < size - 1 && (part = read(fd, to + got, size - 1 - got)) > 0)
        got += (size_t)part;
    close(fd);
}

/* Lines of maps and the kept VmFlags; what a tracker or the kernel's bookkeeping adds is left out. */
static void look_at_maps(char *to, size_t size)
{
    static char raw[1 << 20];
    slurp("/proc/self/smaps", raw, sizeof(raw));
    size_t used = 0;
    for (char *save, *line = strtok_r(raw, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (strncmp(line, "VmFlags:", 8) == 0) {
            static const char *const kept[] = {"rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "lo", "lf", "sr", "rr",
                                               "dc", "nr", "wf", "dd", "hg", "nh", "mg"};
            used += (size_t)snprintf(to + used, size - used, "  flags");
            for (char *more, *flag = strtok_r(line + 8, " ", &more); flag; flag = strtok_r(NULL, " ", &more))
                for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++)
                    if (strcmp(flag, kept[i]) == 0)
                        used += (size_t)snprintf(to + used, size - used, " %s", flag);
            used += (size_t)snprintf(to + used, size - used, "\n");
        } else if ((line[0] >= '0' && line[0] <= '9') || (line[0] >= 'a' && line[0] <= 'f')) {
            char range[64], perms[8], offset[32], dev[16], ino[32];
            int at = 0;
            if (sscanf(line, "%63s %7s %31s %15s %31s %n", range, perms, offset, dev, ino, &at) >= 5)
                used += (size_t)snprintf(to + used, size - used, "%s %s %s %s\n", range, perms, offset, at ? line + at : "");
        }
    }
}

static void look(struct view *view)
{
    look_at_maps(view->maps, sizeof(view->maps));
    memset(view->exe, 0, sizeof(view->exe));
    if (readlink("/proc/self/exe", view->exe, sizeof(view->exe) - 1) < 0)
        check_die("readlink exe");
    slurp("/proc/self/cmdline", view->cmdline, sizeof(view->cmdline));
    slurp("/proc/self/environ", view->environ, sizeof(view->environ));
    slurp("/proc/self/auxv", view->auxv, sizeof(view->auxv));
    char raw[4096];
    slurp("/proc/self/stat", raw, sizeof(raw));
    char *field = strrchr(raw, ')') + 2, *save;
    size_t used = 0;
    memset(view->stat, 0, sizeof(view->stat));
    int number = 3;
    for (field = strtok_r(field, " ", &save); field; field = strtok_r(NULL, " ", &save), number++)
        if ((number >= 26 && number <= 28) || (number >= 45 && number <= 51))
            used += (size_t)snprintf(view->stat + used, sizeof(view->stat) - used, "%d=%s ", number, field);
    snprintf(view->stat + used, sizeof(view->stat) - used, "brk=%lx", (unsigned long)sbrk(0));
}

static void advise(int advice, const char *name)
{
    /* PROT_NONE areas around it keep the kernel from merging neighbours. */
    char *at = mmap(NULL, 1026 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        check_die("mmap");
    MUST(mprotect(at + PAGE, 1024 * PAGE, PROT_READ | PROT_WRITE));
    if (advice && madvise(at + PAGE, 1024 * PAGE, advice) != 0 && errno != EINVAL)
        check_die("madvise");
    if (name)
        prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, at + PAGE, 1024 * PAGE, name);
    at[7 * PAGE] = 1;
}

static void show_difference(const char *one, const char *two)
{
    char a[512], b[512];
    while (*one && *two) {
        size_t m = strcspn(one, "\n"), n = strcspn(two, "\n");
        snprintf(a, sizeof(a), "%.*s", (int)m, one);
        snprintf(b, sizeof(b), "%.*s", (int)n, two);
        if (strcmp(a, b)) {
            CHECK(0, "maps: was [%s], is [%s]", a, b);
            return;
        }
        one += m + (one[m] != 0), two += n + (two[n] != 0);
    }
    CHECK(0, "maps: longer or shorter");
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int advices[] = {MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_MERGEABLE,
                     MADV_SEQUENTIAL, MADV_RANDOM};
    for (size_t i = 0; i < sizeof(advices) / sizeof(advices[0]); i++)
        advise(advices[i], NULL);
    advise(0, "a name");
    char *locked = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(mlock(locked, 2 * PAGE));
    MUST(mlock2(locked + 4 * PAGE, 2 * PAGE, MLOCK_ONFAULT));
    if (mmap(NULL, 1UL << 36, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED)
        check_die("mmap");
    char *shared = mmap(NULL, 100 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared[0] = 1;
    (void)sbrk(5 * PAGE + 16);
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time); /* through the vdso */
    look(&before);
    look(&before); /* the first one's buffers are mapped by now */
    check_ready();
    check_wait();
    look(&now);
    if (strcmp(before.maps, now.maps))
        show_difference(before.maps, now.maps);
    CHECK(!strcmp(before.exe, now.exe), "exe %s", now.exe);
    CHECK(!memcmp(before.cmdline, now.cmdline, sizeof(now.cmdline)), "cmdline %s", now.cmdline);
    CHECK(!memcmp(before.environ, now.environ, sizeof(now.environ)), "environ %s", now.environ);
    CHECK(!memcmp(before.auxv, now.auxv, sizeof(now.auxv)), "auxv differs");
    CHECK(!strcmp(before.stat, now.stat), "stat: was [%s], is [%s]", before.stat, now.stat);
    struct timespec later;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &later) == 0 && later.tv_sec >= time.tv_sec, "vdso clock");
    return check_done();
}
