"""Training checkpoints: everything that a run needs to go on as if it had never stopped.

`folder` is what lies on the disk: names, manifest, hashes, publication, retention. `state` is what goes into it:
megatron's sharded state, random generators, the loop's own parts. `writer` writes it beside the training. `Checkpoints`
in `checkpoints` is what a loop uses.
"""
