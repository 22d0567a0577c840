"""``python -m telerag_cli``."""

from telerag_cli.cli.app import main

main()
