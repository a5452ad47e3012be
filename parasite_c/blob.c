// The parasite: an interpreter of system call batches. Freestanding, position independent, no data,
// no relocations, general registers only (so that the target's vector state is never touched).
//
// It is entered with rdi = batch, rsp = top of its own stack, all signals blocked. It runs the
// entries, then announces the end, where snap holds it. When it goes on from there, snap is dead: undo what the batch says, and leave through the fail-safe frames into the job.

#include <stddef.h>
#include <stdint.h>
#include "protocol.h"

_Static_assert(sizeof(struct snap_entry) == 80, "entries are packed without holes");
_Static_assert(sizeof(struct snap_batch) == 32, "the header is packed without holes");

#define NR_RT_SIGRETURN 15
#define NR_EXIT 60
#define NR_EXIT_GROUP 231
#define NR_TGKILL 234
#define IS_ERROR(r) ((uint64_t)(r) >= (uint64_t)-4095L)

__asm__(".section .text.start,\"ax\"\n"
        ".globl _start\n"
        "_start:\n"
        "  jmp 1f\n"
        "  .ascii \"snap-parasite\\1\"\n"
        ".org _start + 16\n"
        "1: xor %ebp, %ebp\n"
        "  xor %esi, %esi\n"
        "  xor %edx, %edx\n"
        "  and $-16, %rsp\n"
        "  call snap_run\n"
        "  ud2\n"
        ".text\n");

static inline int64_t call6(uint64_t nr, const uint64_t *a)
{
    register uint64_t r10 __asm__("r10") = a[3];
    register uint64_t r8 __asm__("r8") = a[4];
    register uint64_t r9 __asm__("r9") = a[5];
    int64_t result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(nr), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

// The child may come back on another stack, so everything it needs waits in callee-saved registers.
static int64_t clone_call(uint64_t nr, const uint64_t *a, struct snap_batch *batch, uint32_t child)
{
    register uint64_t r10 __asm__("r10") = a[3];
    register uint64_t r8 __asm__("r8") = a[4];
    register uint64_t r9 __asm__("r9") = a[5];
    register struct snap_batch *r12 __asm__("r12") = batch;
    register uint64_t r13 __asm__("r13") = child;
    int64_t result;
    __asm__ volatile("syscall\n"
                     "test %%rax, %%rax\n"
                     "jnz 1f\n"
                     "xor %%ebp, %%ebp\n"
                     "mov %%r12, %%rdi\n"
                     "mov %%r13d, %%esi\n"
                     "mov $1, %%edx\n"
                     "and $-16, %%rsp\n"
                     "call snap_run\n"
                     "ud2\n"
                     "1:\n"
                     : "=a"(result)
                     : "a"(nr), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9), "r"(r12),
                       "r"(r13)
                     : "rcx", "r11", "memory");
    return result;
}

static inline struct snap_entry *entries(struct snap_batch *batch)
{
    return (struct snap_entry *)(batch + 1);
}

// Fill a[] from the entry; 0 when an argument refers to a call that failed (undo must skip those).
static int resolve(struct snap_batch *batch, const struct snap_entry *e, uint64_t *a)
{
    int usable = 1;
    for (int k = 0; k < 6; k++) {
        uint64_t value = e->args[k];
        if (e->flags & (SNAP_E_REF << k)) {
            value = (uint64_t)entries(batch)[value].result;
            if (IS_ERROR(value) || value == (uint64_t)INT64_MIN)
                usable = 0;
        } else if (e->flags & (SNAP_E_LOAD << k)) {
            value = (uint64_t)(int64_t) * (const int32_t *)value;
        }
        a[k] = value;
    }
    return usable;
}

static int tolerated(const struct snap_entry *e, int64_t result)
{
    if (!IS_ERROR(result) || !(e->flags & SNAP_E_STOP))
        return 1;
    for (int k = 0; k < SNAP_MAX_OK; k++)
        if (e->ok[k] && e->ok[k] == -result)
            return 1;
    return 0;
}

static __attribute__((noreturn)) void leave(uint64_t sp)
{
    const uint64_t none[6] = {0};
    if (sp)
        // rt_sigreturn looks for its frame at rsp - 8, where the restorer's address would be
        __asm__ volatile("mov %0, %%rsp\n"
                         "mov %1, %%eax\n"
                         "syscall\n"
                         :
                         : "r"(sp + 8), "i"(NR_RT_SIGRETURN)
                         : "memory");
    for (;;)
        call6(NR_EXIT_GROUP, none);
}

__attribute__((noreturn, used, visibility("hidden"))) void snap_run(struct snap_batch *batch, uint32_t first,
                                                                  int child)
{
    const uint64_t none[6] = {0};
    uint64_t a[6];
    struct snap_entry *e;
    uint32_t i;

    for (i = first; i < batch->nr_entries; i++) {
        e = entries(batch) + i;
        if (!(e->flags & SNAP_E_UNDO)) {
            resolve(batch, e, a);
            if (e->flags & SNAP_E_CLONE)
                e->result = clone_call(e->nr, a, batch, e->child);
            else
                e->result = call6(e->nr, a);
            if (!tolerated(e, e->result))
                break;
        }
        if (e->flags & SNAP_E_END) {
            i = batch->nr_entries;
            break;
        }
    }
    if (child)
        for (;;)
            call6(NR_EXIT, none);
    batch->stopped_at = i;
    if (batch->flags & SNAP_B_SIGNAL) {
        // Traced: stops us before it is delivered. Untraced: the target ignores it, so it is never sent.
        a[0] = (uint64_t)batch->pid;
        a[1] = (uint64_t)batch->tid;
        a[2] = (uint64_t)batch->sig;
        call6(NR_TGKILL, a);
    } else if (!(batch->flags & SNAP_B_LEAVE)) {
        call6(SNAP_SENTINEL, none);
    }

    // Only reached when nobody traces us any more (or, with SNAP_B_LEAVE, to announce the end).
    if (!(batch->flags & SNAP_B_LEAVE))
        for (i = 0; i < batch->nr_entries; i++) {
            e = entries(batch) + i;
            if ((e->flags & SNAP_E_UNDO) && resolve(batch, e, a))
                call6(e->nr, a);
        }
    leave(batch->leave_sp);
}
