# SPDX-License-Identifier: Apache-2.0
"""Other people's formats: Hugging Face and GGUF checkpoints, bitsandbytes, PEFT, tokenizers."""
