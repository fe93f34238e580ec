# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_qlora` is `jax-qlora`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
