// Signal frames: the interrupted context of a task in the form that rt_sigreturn(2) takes it back.
// Its own file because the kernel's asm headers and libc's <signal.h> cannot be read together.
// Layout: struct rt_sigframe of arch/x86/include/asm/sigframe.h; fpstate as in asm/sigcontext.h.

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cpuid.h>
#include <asm/ptrace-abi.h>
#include <asm/signal.h>
#include <asm/sigcontext.h>
#include <asm/ucontext.h>

struct snap_regs {                      // struct user_regs_struct of <sys/user.h>
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs,
        eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
};

struct frame {
    uint64_t pretcode;
    struct ucontext uc;
};

_Static_assert(sizeof(struct snap_regs) == 216, "user_regs_struct has 27 words");
_Static_assert(offsetof(struct frame, uc.uc_sigmask) == 8 + 40 + sizeof(struct sigcontext), "no holes in ucontext");
_Static_assert(sizeof(struct _xstate) >= 512 + 64, "legacy area and xsave header");

#define XSTATE_MIN (512 + 64)           // legacy area and xsave header

// No such mode: do_sigaltstack() answers EINVAL and rt_sigreturn goes on, so the alternate stack
// stays what it was. SS_DISABLE here would take it away from the job.
#define SS_KEEP 0x40

// Where a component ends in the blob. Asked once: in a virtual machine each CPUID leaves the guest, and there are some for every
// thread. Two threads that ask at once note the same.
static size_t component_end(unsigned bit)
{
    static size_t ends[64];
    if (!ends[bit]) {
        unsigned a, b, c, d;
        __cpuid_count(0xd, bit, a, b, c, d);
        ends[bit] = (size_t)a + b;
    }
    return ends[bit];
}

// How much of an NT_X86_XSTATE blob is in use. Components that are in their initial state need not be
// in the frame; and a frame that is larger than the task's own xstate (the blob has room for AMX that
// the task was never permitted) makes the kernel restore x87 and SSE only, silently.
size_t snap_xstate_used(const void *xstate, size_t size)
{
    uint64_t present;
    size_t used = XSTATE_MIN;
    if (size < XSTATE_MIN)
        return 0;
    memcpy(&present, (const char *)xstate + 512, sizeof(present));
    for (unsigned bit = 2; bit < 63; bit++)
        if (present & (1ULL << bit) && component_end(bit) > used)
            used = component_end(bit);
    return used <= size ? used : 0;
}

size_t snap_frame_size(size_t xstate_used)
{
    size_t head = (sizeof(struct frame) + 63) & ~(size_t)63;
    return xstate_used ? head + xstate_used + FP_XSTATE_MAGIC2_SIZE : sizeof(struct frame);
}

// Where in a frame the result of the interrupted call is.
size_t snap_frame_result_at(void)
{
    return offsetof(struct frame, uc.uc_mcontext.rax);
}

// Write the frame that returns to `regs` with `sigmask` into `out`, which will live at `address` (a
// multiple of 64). xstate_used 0: no vector state (the task's becomes initial). Returns its size.
size_t snap_put_frame(void *out, uint64_t address, const struct snap_regs *regs, uint64_t sigmask,
                      uint64_t restorer, const void *xstate, size_t xstate_used)
{
    struct frame frame;
    struct sigcontext *sc = &frame.uc.uc_mcontext;
    size_t head = (sizeof(frame) + 63) & ~(size_t)63;

    memset(&frame, 0, sizeof(frame));
    frame.pretcode = restorer;
    frame.uc.uc_flags = UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS | (xstate_used ? UC_FP_XSTATE : 0);
    frame.uc.uc_stack.ss_flags = SS_KEEP;
    memcpy(&frame.uc.uc_sigmask, &sigmask, sizeof(sigmask));
    sc->r8 = regs->r8; sc->r9 = regs->r9; sc->r10 = regs->r10; sc->r11 = regs->r11;
    sc->r12 = regs->r12; sc->r13 = regs->r13; sc->r14 = regs->r14; sc->r15 = regs->r15;
    sc->rdi = regs->rdi; sc->rsi = regs->rsi; sc->rbp = regs->rbp; sc->rbx = regs->rbx;
    sc->rdx = regs->rdx; sc->rax = regs->rax; sc->rcx = regs->rcx; sc->rsp = regs->rsp;
    sc->rip = regs->rip; sc->eflags = regs->eflags;
    sc->cs = (uint16_t)regs->cs; sc->ss = (uint16_t)regs->ss;
    if (xstate_used) {
        struct _fpx_sw_bytes sw;
        uint32_t magic2 = FP_XSTATE_MAGIC2;
        char *fp = (char *)out + head;
        memcpy(fp, xstate, xstate_used);
        memset(&sw, 0, sizeof(sw));
        sw.magic1 = FP_XSTATE_MAGIC1;
        sw.extended_size = (uint32_t)(xstate_used + FP_XSTATE_MAGIC2_SIZE);
        sw.xstate_size = (uint32_t)xstate_used;
        memcpy(&sw.xfeatures, fp + 512, sizeof(sw.xfeatures));
        sw.xfeatures |= 3;              // x87 and SSE are always there
        memcpy(fp + offsetof(struct _fpstate_64, sw_reserved), &sw, sizeof(sw));
        memcpy(fp + xstate_used, &magic2, sizeof(magic2));
        sc->fpstate = (void *)(uintptr_t)(address + head);
    }
    memcpy(out, &frame, sizeof(frame));
    return snap_frame_size(xstate_used);
}
