"""The tiny study: every objective on tasks that two cores can train, fixed in advance in ``study.yaml``."""
