"""``python -m sinklens.cli``."""

from sinklens.cli import main

main()
