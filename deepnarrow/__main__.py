"""The `deepnarrow` command, also as ``python -m deepnarrow``."""

import sys


def main() -> int:
    """Run the command; returns its exit code."""
    from launch.cli import main as run  # ours, since the package has been imported

    return run()


if __name__ == "__main__":
    sys.exit(main())
