"""How the files of a checkpoint get to the disk: at once, or copied and written by a process in the background."""

from dsclip.saving.background import Background, available
from dsclip.saving.files import Files, Problem, WriteNow, Written

__all__ = ["Background", "Files", "Problem", "WriteNow", "Written", "available"]
