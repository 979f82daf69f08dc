"""Found by every Python process with this folder on its PYTHONPATH (`tests.pretend.cuda.environment`)."""

import os

if devices := os.environ.get("SSD_PRETENDED_DEVICES"):
    from tests.pretend import install

    install(int(devices))
