"""Every test runs on one CPU thread, without network; all may import the repository's modules."""

import os
import sys
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES=""
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The folder of a policy that learns in milliseconds; no test may change it."""
    from ranks import two_layers

    folder = tmp_path_factory.mktemp("models") / "two-layers"
    two_layers(folder)
    return str(folder)
