/* The bystander: a process with given ids and no rights at all, that anybody with these ids may look at.
 *
 * A task of a job that cannot look at it although its ids are the same is confined by a Landlock domain
 * (checkpoint/resources/landlock.py). Called with two numbers, user and group. Says 'k' on stdout when it has become what it is
 * to be, and ends when its stdin does. It drops its rights after the exec, so that its file need not be open to that user. */

#include "freestanding.h"

#define PR_SET_DUMPABLE 4
#define CAPABILITY_VERSION_3 0x20080522

static long number(const char *text)
{
	long value = 0;

	while (*text >= '0' && *text <= '9')
		value = value * 10 + (*text++ - '0');
	return value;
}

__attribute__((used)) _Noreturn void bystander_main(long *stack)
{
	char **argv = (char **)(stack + 1);
	unsigned int header[2] = {CAPABILITY_VERSION_3, 0};
	unsigned int none[6] = {0, 0, 0, 0, 0, 0};
	char byte = 'k';
	long uid, gid;

	if (stack[0] < 3)
		leave(2);
	uid = number(argv[1]);
	gid = number(argv[2]);
	call3(SYS_SETGROUPS, 0, 0, 0); /* groups play no part in who may look at whom */
	if (call3(SYS_SETRESGID, gid, gid, gid) < 0 || call3(SYS_SETRESUID, uid, uid, uid) < 0 ||
	    call3(SYS_CAPSET, (long)header, (long)none, 0) < 0)
		leave(1);
	/* A change of ids ends it (commit_creds in the kernel's cred.c). */
	if (call4(SYS_PRCTL, PR_SET_DUMPABLE, 1, 0, 0) < 0)
		leave(1);
	call3(SYS_WRITE, 1, (long)&byte, 1);
	for (;;) {
		long got = call3(SYS_READ, 0, (long)&byte, 1);

		if (got == 0 || (got < 0 && got != EINTR_RESULT))
			leave(0);
	}
}

START_WITH(bystander_main)
