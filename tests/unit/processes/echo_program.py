"""A program that prints its arguments."""

import sys


def main() -> int:
    print(sys.argv[1:])
    return 7
