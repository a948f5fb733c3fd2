"""`python -m flexgen_lite` is `flexgen-lite`."""

from flexgen_lite.cli.main import main

if __name__ == "__main__":
    main()
