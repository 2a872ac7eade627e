"""``python -m ppnet``: the command line (`ppnet.cli`)."""

from ppnet.cli import main

main()
