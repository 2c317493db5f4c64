"""Shared code of the recipe: one module a concern, imports pointing one way."""
