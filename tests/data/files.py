"""Small trees of text files."""

from pathlib import Path


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files by their paths below a folder, which is made, and return it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
