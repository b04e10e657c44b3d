"""``python -m sinklens``: the same as ``sinklens``."""

from sinklens.cli import main

if __name__ == "__main__":
    main()
