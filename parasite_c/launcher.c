/* The command `snap`: starts Python isolated, with an environment that cannot lead or break it.
 *
 * Whatever a user's environment and current directory hold (PYTHONPATH, __PYVENV_LAUNCHER__, LD_PRELOAD, a folder called
 * `store`) must not run in a tool of root's. So only the variables of a list are passed on. `python -I` ignores PYTHON* and the current directory, but a `#!` line
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

#define SYS_OPEN 2
#define SYS_ACCESS 21
#define SYS_EXECVE 59
#define SYS_FCNTL 72
#define SYS_READLINK 89
#define SYS_GETRLIMIT 97
#define STDERR 2
#define X_OK 1
#define R_OK 4
#define MAX_PATH 4096
#define MAX_WORDS 65536
#define MAX_VARIABLES 256
#define O_PATH_CLOEXEC (010000000 | 02000000)
#define F_DUPFD_CLOEXEC 1030
#define LEAST_FILES 16		      /* free descriptors; with fewer, Python ends with a traceback */
#define LEAST_MEMORY (64UL << 20) /* Python alone dies of less, with a traceback of its own */

#ifndef PYTHON
#error "PYTHON is the interpreter's file name, as python3.11"
#endif

static char directory[MAX_PATH], beside[2 * MAX_PATH], script[2 * MAX_PATH];
static char *words[MAX_WORDS];
static char *passed[MAX_VARIABLES + 2]; /* PATH and the end */
static char path_variable[] = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

/* The variables that snap reads, and the libraries that it prints with. A name that ends in `_` is a beginning of names.
 * Anything else is dropped: the loader, the C library, Python, OpenSSL, OpenBLAS and protobuf obey more variables than one
 * can list. PATH is a fixed one. */
static const char *const wanted[] = {
	"SNAP_",
	"HOME=",
	"XDG_CONFIG_HOME=",
	"XDG_DATA_HOME=",
	"XDG_RUNTIME_DIR=",
	"LANG=",
	"LC_",
	"TZ=", /* but see is_wanted */
	"TERM=",
	"COLUMNS=",
	"LINES=",
	"NO_COLOR=",
	/* click's completion in shells */
	"_SNAP_COMPLETE=",
	"COMP_WORDS=",
	"COMP_CWORD=",
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
	/* tzset(3): a time zone may be any file. Only a name below the system's own directory is passed on. */
	if (begins(variable, "TZ=")) {
		if (variable[3] == ':' || variable[3] == '/')
			return 0;
		for (const char *at = variable; *at; at++)
			if (begins(at, ".."))
				return 0;
	}
	for (unsigned int i = 0; i < sizeof(wanted) / sizeof(*wanted); i++)
		if (begins(variable, wanted[i]))
			return 1;
	return 0;
}

/* Fills `passed` with the wanted variables. */
static void choose(char **environment)
{
	long at = 0;

	passed[at++] = path_variable;
	for (; *environment; environment++) {
		if (!is_wanted(*environment))
			continue;
		if (at > MAX_VARIABLES)
			fail("snap: too many variables in the environment\nhint: unset those that begin with SNAP_ or LC_\n");
		passed[at++] = *environment;
	}
	passed[at] = 0;
}

/* Fails if this process may not open a few files more. Those opened here are closed by execve. */
static void require_files(void)
{
	long first = call3(SYS_OPEN, (long)"/", O_PATH_CLOEXEC, 0), last = first;

	for (int i = 1; i < LEAST_FILES && last >= 0; i++)
		last = call3(SYS_FCNTL, first, F_DUPFD_CLOEXEC, 0);
	if (last < 0)
		fail("snap: too many open files: `ulimit -n` leaves less than Python needs to start\n"
		     "hint: raise it: ulimit -n 1024\n");
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
	require_files();
	choose(environment);
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
	call3(SYS_EXECVE, (long)python, (long)words, (long)passed);
	fail("snap: cannot start " PYTHON "\nhint: install snap again, with the Python that is to run it\n");
}

START_WITH(launcher_main)
