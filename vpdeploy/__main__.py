"""``python -m vpdeploy``: the command line without an installed script."""

from vpdeploy.cli import main

main()
