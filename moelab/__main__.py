"""The command `moelab`, also as `python -m moelab`.

An interrupt ends it without a traceback, while the commands are imported, too.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from moelab.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
