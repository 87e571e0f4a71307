"""What an environment measured: the number that it (or the record) has under `field`, times `scale`.

A sample without it, such as an episode that ended too early to be measured, gets `default`; if that is null it is an
error.
"""


def measure_reward(
    completions: list[str], *, field: str = "success", scale: float = 1.0, default: float | None = None, **columns: list
) -> list[float]:
    """One number a sample."""
    found = columns.get(field, [None] * len(completions))
    if default is None and None in found:
        raise ValueError(f"no {field!r} (field) was measured; there are {', '.join(columns)}")
    return [scale * (default if value is None else value) for value in found]
