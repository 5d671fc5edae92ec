"""``python -m hanmo`` is the command ``hanmo``."""

import sys

from hanmo.cli.main import main

sys.exit(main())
