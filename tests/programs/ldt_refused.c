/* A segment in the local descriptor table: named, refused, left alone. */
// snap-test: refused modify_ldt
#include "selfcheck.h"
#include <asm/ldt.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    struct user_desc segment = {.entry_number = 3, .base_addr = 0x10000, .limit = 0xfff, .seg_32bit = 1};
    char table[64], now[64];
    MUST(syscall(SYS_modify_ldt, 1, &segment, sizeof(segment)));
    MUST(syscall(SYS_modify_ldt, 0, table, sizeof(table)));
    check_ready();
    check_wait();
    CHECK(syscall(SYS_modify_ldt, 0, now, sizeof(now)) == sizeof(now) && memcmp(table, now, sizeof(now)) == 0, "the table changed");
    return check_done();
}
