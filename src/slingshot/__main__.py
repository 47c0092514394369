"""`python -m slingshot` is the `slingshot` command."""

from slingshot.cli.main import main

if __name__ == "__main__":
    main()
