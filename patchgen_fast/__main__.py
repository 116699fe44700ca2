"""`python -m patchgen_fast` is the `patchgen-fast` command."""

from patchgen_fast.cli import main

if __name__ == "__main__":
    main()
