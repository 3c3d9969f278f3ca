"""`python -m ggez_merge` is `ggez-merge`."""

from ggez_merge.cli import main

main()
