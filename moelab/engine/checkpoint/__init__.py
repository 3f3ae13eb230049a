"""Checkpoints: one directory per step, complete or absent, that loads into any layout.

All ranks write it together, in the background.

    saving     `Writer`: copies this rank's shards and writes them in a thread
    loading    `latest`, `weights_of`, `load`, `load_model`: find a complete checkpoint, read what a layout needs
    upcycling  copies of a dense layer's feed-forward, or of fewer experts, as the experts of an MoE layer
    shards     which shards of which tensors a rank has
    format     the files of a checkpoint: names, index, SHA-256
    storage    writes these files together with the other ranks, and reads parts of them
    hf         models as directories of Hugging Face's formats

Names and shapes in a checkpoint are those of the model on one rank: experts by global id; query, key and value in one
weight. A checkpoint that one layout saved therefore loads into any other, bit for bit, and one process can read the
checkpoint of many. Of an optimizer the state of each parameter is saved, not its settings (`param_groups`, with the
learning rate). No file is a pickle: loading executes no code. Every file's SHA-256 is checked before use. A broken
checkpoint is reported and all ranks use the one before it. All ranks must see the same file system.

    with checkpoint.Writer(directory) as checkpoints:          # every rank
        if last := checkpoint.latest(directory):               # every rank
            checkpoint.load(last, model, optimizer, placements)
        ...
        checkpoints.save(step, model, optimizer, state, placements)
"""

from moelab.engine.checkpoint.format import CheckpointError
from moelab.engine.checkpoint.loading import Checkpoint, Refused, latest, load, load_model, weights_of, why_no_weights
from moelab.engine.checkpoint.saving import Writer
from moelab.engine.checkpoint.shards import finite

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Refused",
    "Writer",
    "finite",
    "latest",
    "load",
    "load_model",
    "weights_of",
    "why_no_weights",
]
