/* The command `snap`: starts Python isolated, with an environment that cannot lead or break it.
 *
 * Whatever a user's environment and current directory hold (PYTHONPATH, PYTHONHOME, LD_PRELOAD, a folder called
 * `store`) must not run in a tool of root's. `python -I` ignores PYTHON* and the current directory, but a `#!` line
 * cannot say -I: pip writes it anew, without options. A shell script could, but shells have such variables of their
 * own (ENV, SHELLOPTS, exported functions). So it is this, without a libc that would obey LD_*:
 *
 *   DIR/snap ARGS..   ->   DIR/PYTHON -I -c "from snapshotter.start import main; main()" ARGS..
 *
 * DIR is where the file lies (/proc/self/exe: symbolic links are followed). Where DIR has no PYTHON (pip install --user
 * or --prefix, or as root of a system's Python), it is the system's; it is never looked for in PATH. Isolated Python
 * does not look into DIR/../lib/PYTHON/site-packages either: if snap lies there, its start.py is named by path. */

#include <linux/resource.h>

#include "freestanding.h"

#define SYS_ACCESS 21
#define SYS_EXECVE 59
#define SYS_READLINK 89
#define SYS_GETRLIMIT 97
#define STDERR 2
#define X_OK 1
#define R_OK 4
#define MAX_PATH 4096
#define MAX_WORDS 65536
#define LEAST_MEMORY (64UL << 20) /* Python alone dies of less, with a traceback of its own */

#ifndef PYTHON
#error "PYTHON is the interpreter's file name, as python3.11"
#endif

static char directory[MAX_PATH], beside[2 * MAX_PATH], script[2 * MAX_PATH];
static char *words[MAX_WORDS];

/* What the loader, the C library, Python or a library that snap loads would obey: beginnings of names. */
static const char *const unwanted[] = {
	"LD_",	    "PYTHON",	"GLIBC_TUNABLES=", "GCONV_PATH=", "LOCPATH=", "NLSPATH=", "MALLOC_",
	"OPENSSL_", "OPENBLAS", "NPY_",		   "NUMPY_",	  "OMP_",     "GOTO_",	  "PROTOCOL_BUFFERS_",
};

static unsigned long length(const char *text)
{
	unsigned long size = 0;

	while (text[size])
		size++;
	return size;
}

static int begins(const char *text, const char *with)
{
	while (*with)
		if (*text++ != *with++)
			return 0;
	return 1;
}

static void join(char *into, const char *one, const char *two)
{
	while (*one)
		*into++ = *one++;
	while (*two)
		*into++ = *two++;
	*into = 0;
}

static _Noreturn void fail(const char *why)
{
	call3(SYS_WRITE, STDERR, (long)why, (long)length(why));
	leave(1);
}

static int is_wanted(const char *variable)
{
	for (unsigned int i = 0; i < sizeof(unwanted) / sizeof(*unwanted); i++)
		if (begins(variable, unwanted[i]))
			return 0;
	return 1;
}

/* Drops unwanted variables, in place. */
static void clean(char **environment)
{
	char **to = environment;

	for (; *environment; environment++)
		if (is_wanted(*environment))
			*to++ = *environment;
	*to = 0;
}

static const char *find_python(void)
{
	static const char *const systems[] = {"/usr/bin/" PYTHON, "/usr/local/bin/" PYTHON};

	join(beside, directory, "/" PYTHON);
	if (call3(SYS_ACCESS, (long)beside, X_OK, 0) == 0)
		return beside;
	for (unsigned int i = 0; i < sizeof(systems) / sizeof(*systems); i++)
		if (call3(SYS_ACCESS, (long)systems[i], X_OK, 0) == 0)
			return systems[i];
	fail("snap: there is no " PYTHON " beside this command, for which it was installed\n"
	     "hint: install snap again, with the Python that is to run it\n");
}

__attribute__((used)) _Noreturn void launcher_main(long *stack)
{
	long argc = stack[0];
	char **argv = (char **)(stack + 1);
	char **environment = argv + argc + 1;
	struct rlimit64 memory;
	const char *python;
	long size, at = 0;

	size = call3(SYS_READLINK, (long)"/proc/self/exe", (long)directory, MAX_PATH - 1);
	while (size > 0 && directory[size - 1] != '/')
		size--;
	if (size <= 0)
		fail("snap: cannot read /proc/self/exe\nhint: mount proc on /proc\n");
	directory[size - 1] = 0;
	if (argc > MAX_WORDS - 8)
		fail("snap: too many words on the command line\n");
	if (call3(SYS_GETRLIMIT, RLIMIT_AS, (long)&memory, 0) == 0 && memory.rlim_cur < LEAST_MEMORY)
		fail("snap: out of memory: `ulimit -v` allows less than Python needs to start\nhint: raise it\n");
	clean(environment);
	python = find_python();
	words[at++] = (char *)python;
	words[at++] = "-I";
	join(script, directory, "/../lib/" PYTHON "/site-packages/snapshotter/start.py");
	if (python != beside && call3(SYS_ACCESS, (long)script, R_OK, 0) == 0) {
		words[at++] = script;
	} else {
		words[at++] = "-c";
		words[at++] = "from snapshotter.start import main; main()";
	}
	for (long i = 1; i < argc; i++)
		words[at++] = argv[i];
	call3(SYS_EXECVE, (long)python, (long)words, (long)environment);
	fail("snap: cannot start " PYTHON "\nhint: install snap again, with the Python that is to run it\n");
}

START_WITH(launcher_main)
