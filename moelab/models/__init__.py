"""The decoder and its MoE layer: gpt.py, moe.py and routing.py, each readable top-down."""
