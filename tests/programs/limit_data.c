// snap-test: refused of data size left
/* A limit of private writable memory (ulimit -d) that leaves no room for anything more: said before the job is touched. */
#include "selfcheck.h"
#include <sys/resource.h>

int main(int argc, char **argv)
{
    char line[256];
    unsigned long size_kib = 0;
    check_init(argc, argv);
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && fgets(line, sizeof(line), status) != NULL)
        if (sscanf(line, "VmData: %lu", &size_kib) == 1)
            break;
    if (status == NULL || size_kib == 0)
        check_die("VmData");
    fclose(status);
    struct rlimit limit = {(size_kib + 600) * 1024, RLIM_INFINITY}, now;
    MUST(setrlimit(RLIMIT_DATA, &limit));
    check_ready();
    check_wait();
    MUST(getrlimit(RLIMIT_DATA, &now));
    CHECK(now.rlim_cur == limit.rlim_cur, "the limit is %lu", (unsigned long)now.rlim_cur);
    return check_done();
}
