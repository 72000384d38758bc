"""Tests of the kernels, one file a stage; `support` holds what they share."""
