"""``python -m fdu`` is the command ``fdu``."""

import sys

from fdu.cli import main

sys.exit(main())
