"""Process groups, collectives and the device: all that knows about more than one rank."""

from megarl.parallel.quiet import quiet_megatron

quiet_megatron()  # before any module here imports megatron-core
