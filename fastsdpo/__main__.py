"""``python -m fastsdpo``: the same as the command ``fastsdpo``."""

import sys

from fastsdpo.cli import main

sys.exit(main())
