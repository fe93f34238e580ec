# SPDX-License-Identifier: Apache-2.0
"""Examples, tokens, batches: everything between a file of chats and a step of training."""

from .batches import batch_indices as batch_indices
from .batches import make_batch as make_batch
from .batches import order as order
from .batches import pack as pack
from .batches import padded_length as padded_length
from .encode import Encoded as Encoded
from .encode import encode as encode
from .encode import encode_all as encode_all
from .encode import encode_prompt as encode_prompt
from .examples import Example as Example
from .examples import load_examples as load_examples
from .examples import load_splits as load_splits
from .metrics import archaic_share as archaic_share
from .metrics import chrf as chrf
from .metrics import copy_baseline as copy_baseline
from .metrics import is_archaic as is_archaic
from .preview import preview as preview
