// The program that a restored process is born as: it waits to be driven. snap finds `syscall; ret`
// in it, runs the first calls there, and unmaps all of it before the job's memory comes.
    .globl _start
    .text
_start:
    mov $34, %eax            // pause
    syscall
    jmp _start
gadget:
    syscall
    ret
    .section .note.GNU-stack,"",@progbits
