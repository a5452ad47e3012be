/* Changes its memory in every way that dirty-page tracking could miss, as fast as it can, until it is killed: writes,
 * new and freed mappings, moved and grown ones, dropped pages, changed protections, private file pages, children.
 * Checks nothing itself: tests compare what a dump stored with what /proc/PID/mem shows. */
// snap-test: unchecked

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define SLOTS 24
#define MAX_PAGES 512

static struct {
	char *at;
	size_t pages;
	int writable;
} slots[SLOTS];
static uint64_t seed;
static int file;

static uint64_t any(uint64_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

static void must(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	abort();
}

static void step(void)
{
	int i = (int)any(SLOTS);
	size_t pages = 1 + any(MAX_PAGES);
	void *moved;

	if (!slots[i].at) {
		int flags = MAP_PRIVATE | (any(4) ? MAP_ANONYMOUS : 0);

		moved = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, flags, flags & MAP_ANONYMOUS ? -1 : file, 0);
		if (moved == MAP_FAILED)
			return;
		slots[i].at = moved;
		slots[i].pages = pages;
		slots[i].writable = 1;
		return;
	}
	switch (any(40)) {
	case 0:
		must(!munmap(slots[i].at, slots[i].pages * PAGE), "munmap");
		slots[i].at = NULL;
		break;
	case 1:
		moved = mremap(slots[i].at, slots[i].pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
		if (moved != MAP_FAILED) {
			slots[i].at = moved;
			slots[i].pages = pages;
		}
		break;
	case 2:
		madvise(slots[i].at, (1 + any(slots[i].pages)) * PAGE, MADV_DONTNEED);
		break;
	case 3:
		slots[i].writable = (int)any(4) > 0;
		must(!mprotect(slots[i].at, slots[i].pages * PAGE, PROT_READ | (slots[i].writable ? PROT_WRITE : 0)),
		     "mprotect");
		break;
	case 4:
		/* Away and back to the same address: marks of the page tables travel with it. */
		moved = mremap(slots[i].at, slots[i].pages * PAGE, slots[i].pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			       (char *)0x200000000000UL);
		if (moved == MAP_FAILED)
			break;
		if (slots[i].writable)
			*((uint64_t *)moved + any(slots[i].pages) * PAGE / 8) = seed;
		must(mremap(moved, slots[i].pages * PAGE, slots[i].pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			    slots[i].at) == slots[i].at,
		     "mremap back");
		break;
	case 5:
		/* The same address, other pages. */
		must(mmap(slots[i].at, slots[i].pages * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == slots[i].at,
		     "mmap at the same address");
		slots[i].writable = 1;
		break;
	case 6:
		(void)*(volatile char *)(slots[i].at + any(slots[i].pages) * PAGE * !!slots[i].writable);
		break;
	default:
		if (slots[i].writable)
			*(uint64_t *)(slots[i].at + any(slots[i].pages) * PAGE + 8 * any(512)) = seed;
	}
}

int main(int argc, char **argv)
{
	char path[4096];
	int children = 0;

	if (argc < 2)
		return 2;
	seed = (uint64_t)getpid() * 0x9E3779B97F4A7C15UL | 1;
	snprintf(path, sizeof(path), "%s/pages", argv[1]);
	file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (file < 0 || ftruncate(file, MAX_PAGES * PAGE))
		return 2;
	memset(path + strlen(path) - 5, 0, 5);
	for (int i = 0; i < 20000; i++)
		step();
	strcat(path, "ready");
	close(open(path, O_RDWR | O_CREAT, 0600));
	for (uint64_t n = 1;; n++) {
		step();
		if (n % 1000 == 0)
			usleep(300);
		if (n % 4000 == 0 && children < 3) {
			if (fork() == 0)
				children = 3;
			else
				children++;
		}
		if (children < 3)
			waitpid(-1, NULL, WNOHANG);
	}
}
