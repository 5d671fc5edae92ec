"""``python -m hanmo`` is the command ``hanmo``."""

from hanmo.cli.main import main
from hanmo.training.launch import leave

leave(main())
