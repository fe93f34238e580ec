# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA for JAX: a pure parameter-tree transform over frozen 4-bit weights."""
