"""Faults put into every step that writes: run.py tries them, test_faults.py runs a sample in the test suite."""
