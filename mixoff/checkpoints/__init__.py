"""Files of models as others publish them: which files are a model, their layouts, the Hub, shards one at a time."""
