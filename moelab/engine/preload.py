"""Import what every rank needs, once in the server that ranks are forked from (see `moelab.engine.testing`)."""

import atexit
import gc

import torch._dynamo  # noqa: F401

import moelab.engine.checkpoint
import moelab.engine.parallel
import moelab.models  # noqa: F401

# Collections in the ranks leave out what was imported here; the first one would copy all of it into each rank.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # else Triton's bindings complain on standard error of what is left
