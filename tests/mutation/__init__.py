"""Mutation testing of the package: ``python -m tests.mutation.run --help``. Run by hand, not by pytest."""
