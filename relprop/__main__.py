"""`python -m relprop` is the command `relprop`."""
from .cli import main

if __name__ == "__main__":
    main()
