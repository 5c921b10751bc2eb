"""Training scripts, one per model family."""

if __name__ != "annealers.training":
    raise ImportError("import annealers.training; `training` would be a second copy of its classes")
