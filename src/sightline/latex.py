r"""LaTeX. One table in the manner of booktabs, from plain text: `\usepackage{booktabs}` is all that it needs."""

from collections.abc import Iterable, Mapping, Sequence

WORDS: Mapping[str, str] = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "\N{UPWARDS ARROW}": r"$\uparrow$",
    "\N{DOWNWARDS ARROW}": r"$\downarrow$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{EN DASH}": "--",
}
"""How letters are written that LaTeX reads as something else, or that its oldest fonts lack."""


def escaped(text: str) -> str:
    """Return text as LaTeX prints it, on one line."""
    return "".join(WORDS.get(letter, letter) for letter in " ".join(text.split()))


def bold(text: str) -> str:
    """Return text that is escaped already in bold."""
    return f"\\textbf{{{text}}}"


def table(caption: str, head: Sequence[str], blocks: Iterable[Sequence[Sequence[str]]]) -> str:
    """Return a table: a caption and a head, which are escaped here, and rows of LaTeX, a rule between their blocks.

    The first column is set left, all others right.
    """
    rows = [[f"{' & '.join(row)} \\\\" for row in block] for block in blocks if block]
    body = [line for block in rows for line in (r"\midrule", *block)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escaped(caption)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            f"{' & '.join(map(escaped, head))} \\\\",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
