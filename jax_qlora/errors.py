# SPDX-License-Identifier: Apache-2.0
"""The one exception for input that people can mend."""


class InputError(ValueError):
    """Bad input: a file, key, path or setting that the caller can correct.

    The message names the thing, what was expected, what was found and what to do. The command
    line prints it without a traceback and exits with status 2.
    """
