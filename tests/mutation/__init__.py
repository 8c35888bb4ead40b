"""Mutation testing of the package: ``python -m tests.mutation.run --help``. Run by hand; pytest collects nothing here."""
