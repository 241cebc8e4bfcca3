"""`python -m streammerge` is the command `streammerge`."""

from streammerge.cli import main

if __name__ == "__main__":
    main()
