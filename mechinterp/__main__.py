"""`python -m mechinterp` is `mechinterp`."""

from mechinterp.cli import main

if __name__ == "__main__":
    main()
