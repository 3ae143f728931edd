"""`python -m ulfine_fast` is `ulfine-fast`."""

from ulfine_fast.cli import main

if __name__ == "__main__":
    main()
