"""Measurements, side by side with what one would use otherwise; run by hand, never as tests."""
