"""The local executor: attempts on this machine, each under a small shim that outlives the daemon."""
