"""``python -m hanmo`` is the command ``hanmo``."""

import os
import sys
from pathlib import Path

from hanmo.cli.main import main
from hanmo.training.launch import is_follower, leave

if is_follower():  # the result, or the error as JSON, is printed once also where torchrun shows what all processes say
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the program ends

leave(main())
