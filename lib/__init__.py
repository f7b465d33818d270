"""Learning Under Constraints: one module a paper, one folder a chapter. Importing this package costs nothing."""
