"""`python -m vfu_server`, the same as `vfu-server`. It must not know more than that."""

from vfu_server.cli import main

if __name__ == "__main__":
    main()
