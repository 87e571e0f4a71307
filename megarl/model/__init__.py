"""Models: families, megatron-core construction, attention, heads, and the engine that runs them."""

from megarl.parallel.quiet import quiet_megatron

quiet_megatron()  # before any module here imports megatron-core
