# SPDX-License-Identifier: Apache-2.0
"""One Flax NNX decoder whose configuration is data, as pure functions of a parameter tree."""

from .config import DecoderConfig as DecoderConfig
from .config import RopeScaling as RopeScaling
from .decoder import Cache as Cache
from .decoder import Decoder as Decoder
from .loss import chunked_loss as chunked_loss
from .model import DecoderFunctions as DecoderFunctions
from .model import Model as Model
from .model import abstract_model as abstract_model
from .model import abstract_params as abstract_params
from .model import decoder_functions as decoder_functions
from .model import head_params as head_params
from .model import init_cache as init_cache
from .model import init_params as init_params
from .virtual import PREFIX as PREFIX
from .virtual import PROMPT as PROMPT
from .virtual import count_virtual as count_virtual
