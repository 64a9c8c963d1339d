"""B'MOJO: sequence models with fading and eidetic memory (arXiv 2407.06324)."""
