"""Rollouts: prompts in, sampled tokens with their log-probs out. The only folder that imports vLLM."""
