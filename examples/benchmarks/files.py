"""Files of measurements, each with the machine that they were made on."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def write(path: Path, **measured: Any) -> None:
    """Writes measurements as JSON, and says so.

    Args:
        path: The file; its folder is made where it is missing.
        **measured: What was measured, as plain numbers, lists and dicts.
    """
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"Wrote {path}")
