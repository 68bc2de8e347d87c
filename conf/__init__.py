"""Hydra configuration: YAML groups, the schema that composes them, and what makes a configuration impossible."""
