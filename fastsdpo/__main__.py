"""``python -m fastsdpo``: the same as the command ``fastsdpo``."""

import sys

from fastsdpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
