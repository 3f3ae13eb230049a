"""Tools that work on the kernels: `compile` ahead of time for other cards, `tune` tile sizes on the card at hand."""
