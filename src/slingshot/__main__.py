"""`python -m slingshot` is the `slingshot` command."""

from slingshot.cli import main

if __name__ == "__main__":
    main()
