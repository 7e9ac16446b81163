"""Formats commands, times and sizes for a terminal. Does not import PyTorch."""

import shlex

WIDTH = 80  # columns of a terminal


def typed(command: list[str]) -> str:
    """A command to paste into a shell, wrapped to the terminal's width; a flag and its values share a line."""
    groups = []
    for part in command:
        if part.startswith("--") or not groups:
            groups.append(shlex.quote(part))
        else:
            groups[-1] += " " + shlex.quote(part)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + 1 + len(group) > WIDTH - 4:  # room for the prompt and the backslash
            lines.append("    " + group)
        else:
            lines[-1] += " " + group
    return " \\\n".join(lines)


def duration(seconds: float) -> str:
    """Formats seconds as "3.2 s", "4 min 05 s" or "1 h 02 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def gigabytes(size: float) -> str:
    """Formats a size in GB as "1.2 GB", or below 0.1 GB as "40 MB"."""
    return f"{size:.1f} GB" if size >= 0.1 else f"{1000 * size:.0f} MB"


def markdown(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))
