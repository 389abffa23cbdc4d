"""Speed against reference and peers, and training under label noise. Run from the repository's root."""
