"""`python -m jaxprune`: see `jaxprune.command`."""

from jaxprune.command import main

if __name__ == "__main__":
    main()
