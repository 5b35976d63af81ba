class InputError(ValueError):
    """Bad input or usage. The message is one line: which file or option, what is wrong, how to mend it."""
