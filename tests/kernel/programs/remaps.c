/* What a job sees of its own mappings: once before a take, and for each byte on standard input again. Prints "NAME RESULT" a line.
 *
 * Results are errno names as numbers, or counts; never addresses. Each scenario keeps a region that was mapped and touched before the
 * byte came (so a take in between has registered it), and makes a new one for the next round.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define PAGES 64ul
#define SIZE (PAGES * PAGE)
#define NR_OLD 16
#define RW (PROT_READ | PROT_WRITE)
#define PRIVATE (MAP_PRIVATE | MAP_ANONYMOUS)

static char *old[NR_OLD]; /* regions of SIZE in the middle of 4 * SIZE that are otherwise free */
static char *block;       /* of malloc */
static char *huge;        /* 2 MiB, aligned */

static void fail(const char *what) {
  perror(what);
  exit(1);
}

/* Touched from end to end; the address space after it is free. */
static char *region(void) {
  char *at = mmap(NULL, 4 * SIZE, PROT_NONE, PRIVATE, -1, 0);
  if (at == MAP_FAILED) fail("mmap");
  munmap(at, 4 * SIZE);
  /* One page that cannot be merged with keeps others away. */
  if (mmap(at, PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) fail("guard");
  at += PAGE;
  if (mmap(at, SIZE, RW, PRIVATE | MAP_FIXED, -1, 0) == MAP_FAILED) fail("region");
  memset(at, 7, SIZE);
  return at;
}

static void prepare(void) {
  for (int i = 0; i < NR_OLD; i++) old[i] = region();
  free(block);
  block = malloc(1 << 20);
  memset(block, 9, 1 << 20);
  huge = mmap(NULL, 4 << 20, RW, PRIVATE, -1, 0);
  huge = (char *)(((unsigned long)huge + (2 << 20) - 1) & ~((2ul << 20) - 1));
  madvise(huge, 2 << 20, MADV_NOHUGEPAGE);
  memset(huge, 3, 2 << 20);
  madvise(huge, 2 << 20, MADV_HUGEPAGE);
}

static void say(const char *name, long result) { printf("%s %ld\n", name, result); }

static int moved(char *at, unsigned long was, unsigned long now, int flags, char *to) {
  char *got = mremap(at, was, now, flags, to);
  return got == MAP_FAILED ? errno : 0;
}

static void renew(char *at, int touch) {
  munmap(at, PAGE);
  if (mmap(at, PAGE, RW, PRIVATE | MAP_FIXED, -1, 0) == MAP_FAILED) fail("renew");
  if (touch) *at = 1;
}

static char *target(void) { return mmap(NULL, 4 * SIZE, PROT_NONE, PRIVATE, -1, 0); }

static long mappings(void) {
  static char buffer[1 << 16];
  long lines = 0, got;
  int fd = open("/proc/self/maps", O_RDONLY);
  while ((got = read(fd, buffer, sizeof buffer)) > 0)
    for (long i = 0; i < got; i++) lines += buffer[i] == '\n';
  close(fd);
  return lines;
}

static long flags_say(const char *flag) {
  char line[512];
  long found = 0;
  FILE *smaps = fopen("/proc/self/smaps", "r");
  while (fgets(line, sizeof line, smaps)) found += !strncmp(line, "VmFlags", 7) && strstr(line, flag);
  fclose(smaps);
  return found > 0;
}

static long own_userfaultfd(char *at) {
  int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
  struct uffdio_api api = {.api = UFFD_API};
  struct uffdio_register range = {.range = {(unsigned long)at, SIZE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) fail("userfaultfd");
  long result = ioctl(fd, UFFDIO_REGISTER, &range) ? errno : 0;
  close(fd);
  return result;
}

static long in_child(char *at) {
  fflush(stdout);
  pid_t child = fork();
  if (!child) _exit(at[0] != 7 || flags_say(" uw") || moved(at, SIZE, 2 * SIZE, MREMAP_MAYMOVE, NULL));
  int status;
  waitpid(child, &status, 0);
  return status;
}

static void round_of(void) {
  char **o = old;
  /* One mapping that was there: everything works. */
  say("grow", moved(o[0], SIZE, 2 * SIZE, 0, NULL));
  say("grow_or_move", moved(o[1], SIZE, 64 * SIZE, MREMAP_MAYMOVE, NULL));
  say("shrink", moved(o[2], SIZE, SIZE / 2, 0, NULL));
  say("move", moved(o[3], SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, target()));
  say("move_a_part", moved(o[4] + PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target()));
  say("move_and_keep", moved(o[5], SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL));
  mprotect(o[6] + PAGE, PAGE, PROT_READ);
  mprotect(o[6] + PAGE, PAGE, RW);
  say("split_and_merged", moved(o[6], SIZE, 2 * SIZE, MREMAP_MAYMOVE, NULL));
  int wrong = 0;
  for (unsigned long size = 1 << 20; size < 64 << 20; size += size / 3) {
    block = realloc(block, size);
    wrong += block[0] != 9 || block[(1 << 20) - 1] != 9;
  }
  say("realloc", wrong);
  /* Parts of different age, as one. */
  renew(o[7] + SIZE / 2, 1);
  say("hole_touched", moved(o[7], SIZE, 2 * SIZE, MREMAP_MAYMOVE, NULL));
  renew(o[8] + SIZE / 2, 0);
  say("hole_untouched", moved(o[8], SIZE, 2 * SIZE, MREMAP_MAYMOVE, NULL));
  char *newer = mmap(o[9] + SIZE, PAGE, RW, PRIVATE | MAP_FIXED, -1, 0);
  if (newer == MAP_FAILED) fail("neighbour");
  *newer = 1;
  say("neighbour", moved(o[9], SIZE + PAGE, 2 * SIZE, MREMAP_MAYMOVE, NULL));
  renew(o[10] + SIZE / 2, 1);
  say("move_hole", moved(o[10], SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, target()));
  renew(o[11] + SIZE / 2, 1);
  say("rest_of_the_new_alone", moved(o[11] + SIZE / 2, PAGE, SIZE, MREMAP_MAYMOVE, NULL));
  /* Other calls. */
  say("advise_dontneed", madvise(o[12], SIZE, MADV_DONTNEED) ? errno : o[12][0]);
  say("advise_free", madvise(o[12], SIZE, MADV_FREE) ? errno : 0);
  say("advise_cold", madvise(o[12], SIZE, MADV_COLD) ? errno : 0);
  say("lock", mlock(o[13], SIZE) ? errno : munlock(o[13], SIZE));
  say("fork", in_child(o[13]));
  say("own_userfaultfd", own_userfaultfd(o[14]));
  say("collapse", madvise(huge, 2 << 20, 25 /* MADV_COLLAPSE */) ? errno : 0);
  say("flag_in_smaps", flags_say(" uw"));
  long before = mappings();
  char *heap = sbrk(64 * PAGE);
  memset(heap, 1, 64 * PAGE);
  say("mappings_by_brk", mappings() - before);
}

int main(void) {
  char byte;
  setvbuf(stdout, NULL, _IOLBF, 0);
  memset(sbrk(64 * PAGE), 1, 64 * PAGE);
  for (;;) {
    prepare();
    puts("ready");
    if (read(0, &byte, 1) != 1) return 0;
    if (byte == 'r') { /* the middle is renewed, then a second take is waited for */
      renew(old[15] + SIZE / 2, 1);
      puts("ready");
      if (read(0, &byte, 1) != 1) return 0;
      say("registered_later", moved(old[15], SIZE, 2 * SIZE, MREMAP_MAYMOVE, NULL));
      puts("end");
      continue;
    }
    round_of();
    puts("end");
  }
}
