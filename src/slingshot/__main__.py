"""`python -m slingshot` is the `slingshot` command."""

import sys


def main() -> None:
    """The command; Ctrl-C while it is still being imported ends it as quietly as later."""
    try:
        from slingshot.cli.main import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
