"""A grid as Markdown and as LaTeX. HTML is made by the page's template."""

from __future__ import annotations

import re

from megatron_dypo.study.grids import Entry, Grid

_LATEX_SPECIAL = re.compile(r"([&%$#_{}])")
_LATEX_WORDS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "▲": r"$\uparrow$",
    "▼": r"$\downarrow$",
    "≈": r"$\approx$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
}


def to_markdown(grid: Grid) -> str:
    """Return the grid as a Markdown table with its notes as a list."""
    lines = [_markdown_row([_markdown(word) for word in grid.header])]
    lines.append(_markdown_row(["---", *["---:"] * (len(grid.header) - 1)]))
    lines += [_markdown_row([_markdown_entry(entry) for entry in row]) for row in grid.rows]
    notes = [f"- {_markdown(note)}" for note in grid.notes]
    return "\n".join([f"### {_markdown(grid.name)}", "", *lines, "", *notes, ""])


def to_latex(grid: Grid) -> str:
    r"""Return the grid as a LaTeX table (packages booktabs and graphicx); the notes follow in ``\footnotesize``."""
    columns = "l" + "r" * (len(grid.header) - 1)
    rows = [" & ".join(_latex_entry(entry) for entry in row) + r" \\" for row in grid.rows]
    notes = r" \\ ".join(_latex(note) for note in grid.notes)
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(_latex(word) for word in grid.header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\par\footnotesize {notes}",
            rf"\caption{{{_latex(grid.name)}}}",
            r"\end{table}",
            "",
        ]
    )


def _markdown_row(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def _markdown_entry(entry: Entry) -> str:
    text = f"**{_markdown(entry.text)}**" if entry.is_bold else _markdown(entry.text)
    return " ".join(part for part in (text, entry.small, entry.mark) if part)


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", " ".join(text.split()))


def _latex_entry(entry: Entry) -> str:
    text = rf"\textbf{{{_latex(entry.text)}}}" if entry.is_bold else _latex(entry.text)
    small = rf"{{\scriptsize {_latex(entry.small)}}}" if entry.small else ""
    return " ".join(part for part in (text, small, _latex(entry.mark)) if part)


def _latex(text: str) -> str:
    return "".join(_LATEX_WORDS.get(letter) or _LATEX_SPECIAL.sub(r"\\\1", letter) for letter in text)
