"""`python -m decaf_hf` is the `decaf` command."""

import sys


def main() -> int:
    """Run the command; Ctrl-C is one line also while its first modules are imported."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        print("decaf: interrupted", file=sys.stderr, flush=True)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
