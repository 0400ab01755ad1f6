"""`python -m decaf_hf` is the `decaf` command."""

import os
import sys


def main() -> int:
    """Run the command; Ctrl-C is one line also while its first modules are imported."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        print("decaf: interrupted", file=sys.stderr, flush=True)
        return 130
    code = command()
    if code == 130:  # all is said and flushed; threads of libraries may keep an interrupted interpreter from ending
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
