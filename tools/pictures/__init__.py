"""The pictures of README and docs, drawn from their sources in docs/pictures/."""
