"""A program that says what it was given."""

import sys


def main() -> int:
    print(sys.argv[1:])
    return 7
