/* Direct reads that no task waits for and nothing shows: each is handed to an io_uring ring that is closed at once.
 *
 *     closed_rings FILE ARENA_MIB DIRECTORY */
#include "selfcheck.h"
#include <linux/io_uring.h>
#include <sys/mman.h>

enum { CHUNK = 256 << 10 };

static void hand_over(int fd, void *to, off_t from)
{
    struct io_uring_params params = {0};
    int ring = (int)syscall(SYS_io_uring_setup, 2, &params);
    if (ring < 0)
        check_die("io_uring_setup");
    size_t size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    char *queue = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *sqe = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    if (queue == MAP_FAILED || sqe == MAP_FAILED)
        check_die("mmap");
    *sqe = (struct io_uring_sqe){
        .opcode = IORING_OP_READ, .fd = fd, .addr = (uint64_t)(uintptr_t)to, .len = CHUNK, .off = (uint64_t)from};
    *(unsigned *)(queue + params.sq_off.array) = 0;
    *(volatile unsigned *)(queue + params.sq_off.tail) = 1;
    if (syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0) != 1)
        check_die("io_uring_enter");
    munmap(queue, size);
    munmap(sqe, 4096);
    close(ring);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        check_die("usage: closed_rings FILE ARENA_MIB DIRECTORY");
    check_init(2, (char *[]){argv[0], argv[3], NULL});
    size_t arena_size = (size_t)atoi(argv[2]) << 20;
    char *arena = mmap(NULL, arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        check_die("mmap");
    memset(arena, 1, arena_size);
    int fd = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        check_die("open O_DIRECT");
    off_t file_size = lseek(fd, 0, SEEK_END);
    unsigned seed = 5;
    check_ready();
    while (!check_term) {
        size_t at = (size_t)rand_r(&seed) % (arena_size / CHUNK) * CHUNK;
        hand_over(fd, arena + at, (off_t)((size_t)rand_r(&seed) % ((size_t)file_size / CHUNK) * CHUNK));
        usleep(20000);
    }
    return check_done();
}
