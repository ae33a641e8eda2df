"""`python -m ldm` is the `ldm` command."""

from ldm.cli import main

main()
