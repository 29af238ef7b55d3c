"""Spark stages and the command line."""
