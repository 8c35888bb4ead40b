"""YAML files, overrides and the command line read into the config."""
