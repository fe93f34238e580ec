# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, by arithmetic: bytes, operations, and the cards that have them."""
