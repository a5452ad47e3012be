// snap-test: requires cpu:amx_tile
/* AMX: the permission that the process asked for, and tiles that a thread has in use, which come back with their bytes and shapes. */
#include "selfcheck.h"
#include <pthread.h>

#define ARCH_GET_XCOMP_PERM 0x1022
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} config __attribute__((aligned(64)));
static uint8_t before[8][16][64], after[8][16][64];
static atomic_int ending, ready;

/* The tiles live in registers while it spins; the instructions are the compiler's only with -mamx-tile. */
static void *spin(void *argument)
{
    uint8_t(*in)[16][64] = before, (*out)[16][64] = after;
    long stride = 64;
    (void)argument;
    __asm__ volatile(".byte 0xc4,0xe2,0x78,0x49,0x00" ::"a"(&config) : "memory"); /* ldtilecfg (%rax) */
    /* tileloadd (%rax,%rcx,1),%tmm0 and %tmm5 */
    __asm__ volatile(".byte 0xc4,0xe2,0x7b,0x4b,0x04,0x08" ::"a"(in[0]), "c"(stride) : "memory");
    __asm__ volatile(".byte 0xc4,0xe2,0x7b,0x4b,0x2c,0x08" ::"a"(in[5]), "c"(stride) : "memory");
    atomic_store(&ready, 1);
    while (!atomic_load(&ending))
        __builtin_ia32_pause();
    /* tilestored %tmm0 and %tmm5 */
    __asm__ volatile(".byte 0xc4,0xe2,0x7a,0x4b,0x04,0x08" ::"a"(out[0]), "c"(stride) : "memory");
    __asm__ volatile(".byte 0xc4,0xe2,0x7a,0x4b,0x2c,0x08" ::"a"(out[5]), "c"(stride) : "memory");
    __asm__ volatile(".byte 0xc4,0xe2,0x78,0x49,0xc0" ::: "memory"); /* tilerelease */
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    MUST(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA));
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.colsb[tile] = 64;
        config.rows[tile] = 16;
        for (int at = 0; at < 16 * 64; at++)
            before[tile][at / 64][at % 64] = (uint8_t)(tile * 31 + at * 7);
    }
    pthread_t thread;
    pthread_create(&thread, NULL, spin, NULL);
    while (!atomic_load(&ready))
        usleep(1000);
    check_ready();
    check_wait();
    uint64_t permitted = 0;
    MUST(syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &permitted));
    CHECK(permitted >> XFEATURE_XTILEDATA & 1, "permitted is %#lx", (unsigned long)permitted);
    atomic_store(&ending, 1);
    pthread_join(thread, NULL);
    CHECK(memcmp(before[0], after[0], sizeof(before[0])) == 0, "tile 0 differs");
    CHECK(memcmp(before[5], after[5], sizeof(before[5])) == 0, "tile 5 differs");
    return check_done();
}
