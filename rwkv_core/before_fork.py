"""Imported by the server that forks the processes of a pool, before there is one: loads what all of them share.

`processes.pool` names it, and says in the environment what to load: a fork server takes nothing but names of modules. So this
module alone works at import, and only where that variable is set.
"""

import contextlib
import os
import pickle

from rwkv_core.processes import READY

ready = os.environ.pop(READY, None)
if ready is not None:
    with contextlib.suppress(Exception):  # the processes meet it again, where somebody is told
        pickle.loads(bytes.fromhex(ready))()
