"""Which processes of a session are there."""

import os

import psutil


def any_in_session(session: int) -> bool:
    """Whether a process of it lives."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False
