"""`python -m pinaivu_box` and the entry point of the executable."""

from pinaivu_box.cli.main import main

if __name__ == "__main__":
    main()
