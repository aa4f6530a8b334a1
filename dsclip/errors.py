"""The exceptions a user is meant to see: a sentence, no stack trace, and an exit code."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input. The message says what was found, where, and what to do about it."""

    exit_code = 2


class NoSuchSplit(UserError):
    """A split of an evaluation set that isn't there. splits: those that are, none where the set isn't split."""

    def __init__(self, message: str, splits: Sequence[str] = ()):
        super().__init__(message)
        self.splits = tuple(splits)


class RunFailed(UserError):
    """A run that came to nothing although its input was accepted; also a sentence, but exit code 1."""

    exit_code = 1


class RunDiverged(RunFailed):
    """A run whose steps are skipped because their numbers are not finite, or whose loss keeps jumping: starting it again would not mend it."""

    exit_code = 3


class RunStopped(UserError):
    """A run that was asked to stop, saved, and can go on where it was: EX_TEMPFAIL of sysexits.h, "try again"."""

    exit_code = 75


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint such as ' Did you mean `lr`?', or an empty string when nothing is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""
