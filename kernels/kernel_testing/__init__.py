"""Helpers of the kernels' tests and benchmarks. They need torch alone, and go with a kernel that is published."""
