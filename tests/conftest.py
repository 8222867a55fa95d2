import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download anything
sys.path.insert(0, str(Path(__file__).parent))
