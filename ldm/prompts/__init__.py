"""Prompts as text: the language of weights and schedules, wildcards. Knows no model and imports no torch."""
