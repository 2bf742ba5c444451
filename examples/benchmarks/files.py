"""What benchmarks share: their options, and files of measurements with the machine behind them."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

CPU_INFO = Path("/proc/cpuinfo")


def parser(description: str, small: str) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has.

    Args:
        description: What it measures.
        small: What `--quick` makes of it.

    Returns:
        The parser, to which others can be added.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help=small)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    return made


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
        "processor": processor(),
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"Wrote {path}")


def processor() -> str:
    """What kind of processor this is, as the system calls it."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
