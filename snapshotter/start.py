"""Where the command begins: imports the command line, and says it in a sentence when there is not even memory for that.

parasite_c/launcher.c starts it, with Python isolated from what a user's environment and current directory hold.
"""

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The `snap` command."""
    try:
        from snapshotter.cli.main import main as command
    except (MemoryError, ImportError) as error:
        # Too little memory for a library is an ImportError ("failed to map segment from shared object").
        what = "out of memory" if isinstance(error, MemoryError) else ascii(str(error))
        sys.stderr.write(f"snap: cannot start: {what}\n")
        sys.stderr.write(
            "hint: look at `ulimit -v` and the free memory; if there is enough, install snap again\n"
        )
        os._exit(1)
    command()


if __name__ == "__main__":
    # By path: isolated Python does not look where `pip install --user` and `--prefix` put it.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main()
