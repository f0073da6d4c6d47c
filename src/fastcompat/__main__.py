"""`python -m fastcompat`."""

from fastcompat.cli.application import main

if __name__ == "__main__":
    main()
