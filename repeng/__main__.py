"""Entry point of `python -m repeng`."""

from repeng.cli import main

main()
