"""Checkpoints: save in one layout, load in any other, merge into one file.

A checkpoint is a folder ``step-00000100`` that appears under that name only when it is whole: it is written beside,
given its marker (``checkpoint.json``: the caller's small state, and the size and SHA-256 of every file), and renamed. A
run that dies while writing leaves the checkpoints before it as they were. What is read is checked against the marker.
"""

from .folders import MARKER as MARKER
from .folders import CheckpointError as CheckpointError
from .folders import all_checkpoints as all_checkpoints
from .folders import at_step as at_step
from .folders import latest as latest
from .folders import read_state as read_state
from .folders import set_later_aside as set_later_aside
from .folders import step_of as step_of
from .lock import Lock as Lock
from .lock import LockedError as LockedError
from .lock import holder_of as holder_of
from .merged import merge as merge
from .merged import read_merged as read_merged
from .merged import read_merged_state as read_merged_state
from .store import load as load
from .store import save as save
from .together import check_shared as check_shared
from .together import on_every_rank as on_every_rank
from .together import on_first_rank as on_first_rank
from .together import rank as rank
