"""`python -m cnpp_trt` is `cnpp-trt`."""

from .cli import main

if __name__ == "__main__":
    main()
