"""The tests, which mirror the tree; what several of them share is in `tests.helpers`."""
