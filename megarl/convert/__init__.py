"""Checkpoints on disk, Hugging Face's and megatron-core's: converted, compared and described without a GPU, without a
process group and without megatron-core, one tensor's chunk at a time."""
