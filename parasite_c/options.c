// Many options of one socket in one go: in the frozen window a socket costs what asking for them costs.
#include <stdint.h>
#include <sys/socket.h>
#include "native.h"
#include "options_cdef.h"

// names: nr pairs of level and option. values: SNAP_OPTION_BYTES each; lengths[i] is how much of it there is, or -1 where
// this socket has no such option.
void snap_get_options(int fd, const int32_t *names, size_t nr, char *values, int32_t *lengths)
{
    for (size_t i = 0; i < nr; i++) {
        socklen_t length = SNAP_OPTION_BYTES;
        int got = getsockopt(fd, names[2 * i], names[2 * i + 1], values + i * SNAP_OPTION_BYTES, &length);
        lengths[i] = got < 0 ? -1 : (int32_t)length;
    }
}
