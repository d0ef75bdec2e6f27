"""Metrics, protocols of scoring, tables and pictures of results, published figures."""
