"""The patch generator: trains, draws patch by patch, completes, reconstructs, evaluates and shows.

    data -> tasks -> model (heads, orders) -> training -> checkpoint
                                              checkpoint -> sampling -> evaluation, pictures

The commands are `patchgen-fast train` and `patchgen-fast generate`. Nothing is imported here, so
that their help needs no torch.
"""
