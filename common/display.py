"""How a command, a time and a size are shown in a terminal; without PyTorch."""

import shlex

WIDTH = 80  # columns of a terminal


def typed(command: list[str]) -> str:
    """A command as it can be pasted into a shell, in lines that fit a terminal; a flag stays with its values."""
    groups = []
    for part in command:
        if part.startswith("--") or not groups:
            groups.append(shlex.quote(part))
        else:
            groups[-1] += " " + shlex.quote(part)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + 1 + len(group) > WIDTH - 4:  # the prompt before, the backslash behind
            lines.append("    " + group)
        else:
            lines[-1] += " " + group
    return " \\\n".join(lines)


def duration(seconds: float) -> str:
    """ "3.2 s", "4 min 05 s", "1 h 02 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def gigabytes(size: float) -> str:
    """ "1.2 GB"; below a tenth "40 MB"."""
    return f"{size:.1f} GB" if size >= 0.1 else f"{1000 * size:.0f} MB"


def markdown(head: list[str], rows: list[list]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))
