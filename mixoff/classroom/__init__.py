"""What only a notebook needs: one-call setup, figures with captions, and checks of exercises that never raise.

`import mixoff` does not load this.
"""

from mixoff.classroom import checks as check
from mixoff.classroom import plots
from mixoff.classroom.plots import show
from mixoff.classroom.setup import setup

__all__ = ["check", "plots", "setup", "show"]
