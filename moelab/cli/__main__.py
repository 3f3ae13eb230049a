"""`python -m moelab.cli`."""

from moelab.cli import main

main()
