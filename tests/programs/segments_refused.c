// snap-test: refused set_thread_area
/* A thread with an entry of its own in the global descriptor table, which only the 32-bit system call makes. */
#include "selfcheck.h"
#include <asm/ldt.h>
#include <sys/mman.h>

int main(int argc, char **argv)
{
    long result = -1;
    check_init(argc, argv);
    struct user_desc *wanted = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    *wanted = (struct user_desc){.entry_number = (unsigned)-1, .base_addr = 0x1000, .limit = 0xfff, .seg_32bit = 1};
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(243L), "b"(wanted) : "memory", "r8", "r9", "r10", "r11");
    if ((int)result)
        check_die("set_thread_area: %d", (int)result);
    check_ready();
    check_wait();
    return check_done();
}
