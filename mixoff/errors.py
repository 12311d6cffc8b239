"""The errors a user can cause, each a sentence that names the cause and the way out.

The command line turns every `MixoffError` into that one line and exit code 2; anything else is a bug of ours.
"""


class MixoffError(ValueError):
    """Base of all errors that are about what was asked for rather than about mixoff."""


class CheckpointError(MixoffError):
    """A model folder that is missing, damaged, unsafe or not a Mixture-of-Experts checkpoint."""


class BudgetError(MixoffError):
    """A memory budget that is malformed or too small to run at all."""
