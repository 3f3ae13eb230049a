"""How tokens travel to their experts. Follows; until then layouts with expert parallelism or slicing are refused."""


class Exchange:
    """See `moelab.engine.parallel`."""

    def __init__(self, groups, config) -> None:
        raise ValueError("parallel: expert parallelism is not there yet; allowed: expert = 1, expert_slicing = 1")
