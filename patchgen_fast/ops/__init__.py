"""The ops, a file each. Import functions from the top: ``from patchgen_fast import attention``."""
