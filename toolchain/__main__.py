"""``python -m toolchain`` is the ``toolchain`` command."""

from toolchain.cli import main

if __name__ == "__main__":
    main()
