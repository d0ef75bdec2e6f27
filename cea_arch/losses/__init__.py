"""Losses for option files."""
