"""Models: families, megatron-core construction, attention, heads, and the engine that runs them."""
