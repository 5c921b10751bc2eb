"""Training scripts, one per model family."""

if __name__ != "annealers.training":
    raise ImportError("import annealers.training: this folder is its source, and `training` would be a second copy of its classes")
