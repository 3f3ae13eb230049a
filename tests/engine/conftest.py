"""Ranks that the tests of a file share: started once per number."""

import pytest

from moelab.engine.testing import Ranks


@pytest.fixture(scope="module")
def on_ranks():
    """`on_ranks(size, function, *args)`: results of all ranks; see `moelab.engine.testing.Ranks.run`.

    Not for the whole session: the threads of gloo's groups look around a hundred times a second, so ranks with many
    groups keep a core busy while they wait.
    """
    pools: dict[int, Ranks] = {}

    def run(size, function, *args, timeout_s=300.0):
        return pools.setdefault(size, Ranks(size)).run(function, *args, timeout_s=timeout_s)

    yield run
    for pool in pools.values():
        pool.close()
