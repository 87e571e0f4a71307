"""Losses: pure functions ``(logps [T], batch, cfg) -> (loss [T], metrics {name: [T]})``.

``logps`` are of whole sequences laid end to end. A loss neither reduces nor communicates: `megarl.model.engine` weighs,
sums and divides. Metrics are averaged over response tokens.

A loss of whole responses or pairs (``gspo``, ``preference_tokens``, ``unpaired_tokens``) gives each of their tokens the
whole's loss, and wants ``loss_agg_mode=seq-mean-token-mean``: the engine's mean over sequences is then theirs.
"""
