"""``python -m anomalib_gen`` is the command ``anomalib-gen``."""

from anomalib_gen.cli import app

if __name__ == "__main__":
    app()
