"""``megarl verify``: a recipe's own model family and layout, made small, against one rank and against transformers and
vLLM."""
