"""Checkpoints: a directory per step, written by all ranks in the background, complete or not at all, loaded into any
layout.

    saving     `Writer`: copies this rank's shards and writes them in a thread
    loading    `latest`, `load`, `load_model`: find the newest complete checkpoint, read what a layout needs of it
    shards     which shards of which tensors a rank has
    format     the files of a checkpoint: names, index, SHA-256
    storage    writing these files together with the other ranks, and reading parts of them
    hf         models as directories of Hugging Face's formats

Names and shapes in a checkpoint are those of the model on one rank: experts by global id, query, key and value in one
weight. So what was saved at one layout loads at any other, bit for bit, and one process can read a checkpoint of many.
Nothing in it is a pickle: loading executes no code. Every file's SHA-256 is checked before use; a broken checkpoint is
named and the one before it used, the same one by all ranks. All ranks see the same file system.

    with checkpoint.Writer(directory) as checkpoints:          # every rank
        last = checkpoint.latest(directory)                    # every rank
        checkpoint.load(last, model, optimizer, placements)
        ...
        checkpoints.save(step, model, optimizer, state, placements)
"""

from moelab.engine.checkpoint.format import CheckpointError
from moelab.engine.checkpoint.loading import Checkpoint, latest, load, load_model
from moelab.engine.checkpoint.saving import Writer

__all__ = ["Checkpoint", "CheckpointError", "Writer", "latest", "load", "load_model"]
