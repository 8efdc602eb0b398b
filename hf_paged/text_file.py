"""Files that users name: text, or an error that says which file is wrong, and how."""

from __future__ import annotations

from pathlib import Path


def read_text(file: Path, what: str) -> str:
    """A file's text.

    Args:
        what: it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is no UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no {what} {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: byte {error.start} is not") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
