"""Found by every Python process with this folder on its PYTHONPATH (`tests.pretend.cuda.environment`)."""

import os
import sys

if devices := os.environ.get("SSD_PRETENDED_DEVICES"):
    # A machine with a GPU has the folders of the repository, and no installed package of it.
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    from tests.pretend import install

    install(int(devices))
