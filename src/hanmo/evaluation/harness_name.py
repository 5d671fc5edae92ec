"""The name under which the lm-evaluation-harness knows Hanmo's models, told to it where it does not ask.

Its releases up to 0.4.13 read no entry points (those that follow do). There, ``hanmo_lm_eval.pth``, which is installed
beside this package, imports this module in processes of the command ``lm_eval``, and in no others.
"""

from __future__ import annotations

NAME = "hanmo"
TARGET = "hanmo.evaluation.harness:HanmoLM"


def register() -> None:
    """Tell the harness the name; the class is imported when somebody asks for it.

    Does nothing where there is no harness, and where it knows the name already.
    """
    try:
        import lm_eval.models  # noqa: F401 - the harness adds its own models only to a registry that is empty
        from lm_eval.api.registry import model_registry
    except ImportError:
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
