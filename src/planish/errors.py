"""What can go wrong, in two kinds: the user's input (exit 2) and ours (exit 1)."""


class PlanishError(Exception):
    """Something in planish failed; the command line exits with 1."""


class InputError(PlanishError):
    """The user's input is wrong; the command line prints the message alone and exits with 2.

    Message: what failed · where · got against expected · next step.
    """
