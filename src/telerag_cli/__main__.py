"""``python -m telerag_cli``."""

from telerag_cli.app import main

main()
