// Stays in a restartable sequence: every preemption aborts it and it begins again. Says where the section is on stdout:
// first, end, abort (hex).
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/rseq.h>

extern const char section_first[], section_end[], section_abort[];

int main(void)
{
    if (__rseq_size == 0)
        return 2; // the C library did not register one
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    printf("%lx %lx %lx\n", (long)section_first, (long)section_end, (long)section_abort);
    fflush(stdout);
    __asm__ volatile(".pushsection .data.rel.ro, \"aw\"\n"
                     ".balign 32\n"
                     "section_descriptor: .long 0, 0\n"
                     ".quad section_first, section_end - section_first, section_abort\n"
                     ".popsection\n"
                     "1: leaq section_descriptor(%%rip), %%rax\n"
                     "movq %%rax, 8(%[area])\n"
                     ".globl section_first, section_end, section_abort\n"
                     "section_first: incq %%rcx\n"
                     "jmp section_first\n"
                     "section_end: ud2\n"
                     ".long 0x53053053\n" // RSEQ_SIG, in front of every abort handler
                     "section_abort: jmp 1b\n"
                     :
                     : [area] "r"(area)
                     : "rax", "rcx", "memory");
    return 0;
}
