/* x87, SSE and, where the processor has them, AVX, AVX-512 and protection key registers: spun on by threads so that they are live in
 * registers at any instant; rounding and exception masks; fs and gs base. */
#include "selfcheck.h"
#include <asm/prctl.h>
#include <cpuid.h>
#include <fenv.h>
#include <immintrin.h>
#include <pthread.h>

static atomic_int ending, nr_ready;
static int gs_data[4] = {11, 22, 33, 44};

/* Loads all vector registers with a pattern, spins until the end inside one asm block, and compares. */
static int spin_sse(void)
{
    uint64_t before[32], after[32];
    for (int i = 0; i < 32; i++)
        before[i] = 0x0123456789abcdefu * (uint64_t)(i + 1);
    __asm__ volatile("movdqu 0(%0),%%xmm0; movdqu 16(%0),%%xmm1; movdqu 32(%0),%%xmm2; movdqu 48(%0),%%xmm3;"
                     "movdqu 64(%0),%%xmm4; movdqu 80(%0),%%xmm5; movdqu 96(%0),%%xmm6; movdqu 112(%0),%%xmm7;"
                     "movdqu 128(%0),%%xmm8; movdqu 144(%0),%%xmm9; movdqu 160(%0),%%xmm10; movdqu 176(%0),%%xmm11;"
                     "movdqu 192(%0),%%xmm12; movdqu 208(%0),%%xmm13; movdqu 224(%0),%%xmm14; movdqu 240(%0),%%xmm15;"
                     "1: pause; cmpl $0,(%2); je 1b;"
                     "movdqu %%xmm0,0(%1); movdqu %%xmm1,16(%1); movdqu %%xmm2,32(%1); movdqu %%xmm3,48(%1);"
                     "movdqu %%xmm4,64(%1); movdqu %%xmm5,80(%1); movdqu %%xmm6,96(%1); movdqu %%xmm7,112(%1);"
                     "movdqu %%xmm8,128(%1); movdqu %%xmm9,144(%1); movdqu %%xmm10,160(%1); movdqu %%xmm11,176(%1);"
                     "movdqu %%xmm12,192(%1); movdqu %%xmm13,208(%1); movdqu %%xmm14,224(%1); movdqu %%xmm15,240(%1);"
                     :
                     : "r"(before), "r"(after), "r"(&ending)
                     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                       "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    return memcmp(before, after, sizeof(before)) != 0;
}

__attribute__((target("avx"))) static int spin_avx(void)
{
    uint64_t before[8], after[8];
    for (int i = 0; i < 8; i++)
        before[i] = 0xfedcba9876543210u + (uint64_t)i;
    __asm__ volatile("vmovdqu 0(%0),%%ymm3; vmovdqu 32(%0),%%ymm14;"
                     "1: pause; cmpl $0,(%2); je 1b;"
                     "vmovdqu %%ymm3,0(%1); vmovdqu %%ymm14,32(%1); vzeroupper"
                     :
                     : "r"(before), "r"(after), "r"(&ending)
                     : "memory", "cc", "xmm3", "xmm14");
    return memcmp(before, after, sizeof(before)) != 0;
}

__attribute__((target("avx512f"))) static int spin_avx512(void)
{
    uint64_t before[16], after[16];
    uint32_t mask_before = 0xa5c3, mask_after = 0;
    for (int i = 0; i < 16; i++)
        before[i] = 0x1122334455667788u * (uint64_t)(i + 3);
    __asm__ volatile("vmovdqu64 0(%1),%%zmm5; vmovdqu64 64(%1),%%zmm29; kmovw %4,%%k6;"
                     "1: pause; cmpl $0,(%3); je 1b;"
                     "vmovdqu64 %%zmm5,0(%2); vmovdqu64 %%zmm29,64(%2); kmovw %%k6,%0; vzeroupper"
                     : "=r"(mask_after)
                     : "r"(before), "r"(after), "r"(&ending), "r"(mask_before)
                     : "memory", "cc", "xmm5", "xmm29", "k6");
    return memcmp(before, after, sizeof(before)) != 0 || mask_before != mask_after;
}

static int spin_x87(void)
{
    uint16_t control = 0x0e7f, control_now = 0; /* round to zero, double precision */
    double results[3];
    __asm__ volatile("fldcw %3; fldpi; fldl2e; fld1;"
                     "1: pause; cmpl $0,(%5); je 1b;"
                     "fstpl %0; fstpl %1; fstpl %2; fnstcw %4; fninit"
                     : "=m"(results[0]), "=m"(results[1]), "=m"(results[2])
                     : "m"(control), "m"(control_now), "r"(&ending)
                     : "memory", "cc");
    return control_now != control || results[0] != 1.0 || results[1] < 1.4426 || results[1] > 1.4428 || results[2] < 3.1415 ||
           results[2] > 3.1416;
}

static int by_pi(void)
{
    /* Leibniz with a rounding mode of its own; the same sum twice must be the same bits. */
    double sums[2] = {0, 0};
    unsigned steps = 0;
    fesetround(FE_UPWARD);
    while (!atomic_load(&ending) && steps < 4000000000u) {
        sums[0] += (steps & 1 ? -4.0 : 4.0) / (2.0 * steps + 1);
        steps++;
    }
    int round = fegetround();
    for (unsigned i = 0; i < steps; i++)
        sums[1] += (i & 1 ? -4.0 : 4.0) / (2.0 * i + 1);
    return round != FE_UPWARD || memcmp(&sums[0], &sums[1], sizeof(double)) != 0;
}

static struct spinner {
    const char *name;
    int (*spin)(void);
    int enabled, bad;
    pthread_t thread;
} spinners[] = {
    {"SSE", spin_sse, 1, 0, 0}, {"AVX", spin_avx, 0, 0, 0}, {"AVX-512", spin_avx512, 0, 0, 0}, {"x87", spin_x87, 1, 0, 0},
    {"sum", by_pi, 1, 0, 0},
};
#define NR_SPINNERS (sizeof(spinners) / sizeof(spinners[0]))

static void *spinner_main(void *argument)
{
    struct spinner *me = argument;
    atomic_fetch_add(&nr_ready, 1);
    me->bad = me->spin();
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    spinners[1].enabled = __builtin_cpu_supports("avx") != 0;
    spinners[2].enabled = __builtin_cpu_supports("avx512f") != 0;
    MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, gs_data));
    unsigned long fs_before = 0, fs_now = 0, gs_now = 0;
    MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_before));
    unsigned mxcsr = 0x5f80; /* round up, flush nothing, all masked */
    __asm__ volatile("ldmxcsr %0" ::"m"(mxcsr));
    int started = 0;
    for (size_t i = 0; i < NR_SPINNERS; i++)
        if (spinners[i].enabled && ++started)
            pthread_create(&spinners[i].thread, NULL, spinner_main, &spinners[i]);
    while (atomic_load(&nr_ready) != started)
        usleep(1000);
    check_ready();
    check_wait();
    unsigned mxcsr_now = 0;
    int through_gs = 0;
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr_now));
    __asm__ volatile("movl %%gs:8,%0" : "=r"(through_gs));
    CHECK((mxcsr_now & ~0x3fu) == mxcsr, "mxcsr is %#x", mxcsr_now);
    CHECK(through_gs == 33, "gs:8 is %d", through_gs);
    MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_now));
    MUST(syscall(SYS_arch_prctl, ARCH_GET_GS, &gs_now));
    CHECK(fs_now == fs_before && gs_now == (unsigned long)gs_data, "fs %#lx, gs %#lx", fs_now, gs_now);
    atomic_store(&ending, 1);
    for (size_t i = 0; i < NR_SPINNERS; i++)
        if (spinners[i].enabled) {
            pthread_join(spinners[i].thread, NULL);
            CHECK(!spinners[i].bad, "%s registers changed", spinners[i].name);
        }
    return check_done();
}
