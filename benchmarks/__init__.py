"""Measurements, and what was measured."""
