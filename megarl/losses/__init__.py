"""Losses: pure functions ``(logps [T], batch, cfg) -> (loss [T], metrics {name: [T]})``.

``logps`` are of whole sequences laid end to end. A loss neither reduces nor communicates: `megarl.model.engine` weighs,
sums and divides. Metrics are averaged over response tokens.
"""
