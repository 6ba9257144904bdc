"""What argparse lacks: booleans, numbers that may be none, defaults in help, checks of ranges."""

import argparse
import math


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless it is None, which the help itself explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser described by the first paragraph of a script's docstring, its epilog the third."""
    description, *rest = doc.strip().split("\n\n")
    return argparse.ArgumentParser(
        description=" ".join(description.split()),
        epilog=" ".join(rest[1].split()) if len(rest) > 1 else None,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def bool_flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def out_of_range(
    args: argparse.Namespace,
    not_negative: tuple[str, ...] = (),
    above_zero: tuple[str, ...] = (),
    fractions: tuple[str, ...] = (),
    at_least_one: tuple[str, ...] = (),
) -> str | None:
    """The first of the named flags that is out of its range, in one sentence. None passes."""
    ranges = (
        (not_negative, "must be 0 or more", lambda x: 0 <= x < math.inf),
        (above_zero, "must be above 0", lambda x: 0 < x < math.inf),
        (fractions, "must lie between 0 and 1", lambda x: 0 <= x <= 1),
        (at_least_one, "must be at least 1", lambda x: 1 <= x < math.inf),
    )
    for names, wanted, holds in ranges:
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                return f"--{name} {wanted}, not {value}"
    return None
