"""The tests; start with test_engine.py."""
