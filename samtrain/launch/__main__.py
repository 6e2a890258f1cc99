"""`python -m samtrain.launch RECIPE [key=value ...]`."""

if __name__ == "__main__":
    import sys

    from samtrain.launch.cli import main

    sys.exit(main())
