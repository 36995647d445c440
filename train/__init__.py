"""Training: recipes, data, stages, one loop, exact checkpoints, scores. Installed as `zoo.train`."""
