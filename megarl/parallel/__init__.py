"""Process groups, collectives and the device: all that knows about more than one rank."""
