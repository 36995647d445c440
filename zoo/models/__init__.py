"""Models: one backbone, heads by task, states inside transformers' caches."""
