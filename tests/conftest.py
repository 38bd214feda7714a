import os
import sys
from pathlib import Path

# Before torch is imported anywhere: the worlds' ranks share few cores, and dynamo would compile megatron's fusions.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent))
